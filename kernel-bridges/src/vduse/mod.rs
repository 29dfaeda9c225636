//! The export `vduse-blk`: a block node as a disk of this machine's kernel.
//!
//! ```text
//! export        life cycle, on the control thread           (bus: on the vdpa bus and off it, and what comes of it)
//!   claim         a new device, or one that a dead daemon left          (record: what is kept for whoever comes next)
//!   control       the kernel's messages and their answers
//!     queues        the queues while there is a driver      (crate::virtio serves them)
//!       memory        the driver's memory, looked up when it is needed
//! ```
//!
//! The control thread never waits for the disk, so that every message is answered at once, but for a reset while requests are under way:
//! after that answer the driver's memory may be somebody else's, so it comes when they have ended. The kernel gives a device up for good
//! that leaves it without an answer for 30 seconds; a reset that takes longer than [`control`]'s patience is answered as failed, and the
//! device takes no driver until the requests have ended.

mod bus;
mod claim;
mod control;
mod export;
mod memory;
mod queues;
mod record;

pub(crate) use export::{VduseExport, VduseOptions};
