//! I/O contexts for stord: one thread, one loop, one ring. A request that starts on a [`Context`]
//! is submitted, runs and completes there.
//!
//! - [`Context`] is the thread; [`spawn_local`], [`yield_now`], [`join_all`], [`time`] and
//!   [`sync`] are what its tasks are written with.
//! - [`IoBuffer`] and [`IoVec`] are memory that stays valid until the kernel is done with it,
//!   whatever happens to the future that asked for the transfer.
//! - [`File`] transfers at offsets, [`PolledFd`] waits for descriptors, [`pool`] runs what blocks.
//! - [`sim`] runs the same tasks on one thread with a chosen interleaving and a virtual clock.
//!
//! The engine below is io_uring, or epoll and blocking threads where io_uring is refused; nothing
//! above can tell the difference but by [`Context::uses_ring`] and by its speed.

mod buffer;
mod context;
mod engine;
mod executor;
mod fences;
pub mod file;
mod iovec;
mod join;
mod op;
mod polled;
mod polling;
pub mod pool;
mod remote;
pub mod sim;
pub mod sync;
mod syscall;
mod task;
pub mod time;
mod timers;
mod uring_cmd;

pub use buffer::{ExposedMemory, IoBuffer, SharedMemory};
pub use context::{Context, ContextConfig, ContextGone, MAX_CONTEXTS, add_spinner, current_index};
pub use executor::{is_quiet, spawn_local, submit_now, turns, yield_now};
pub use fences::Fences;
pub use file::{Engine, Fallocate, File};
pub use iovec::IoVec;
pub use join::join_all;
pub use nix::errno::Errno;
pub use polled::PolledFd;
pub use polling::{PollParams, Spinner};
pub use pool::PoolLimits;
pub use syscall::return_free_memory;
pub use uring_cmd::{UringCmd, uring_cmd};
