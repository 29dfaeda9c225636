//! virtio-blk devices as VDUSE and vhost-user show them: the rings, the requests, and how they are served.
//!
//! ```text
//! (transport)    who set the device up, where its memory is: vduse, vhost_user
//!   blk::disk      what all queues of a device share: the backend, the configuration space, drained sections
//!   blk::queue     one virtqueue on one context: fetch, serve at once or as a task, complete, notify
//!     blk::request   a chain of descriptors as a request, checked
//!     ring::split    the split virtqueue       (ring::chain: one chain of its descriptors)
//!     in_flight      what is under way, kept where another process finds it
//!   memory         guest addresses as memory of this process   (memory::mapping: the mappings)
//! ```
//!
//! Sections are those of the VIRTIO specification, version 1.2. Everything in a ring and in what it points to belongs to a driver that
//! may be hostile: it is copied before it is looked at, and a rule broken stops that one queue.

pub(crate) mod blk;
pub(crate) mod in_flight;
pub(crate) mod memory;
pub(crate) mod ring;
#[cfg(test)]
mod tests;

/// `VIRTIO_F_INDIRECT_DESC`: descriptors may point to tables of descriptors.
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`: each side says after which entry it wants to be notified.
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`: the device keeps to version 1 of the specification; everything is little-endian.
pub(crate) const F_VERSION_1: u64 = 1 << 32;
