//! What a check tells.

use stord_aio::Errno;
use stord_qmp::Error;
use thiserror::Error as ThisError;

/// Findings that are told one by one; more are only counted.
const MAX_NOTES: usize = 1000;

/// What a check may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    Nothing,
    /// Refcounts that are too high.
    Leaks,
    /// Everything that can be repaired.
    All,
}

/// What was found and repaired. The numbers are those of `qemu-img check`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Errors in the metadata that are there now.
    pub corruptions: u64,
    /// Clusters that are there now and that nothing refers to, or not as often as counted.
    pub leaks: u64,
    /// What could not be checked or not be written.
    pub check_errors: u64,
    /// Errors that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// The offset in bytes in the file at which the last cluster in use ends.
    pub image_end_offset: u64,
    /// Clusters that the guest sees.
    pub total_clusters: u64,
    /// Clusters that are stored.
    pub allocated_clusters: u64,
    /// Stored clusters that do not follow their neighbours.
    pub fragmented_clusters: u64,
    /// Clusters that are stored compressed.
    pub compressed_clusters: u64,
    /// What was found, in words; not more than can be read.
    pub notes: Vec<String>,
    /// How many findings are not in `notes`.
    pub notes_omitted: u64,
}

/// Findings in words.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes {
    list: Vec<String>,
    omitted: u64,
}

impl Notes {
    pub(super) fn add(&mut self, text: impl FnOnce() -> String) {
        if self.list.len() < MAX_NOTES {
            self.list.push(text());
        } else {
            self.omitted += 1;
        }
    }

    /// Adds one that is told in any case; of these there are few.
    pub(super) fn insist(&mut self, text: String) {
        if self.list.len() < 2 * MAX_NOTES {
            self.list.push(text);
        }
    }

    /// Puts the findings into the report.
    pub(super) fn file(self, report: &mut Report) {
        report.notes = self.list;
        report.notes_omitted = self.omitted;
    }
}

/// Why a check did not come to its end.
#[derive(Clone, Debug, ThisError)]
pub(super) enum CheckError {
    #[error("Could not read {what} at offset {offset:#x}: {}", Error::reason(&(*errno).into()))]
    Read {
        what: &'static str,
        offset: u64,
        errno: Errno,
    },
    #[error("Could not write {what} at offset {offset:#x}: {}", Error::reason(&(*errno).into()))]
    Write {
        what: &'static str,
        offset: u64,
        errno: Errno,
    },
    #[error("Could not flush the image: {}", Error::reason(&(*.0).into()))]
    Flush(Errno),
    #[error("{0}")]
    Snapshots(&'static str),
    #[error("The persistent bitmaps are damaged: {0}")]
    Bitmaps(String),
    #[error("The refcount table would have to be larger than the format allows")]
    TableTooLarge,
}

impl CheckError {
    pub(super) fn read(what: &'static str, offset: u64, errno: Errno) -> Self {
        Self::Read {
            what,
            offset,
            errno,
        }
    }

    pub(super) fn write(what: &'static str, offset: u64, errno: Errno) -> Self {
        Self::Write {
            what,
            offset,
            errno,
        }
    }
}

impl From<CheckError> for Error {
    fn from(error: CheckError) -> Self {
        Self::generic(error.to_string())
    }
}
