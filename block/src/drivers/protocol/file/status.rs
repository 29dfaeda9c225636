//! Where a file has data and where holes, as its file system says.
//!
//! To find the end of a stretch of data a file system walks through all of it, so the stretch found last is remembered. What it says is
//! harmless when it is out of date: data that has become a hole reads as zeroes all the same. Holes are not remembered.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::unistd::{Whence, lseek};
use stord_aio::Errno;

use crate::driver::BlockStatus;

/// All of it is data.
pub(super) fn data(len: u64) -> BlockStatus {
    BlockStatus {
        len,
        data: true,
        zero: false,
        allocated: true,
    }
}

/// A stretch of data that was found.
#[derive(Debug, Default)]
pub(super) struct Found(Mutex<Stretch>);

#[derive(Debug, Default)]
struct Stretch {
    data: Range<u64>,
    /// Rises whenever data may have become a hole.
    changes: u64,
}

impl Found {
    fn lock(&self) -> MutexGuard<'_, Stretch> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of the beginning of a range, or else the number of changes so far, for [`note`](Self::note).
    pub(super) fn look_up(&self, offset: u64, len: u64) -> Result<BlockStatus, u64> {
        let stretch = self.lock();
        if stretch.data.contains(&offset) {
            return Ok(data(len.min(stretch.data.end - offset)));
        }
        Err(stretch.changes)
    }

    /// Remembers a stretch of data that was found since the number of changes was `changes`.
    pub(super) fn note(&self, data: Range<u64>, changes: u64) {
        let mut stretch = self.lock();
        if stretch.changes == changes {
            stretch.data = data;
        }
    }

    /// Notes that data may become a hole, or has.
    pub(super) fn forget(&self) {
        let mut stretch = self.lock();
        stretch.changes += 1;
        stretch.data = 0..0;
    }
}

/// Asks the file system; one that cannot tell says that all is data. Gives the stretch of data at `offset`, too.
pub(super) fn seek(
    fd: BorrowedFd<'_>,
    offset: u64,
    len: u64,
) -> Result<(BlockStatus, Range<u64>), Errno> {
    let hole = |len| BlockStatus {
        data: false,
        zero: true,
        ..data(len)
    };
    let start = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    let distance = |to: i64| u64::try_from(to - start).unwrap_or(0);
    let nothing = || 0..0;
    match lseek(fd, start, Whence::SeekData) {
        Err(Errno::ENXIO) => Ok((hole(len), nothing())),
        Err(_) => Ok((data(len), nothing())),
        Ok(at) if at > start => Ok((hole(distance(at).min(len)), nothing())),
        Ok(_) => match lseek(fd, start, Whence::SeekHole) {
            Ok(at) if at > start => {
                let stretch = offset..offset + distance(at);
                Ok((data(distance(at).min(len)), stretch))
            }
            _ => Ok((data(len), nothing())),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretch_is_known_until_something_changes() {
        let found = Found::default();
        let changes = found.look_up(0, 10).expect_err("nothing is known");
        found.note(100..200, changes);
        assert_eq!(found.look_up(150, 10).map(|known| known.len), Ok(10));
        assert_eq!(found.look_up(150, 100).map(|known| known.len), Ok(50));
        assert!(found.look_up(99, 10).is_err() && found.look_up(200, 1).is_err());
        found.forget();
        assert!(found.look_up(150, 10).is_err());
        // What was looked up before a change is not remembered after it.
        found.note(100..200, changes);
        assert!(found.look_up(150, 10).is_err());
    }
}
