//! Locks that tell other processes what is done with an image, byte for byte those of the reference.
//!
//! For permission bit *n*, a shared lock on byte 100 + *n* says "I use it", and one on byte 200 + *n* says "I do not share it". All
//! locks are shared ones, so that any number of processes can say the same; a conflict is found by asking whether an exclusive lock
//! could be had on the byte where an opponent would say its part. They are open file description locks, so they live and die with the
//! descriptor, whichever thread uses it.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use stord_aio::Errno;
use stord_qmp::Error;

use crate::graph::Permissions;

const USED_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;

/// The permissions that a set of locks stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Held {
    used: Permissions,
    unshared: Permissions,
}

impl Held {
    const NOTHING: Self = Self {
        used: Permissions::empty(),
        unshared: Permissions::empty(),
    };
}

struct State {
    held: Held,
    wanted: Held,
}

/// The locks of one open file.
pub(super) struct Locks {
    /// `None` where the user wants no locks or the file system has none.
    fd: Option<OwnedFd>,
    state: Mutex<State>,
}

impl Locks {
    pub(super) fn new(fd: Option<OwnedFd>) -> Self {
        Self {
            fd,
            state: Mutex::new(State {
                held: Held::NOTHING,
                wanted: Held::NOTHING,
            }),
        }
    }

    /// Whether the file can be locked at all.
    pub(super) fn supported(fd: &OwnedFd) -> bool {
        let mut query = flock(libc::F_RDLCK, 0);
        fcntl(fd, FcntlArg::F_OFD_GETLK(&mut query)).is_ok()
    }

    /// Takes the locks that are new and looks for opponents; keeps those held so far.
    pub(super) fn prepare(
        &self,
        used: Permissions,
        shared: Permissions,
        filename: &str,
    ) -> Result<(), Error> {
        let Some(fd) = &self.fd else { return Ok(()) };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = Held {
            used,
            unshared: Permissions::all() - shared,
        };
        let both = Held {
            used: state.held.used | wanted.used,
            unshared: state.held.unshared | wanted.unshared,
        };
        state.wanted = wanted;
        let taken = apply(fd, state.held, both)
            .map_err(|(what, errno)| {
                Error::generic(format!("Failed to lock byte {what}")).with_source(errno)
            })
            .and_then(|()| find_opponent(fd, wanted).map_err(Error::generic))
            .map_err(|error| {
                error.with_hint(format!("Is another process using the image [{filename}]?"))
            });
        if taken.is_err() {
            // Back to what was held; letting go cannot fail.
            let _ = apply(fd, both, state.held);
        }
        taken
    }

    /// Gives up what is not wanted any more.
    pub(super) fn commit(&self) {
        self.settle(|state| state.wanted);
    }

    /// Gives up what was taken in vain.
    pub(super) fn abort(&self) {
        self.settle(|state| state.held);
    }

    fn settle(&self, choose: impl FnOnce(&State) -> Held) {
        let Some(fd) = &self.fd else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let both = Held {
            used: state.held.used | state.wanted.used,
            unshared: state.held.unshared | state.wanted.unshared,
        };
        let kept = choose(&state);
        if let Err((byte, errno)) = apply(fd, both, kept) {
            tracing::warn!(byte, %errno, "could not give up an image lock");
        }
        state.held = kept;
        state.wanted = kept;
    }
}

fn flock(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).expect("lock types are small numbers"),
        l_whence: i16::try_from(libc::SEEK_SET).expect("seek origins are small numbers"),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// Goes from one set of locks to another; on failure says at which byte.
fn apply(fd: &OwnedFd, from: Held, to: Held) -> Result<(), (i64, Errno)> {
    for (base, from, to) in [
        (USED_BASE, from.used, to.used),
        (UNSHARED_BASE, from.unshared, to.unshared),
    ] {
        for (byte, bit) in bytes(base, Permissions::all()) {
            let kind = match (from.contains(bit), to.contains(bit)) {
                (false, true) => libc::F_RDLCK,
                (true, false) => libc::F_UNLCK,
                _ => continue,
            };
            fcntl(fd, FcntlArg::F_OFD_SETLK(&flock(kind, byte))).map_err(|errno| (byte, errno))?;
        }
    }
    Ok(())
}

/// Looks whether another process refuses what we use, or uses what we refuse.
fn find_opponent(fd: &OwnedFd, wanted: Held) -> Result<(), String> {
    for (base, ours, what) in [
        (UNSHARED_BASE, wanted.used, ""),
        (USED_BASE, wanted.unshared, "shared "),
    ] {
        for (byte, bit) in bytes(base, ours) {
            let mut query = flock(libc::F_WRLCK, byte);
            let free = fcntl(fd, FcntlArg::F_OFD_GETLK(&mut query)).is_ok()
                && i32::from(query.l_type) == libc::F_UNLCK;
            if !free {
                return Err(format!("Failed to get {what}\"{}\" lock", bit.names()));
            }
        }
    }
    Ok(())
}

/// The lock byte of each permission in the set.
fn bytes(base: i64, set: Permissions) -> impl Iterator<Item = (i64, Permissions)> {
    set.iter()
        .map(move |bit| (base + i64::from(bit.bits().trailing_zeros()), bit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn opened(path: &std::path::Path) -> Locks {
        Locks::new(Some(File::open(path).unwrap().into()))
    }

    #[test]
    fn writer_and_reader_that_refuses_writers_exclude_each_other() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (writer, reader) = (opened(image.path()), opened(image.path()));
        writer
            .prepare(Permissions::WRITE, Permissions::all(), "x")
            .unwrap();
        writer.commit();
        let refused = reader
            .prepare(
                Permissions::CONSISTENT_READ,
                Permissions::all() - Permissions::WRITE,
                "x",
            )
            .unwrap_err();
        assert_eq!(refused.message, "Failed to get shared \"write\" lock");
        assert_eq!(
            refused.hint.as_deref(),
            Some("Is another process using the image [x]?")
        );
        writer
            .prepare(Permissions::empty(), Permissions::all(), "x")
            .unwrap();
        writer.commit();
        reader
            .prepare(
                Permissions::CONSISTENT_READ,
                Permissions::all() - Permissions::WRITE,
                "x",
            )
            .unwrap();
        reader.commit();
        let refused = writer
            .prepare(Permissions::WRITE, Permissions::all(), "x")
            .unwrap_err();
        assert_eq!(refused.message, "Failed to get \"write\" lock");
    }

    #[test]
    fn failed_and_aborted_preparations_leave_the_old_locks() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (first, second, third) = (
            opened(image.path()),
            opened(image.path()),
            opened(image.path()),
        );
        first
            .prepare(
                Permissions::CONSISTENT_READ,
                Permissions::all() - Permissions::WRITE,
                "x",
            )
            .unwrap();
        first.commit();
        second
            .prepare(Permissions::WRITE, Permissions::all(), "x")
            .unwrap_err();
        third
            .prepare(
                Permissions::RESIZE,
                Permissions::all() - Permissions::RESIZE,
                "x",
            )
            .unwrap();
        third.abort();
        // Neither the failed nor the aborted one holds anything against this.
        second
            .prepare(
                Permissions::RESIZE,
                Permissions::all() - Permissions::WRITE,
                "x",
            )
            .unwrap();
    }
}
