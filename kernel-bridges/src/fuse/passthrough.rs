//! Passthrough: the kernel reads the image's file by itself, where nothing between the file and its users has to see that.
//!
//! The kernel decides when a file is opened and keeps to it until it is closed. It can have either files that are read through us or
//! files that are not open at a time, and asks that every file opened beside one of the latter is of that kind; a flag then still lets
//! reads and writes come to us. So:
//!
//! - Passthrough begins with a file opened for reading while no other is open, and ends when the last has been closed.
//! - A file opened for writing is never read or written past us: writes past the image's end must not make it longer. Opened beside
//!   one in passthrough, its mappings go to the image's file directly; so a read-only export lets nobody open it for writing then.
//! - The kernel obeys O_DIRECT. A user's O_DIRECT must not send reads to the disk that the page cache would answer, nor its absence fill
//!   the page cache that `cache.direct=on` leaves alone: such files are read through us.
//! - What is open so can be read until it is closed, even when the export has ended.
//! - While it lasts, the graph keeps the bytes where they are (`stord_block::Bypass`).

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use stord_aio::Errno;
use stord_block::{Backend, Bypass};

use super::abi::{OpenFlags, OpenOut};
use super::kernel;

/// How files are opened that are read through us.
const THROUGH_US: OpenFlags = OpenFlags::DIRECT_IO.union(OpenFlags::PARALLEL_DIRECT_WRITES);
/// The handle of files whose inode is in passthrough; others have 0.
const PAST_US: u64 = 1;

/// A connection, for telling the kernel of files; closed when the connection is to end.
pub(super) struct BackingDevice(Mutex<Option<OwnedFd>>);

/// How one file is opened.
#[derive(Default)]
pub(super) struct Passthrough {
    /// `None` where the kernel cannot, or nobody wants it.
    device: Option<Arc<BackingDevice>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    backing: Option<Backing>,
    /// Open files that were opened with the backing file, and others.
    past_us: usize,
    through_us: usize,
    /// The kernel has refused.
    refused: bool,
}

/// The image's file, as the kernel knows it.
struct Backing {
    id: i32,
    bypass: Bypass,
    /// The file is in memory, where O_DIRECT makes no difference.
    in_memory: bool,
}

impl BackingDevice {
    /// For the connection of this descriptor, which is another one of it.
    pub(super) fn new(device: OwnedFd) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(device))))
    }

    /// Lets go of the connection.
    pub(super) fn close(&self) {
        drop(self.lock().take());
    }

    fn lock(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, file: &OwnedFd) -> Result<i32, Errno> {
        let device = self.lock();
        let device = device.as_ref().ok_or(Errno::ENODEV)?;
        kernel::open_backing(device.as_fd(), file.as_fd())
    }

    fn forget(&self, id: i32) {
        if let Some(device) = &*self.lock() {
            // It goes with the connection otherwise.
            let _ = kernel::close_backing(device.as_fd(), id);
        }
    }
}

impl Passthrough {
    /// With a device, passthrough is used where it can be.
    pub(super) fn new(device: Option<Arc<BackingDevice>>) -> Self {
        Self {
            device,
            state: Mutex::default(),
        }
    }

    /// Whether files are open so.
    pub(super) fn is_on(&self) -> bool {
        self.lock().past_us > 0
    }

    /// Decides how a file is opened, with flags as in open(2).
    ///
    /// # Errors
    /// `EACCES` for writing to a read-only export, where mappings would allow it.
    pub(super) fn open(
        &self,
        flags: u32,
        backend: &Backend,
        writable: bool,
    ) -> Result<OpenOut, Errno> {
        let flags = OFlag::from_bits_retain(flags.cast_signed());
        let reads_only = flags & OFlag::O_ACCMODE == OFlag::O_RDONLY;
        let mut state = self.lock();
        if state.past_us == 0 && state.through_us == 0 && reads_only && !state.refused {
            state.begin(self.device.as_deref(), flags, backend);
        }
        let Some(backing) = &state.backing else {
            state.through_us += 1;
            return Ok(OpenOut {
                open_flags: THROUGH_US.bits(),
                ..OpenOut::default()
            });
        };
        if !reads_only && !writable {
            return Err(Errno::EACCES);
        }
        let mut open_flags = OpenFlags::PASSTHROUGH;
        if !reads_only || !backing.suits(flags) {
            open_flags |= THROUGH_US;
        }
        let backing_id = backing.id;
        state.past_us += 1;
        Ok(OpenOut {
            fh: PAST_US,
            open_flags: open_flags.bits(),
            backing_id,
        })
    }

    /// Notes that an open file is no more.
    pub(super) fn close(&self, handle: u64) {
        let mut state = self.lock();
        let count = if handle == PAST_US {
            &mut state.past_us
        } else {
            &mut state.through_us
        };
        *count = count.saturating_sub(1);
        if state.past_us > 0 {
            return;
        }
        if let (Some(backing), Some(device)) = (state.backing.take(), &self.device) {
            device.forget(backing.id);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Begins passthrough, if everything allows it.
    fn begin(&mut self, device: Option<&BackingDevice>, flags: OFlag, backend: &Backend) {
        let Some(device) = device else { return };
        let Some(bypass) = backend.bypass() else {
            return;
        };
        let in_memory =
            fstatfs(bypass.file()).is_ok_and(|status| status.filesystem_type() == TMPFS_MAGIC);
        let mut backing = Backing {
            id: 0,
            bypass,
            in_memory,
        };
        if !backing.suits(flags) {
            return;
        }
        if !backing.takes_direct() {
            self.refused = true;
            return;
        }
        match device.open(backing.bypass.file()) {
            Ok(id) => {
                backing.id = id;
                self.backing = Some(backing);
            }
            Err(errno) => {
                tracing::debug!(%errno, "no FUSE passthrough");
                self.refused = true;
            }
        }
    }
}

impl Backing {
    /// Whether the kernel may serve a file that was opened so.
    fn suits(&self, flags: OFlag) -> bool {
        let direct = flags.contains(OFlag::O_DIRECT);
        if self.bypass.is_direct() {
            direct
        } else {
            !direct || self.in_memory
        }
    }

    /// Whether the file can be opened with O_DIRECT: the kernel opens it as its user opened ours, who may want that.
    fn takes_direct(&self) -> bool {
        let path = format!("/proc/self/fd/{}", self.bypass.file().as_raw_fd());
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECT | OFlag::O_CLOEXEC;
        open(path.as_str(), flags, Mode::empty()).is_ok()
    }
}
