//! The virtio block device (section 5.2).

pub(crate) mod config;
pub(crate) mod disk;
pub(crate) mod queue;
pub(crate) mod request;
