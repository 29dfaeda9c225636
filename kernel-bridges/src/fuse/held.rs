//! Entries of FUSE over io_uring on their way from one process to another.
//!
//! An entry that waits for a request can be taken back from the kernel by the end of its ring only, and then a request that the kernel
//! has just given to it is lost. An entry with a request in it belongs to nobody but whoever answers: the kernel knows it by the number
//! of the request, and copies the reply from the memory of the process that sends it, at the addresses that were once registered. So an
//! entry changes to another process with a request in it, which is answered there, from memory at the same addresses. Requests that
//! come meanwhile find no entry, and wait.
//!
//! To get a request into every entry, the process that leaves makes some itself (`fill`), which the other answers like any others.

use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::entries::Then;
use super::ring_entry::EntryParts;

/// An entry without a context.
pub(super) struct Held {
    pub(super) parts: EntryParts,
    /// What is to be done with it next.
    pub(super) then: Then,
}

/// All entries of an export, each with a request in it.
#[derive(Default)]
pub(super) struct HeldEntries(Vec<Held>);

/// An entry as one process describes it to another; the content of its memory follows.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Record {
    queue: u64,
    address: u64,
    commit_id: u64,
    /// Not zero for a request that has been answered.
    is_answered: u64,
    /// Bytes of memory that follow.
    length: u64,
}

impl HeldEntries {
    pub(super) fn new(entries: Vec<Held>) -> Self {
        Self(entries)
    }

    /// The entries, if all of them are of queues below `queues`.
    pub(super) fn of_queues(self, queues: u16) -> Result<Vec<Held>, Errno> {
        if self.0.iter().all(|entry| entry.parts.queue < queues) {
            Ok(self.0)
        } else {
            Err(Errno::EINVAL)
        }
    }

    /// Writes them to a file in memory.
    pub(super) fn write(&self) -> Result<OwnedFd, Errno> {
        let mut file = std::fs::File::from(memfd_create(c"requests", MFdFlags::MFD_CLOEXEC)?);
        let mut write = |bytes: &[u8]| {
            let written = file.write_all(bytes);
            written.map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
        };
        for Held { parts, then } in &self.0 {
            let content = parts.content();
            let record = Record {
                queue: parts.queue.into(),
                address: parts.address() as u64,
                commit_id: parts.commit_id(),
                is_answered: u64::from(*then == Then::Commit),
                length: content.len() as u64,
            };
            write(record.as_bytes())?;
            write(&content)?;
        }
        Ok(file.into())
    }

    /// Reads what [`write`](Self::write) wrote, and puts it into memory at the same addresses. `None` where that is not to be had.
    pub(super) fn read(file: OwnedFd) -> Option<Self> {
        let mut file = std::fs::File::from(file);
        let mut left = usize::try_from(file.metadata().ok()?.len()).ok()?;
        file.rewind().ok()?;
        let mut entries = Vec::new();
        while left > 0 {
            let mut record = [0; size_of::<Record>()];
            file.read_exact(&mut record).ok()?;
            let record = Record::read_from_bytes(&record).ok()?;
            let length = usize::try_from(record.length).ok()?;
            left = left.checked_sub(size_of::<Record>())?.checked_sub(length)?;
            let mut content = vec![0; length];
            file.read_exact(&mut content).ok()?;
            let parts = EntryParts::restore(
                u16::try_from(record.queue).ok()?,
                usize::try_from(record.address).ok()?,
                record.commit_id,
                &content,
            )?;
            let then = match record.is_answered {
                0 => Then::Receive,
                _ => Then::Commit,
            };
            entries.push(Held { parts, then });
        }
        Some(Self(entries))
    }
}

impl std::fmt::Debug for HeldEntries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HeldEntries({})", self.0.len())
    }
}
