//! The FUSE export: a block node as a regular file, mounted over an existing file.
//!
//! ```text
//! export       life cycle, on the control thread
//!   mount        how the file system gets to its path and away again    (kernel: the system calls, init: the first request)
//!   connection   what another process needs to go on
//!   session      what the queues share
//!     uring        the same over io_uring                               (ring_entry: memory for requests, entries, held, fill)
//!     classic      a queue: fetch, answer at once or as a task, reply   (buffers: memory for requests, waiting)
//!       request      what is asked, without its transport               (abi: the wire format)
//!       file_system  what is answered: which file is meant              (directory, copy)
//!         disk_file    what a file answers                              (attributes, space, control, resize)
//! ```

mod abi;
mod attributes;
mod buffers;
mod classic;
mod connection;
mod control;
mod copy;
mod directory;
mod disk_file;
mod entries;
mod export;
mod file_system;
mod fill;
mod follow;
mod held;
mod idle;
mod init;
mod kernel;
mod mount;
mod passthrough;
mod queues;
mod request;
mod resize;
mod ring_entry;
mod session;
mod space;
#[cfg(test)]
mod tests;
mod uring;
mod waiting;

pub use connection::Connection;
pub(crate) use export::{Contents, FileOptions, FuseExport, FuseOptions, check_mountpoint};
pub(crate) use resize::{ResizeRequest, serve_resizes};
