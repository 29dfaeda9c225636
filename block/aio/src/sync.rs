//! Locks and channels for tasks. All may be shared between contexts and the control thread, since
//! a waker works from every thread.
//!
//! Those of tokio need none of its runtime. A lock may be held across an `.await`; its holder
//! should not be a task that waits for another holder of the same lock on the same context.

mod range_lock;

pub use tokio::sync::{Mutex, Notify, RwLock, Semaphore, mpsc, oneshot, watch};

pub use self::range_lock::{RangeGuard, RangeLock};
