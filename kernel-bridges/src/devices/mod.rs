//! Block devices of the kernel that stand in for VDUSE: a loop device over a file, and the NBD device over sockets.
//!
//! Whoever sets one up here must not be the process that serves it: closing a block device writes out what the kernel holds of it, and
//! a process that waits for itself cannot even be killed.

mod kernel_nbd;
mod loop_device;

pub use kernel_nbd::{KernelNbd, NbdSettings, NoNbdDevice};
pub use loop_device::{LoopDevice, LoopSettings};
