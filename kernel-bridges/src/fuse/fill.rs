//! Gets a request into every entry of io_uring, so that all of them can go to another process (`held`).
//!
//! The kernel gives a request to the queue of the processor that it is made on. So threads on each processor ask for the file system's
//! status, as many as there are entries. They sleep until the other process answers.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::thread;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::stat::Mode;
use nix::sys::statfs::fstatfs;
use nix::unistd::Pid;
use stord_aio::pool;

use super::entries::Common;
use super::kernel;
use super::mount::Mount;

/// Memory for a thread that makes one system call.
const STACK: usize = 64 << 10;
/// Which processors there are.
const ONLINE: &str = "/sys/devices/system/cpu/online";
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// Can make requests on every processor.
pub(super) struct Filler {
    root: Arc<OwnedFd>,
    queues: u16,
}

/// Why there is no way to fill the queues.
#[derive(Debug, thiserror::Error)]
pub(super) enum CannotFill {
    #[error("its file system is not at its path any more")]
    Unmounted,
    #[error("processor {0} cannot be used by this process, but by others")]
    Forbidden(u16),
    #[error("some processors of this machine are offline")]
    Offline,
    #[error("requests are under way that take very long")]
    Late,
    #[error("the system refuses")]
    System(#[from] io::Error),
}

impl Filler {
    /// Prepares it, for so many queues. Blocks for a moment.
    pub(super) fn new(mount: &Mount, queues: u16) -> Result<Self, CannotFill> {
        if fs::read(ONLINE)? != fs::read(POSSIBLE)? {
            return Err(CannotFill::Offline);
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let root = open(mount.path(), flags, Mode::empty());
        let root = root.map_err(|_| CannotFill::Unmounted)?;
        if kernel::device_number(Some(root.as_fd()), c"") != Ok(mount.device_number()) {
            return Err(CannotFill::Unmounted);
        }
        // What is tried here has no effect on other threads.
        let tried = thread::Builder::new().stack_size(STACK).spawn(move || {
            let allowed = (0..queues).try_for_each(|queue| stay_on(queue).map_err(|_| queue));
            allowed.map_err(CannotFill::Forbidden)
        })?;
        tried.join().unwrap_or(Err(CannotFill::Offline))?;
        Ok(Self {
            root: Arc::new(root),
            queues,
        })
    }

    /// Makes as many requests as there are entries.
    pub(super) async fn fill(self, common: &Arc<Common>) -> Result<(), CannotFill> {
        let common = Arc::clone(common);
        pool::run(move || {
            for queue in 0..self.queues {
                for _ in 0..common.count(queue) {
                    let root = Arc::clone(&self.root);
                    // Nobody waits for it: it ends when the request is answered.
                    thread::Builder::new().stack_size(STACK).spawn(move || {
                        if stay_on(queue).is_ok() {
                            let _ = fstatfs(&*root);
                        }
                    })?;
                }
            }
            Ok(())
        })
        .await
    }
}

/// Keeps the calling thread on one processor.
fn stay_on(processor: u16) -> Result<(), Errno> {
    let mut one = CpuSet::new();
    one.set(processor.into())?;
    sched_setaffinity(Pid::from_raw(0), &one)
}
