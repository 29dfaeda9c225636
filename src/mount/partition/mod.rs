//! Finds a partition in a disk's content, by a GUID partition table (checked by its checksums, the
//! backup if the first is bad) or a master boot record with its chain of logical partitions.
//!
//! The table is a guest's: every number in it is checked against the disk, and following it ends.

mod gpt;
mod mbr;

use stord_aio::Errno;
use stord_qmp::Error;

/// The unit of a master boot record, in bytes.
const SECTOR: u64 = 512;

/// Where a partition is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number: from 1, logical partitions from 5.
    pub number: u32,
    /// Its first byte.
    pub start: u64,
    /// Its length in bytes, never 0.
    pub len: u64,
    /// It only holds the logical partitions, which are listed by themselves.
    pub is_container: bool,
}

impl Partition {
    /// A partition that lies inside a disk of so many bytes; `None` if it does not.
    fn inside(number: u32, start: u64, len: u64, disk_size: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        (start > 0 && len > 0 && end <= disk_size).then_some(Self {
            number,
            start,
            len,
            is_container: false,
        })
    }
}

/// A disk to look at: its size in bytes, and how to read an exact range of it.
pub struct Disk<R> {
    /// The size in bytes.
    pub size: u64,
    /// Reads a range of so many bytes at an offset, inside the disk.
    pub read: R,
}

impl<R: AsyncFn(u64, usize) -> Result<Vec<u8>, Errno>> Disk<R> {
    /// Reads a range; `None` if it is not inside the disk.
    async fn read(&self, offset: u64, len: usize) -> Result<Option<Vec<u8>>, Error> {
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > self.size) {
            return Ok(None);
        }
        match (self.read)(offset, len).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(errno) => {
                let error = std::io::Error::from(errno);
                let reason = crate::report::reason(&error);
                Err(Error::generic(format!(
                    "cannot read the partition table: {reason}"
                )))
            }
        }
    }

    /// All partitions, in the order of their numbers.
    ///
    /// # Errors
    /// The disk cannot be read, or has no partition table that can be trusted.
    pub async fn table(&self) -> Result<Table, Error> {
        let no_table = || Error::generic("there is no partition table");
        let boot = self.read(0, 512).await?.ok_or_else(no_table)?;
        let boot = mbr::Record::parse(&boot).ok_or_else(no_table)?;
        let partitions = if boot.is_protective() {
            gpt::partitions(self).await?
        } else {
            mbr::partitions(self, &boot).await?
        };
        Ok(Table(partitions))
    }
}

/// The partitions of a disk, in the order of their numbers.
#[derive(Clone, Debug)]
pub struct Table(pub Vec<Partition>);

impl Table {
    /// The partition of that number.
    ///
    /// # Errors
    /// There is no such partition.
    pub fn partition(&self, number: u32) -> Result<Partition, Error> {
        let found = self.0.iter().find(|found| found.number == number);
        found.copied().ok_or_else(|| {
            let list = self.0.iter();
            let list: Vec<String> = list
                .map(|found| format!("{} ({})", found.number, crate::mount::size_text(found.len)))
                .collect();
            let error = Error::generic(format!("there is no partition {number}"));
            if list.is_empty() {
                error.with_hint("The partition table is empty.")
            } else {
                error.with_hint(format!("Partitions: {}", list.join(", ")))
            }
        })
    }
}

/// A little-endian number at an offset; `None` outside the bytes.
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(field.try_into().ok()?))
}

/// A little-endian number at an offset; `None` outside the bytes.
fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(field.try_into().ok()?))
}

#[cfg(test)]
mod tests;
