//! Tests of the I/O contexts through their public interface, each on both engines.

mod buffers;
mod context;
mod engines;
mod file;
mod polled;
mod pool;
mod range_lock;
mod sim;
mod uring_cmd;
