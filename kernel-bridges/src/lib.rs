//! Exports: block nodes as seen from outside.
//!
//! [`ExportRegistry`] adds, removes and lists them, on the control thread. An export sees the block layer as a
//! [`stord_block::Backend`] and never a driver; each of its queues is a set of local tasks on one I/O context.

pub mod devices;
mod export;
mod fuse;
pub mod mount_table;
mod nbd;
mod registry;
mod state_directory;
mod vduse;
mod vhost_user;
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "a few parts of it only its tests use")
)]
mod virtio;

pub use fuse::Connection;
pub use registry::{
    DirectoryFile, ExportEvent, ExportRegistry, MountExport, MountLayout, NbdLink, NbdLinkOptions,
};
pub use state_directory::StateDirectory;
