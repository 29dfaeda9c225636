//! vhost-user-blk: a virtio disk for a virtual machine whose memory is shared over a socket.
//!
//! ```text
//! export      where front ends come, one after the other                  (device: the disk that each of them sees)
//!   session     one front end: what was agreed on, message after message  (channel: the socket; message: the wire)
//!     ring        one virtqueue as the front end sets it up               (served by virtio::blk::queue on its context)
//!     memory      the guest's memory                                      (dirty_log: what was written to it)
//!     in_flight   the record of requests under way that outlives us
//!     notices     what the front end is told unasked
//! ```
//!
//! All of this is on the control thread and waits for sockets and for rings to stop, never for a request that can go on without it.
//! The `vhost` crate was not taken: its back end waits on the socket in a thread of its own and calls a device that has to answer
//! within the call, while a ring here stops when its requests are done and nobody waits meanwhile.

mod channel;
mod device;
mod dirty_log;
mod export;
mod in_flight;
mod memory;
mod message;
mod notices;
mod ring;
mod session;

pub(crate) use export::{VhostUserExport, VhostUserOptions};
