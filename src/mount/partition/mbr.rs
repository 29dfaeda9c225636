//! The master boot record: four entries, one of which may be an extended partition that holds a
//! chain of records with one logical partition each.

use std::collections::HashSet;

use stord_aio::Errno;
use stord_qmp::Error;

use super::{Disk, Partition, SECTOR, u32_at};

/// Where the entries begin in a record.
const ENTRIES_AT: usize = 446;

/// Bytes of an entry.
const ENTRY_SIZE: usize = 16;

/// The number of the first logical partition.
const FIRST_LOGICAL: u32 = 5;

/// The most logical partitions that are looked at.
const MAX_LOGICAL: u32 = 256;

/// An entry: a range in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    kind: u8,
    start: u64,
    len: u64,
}

impl Entry {
    fn is_empty(self) -> bool {
        self.kind == 0 || self.len == 0
    }

    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

/// A boot record, or one of the chain of logical partitions.
pub struct Record([Entry; 4]);

impl Record {
    /// Reads a record; `None` if the sector is none. A file system's boot sector has the same
    /// signature, but seldom four entries with a good status.
    pub fn parse(sector: &[u8]) -> Option<Self> {
        if sector.get(510..512)? != [0x55, 0xaa] {
            return None;
        }
        let mut entries = [Entry {
            kind: 0,
            start: 0,
            len: 0,
        }; 4];
        for (index, entry) in entries.iter_mut().enumerate() {
            let at = ENTRIES_AT + index * ENTRY_SIZE;
            if !matches!(sector.get(at)?, 0x00 | 0x80) {
                return None;
            }
            *entry = Entry {
                kind: *sector.get(at + 4)?,
                start: u32_at(sector, at + 8)?.into(),
                len: u32_at(sector, at + 12)?.into(),
            };
        }
        Some(Self(entries))
    }

    /// Whether the disk has a GUID partition table, which this record only announces.
    pub fn is_protective(&self) -> bool {
        self.0.iter().any(|entry| entry.kind == 0xee)
    }
}

/// The partitions that a master boot record lists.
pub async fn partitions<R>(disk: &Disk<R>, boot: &Record) -> Result<Vec<Partition>, Error>
where
    R: AsyncFn(u64, usize) -> Result<Vec<u8>, Errno>,
{
    let mut found = Vec::new();
    let mut extended = None;
    for (entry, number) in boot.0.iter().zip(1..) {
        if entry.is_empty() {
            continue;
        }
        if entry.is_extended() {
            extended.get_or_insert(*entry);
        }
        let partition = byte_range(number, entry.start, entry.len, disk.size);
        found.push(Partition {
            is_container: entry.is_extended(),
            ..partition.ok_or_else(|| outside(number))?
        });
    }
    if let Some(extended) = extended {
        logical_partitions(disk, extended, &mut found).await?;
    }
    Ok(found)
}

async fn logical_partitions<R>(
    disk: &Disk<R>,
    extended: Entry,
    found: &mut Vec<Partition>,
) -> Result<(), Error>
where
    R: AsyncFn(u64, usize) -> Result<Vec<u8>, Errno>,
{
    let mut number = FIRST_LOGICAL;
    let mut at = extended.start;
    let mut seen = HashSet::new();
    while seen.insert(at) && number < FIRST_LOGICAL + MAX_LOGICAL {
        let Some(sector) = disk.read(at * SECTOR, 512).await? else {
            return Err(outside(number));
        };
        // The chain of an extended partition without logical ones is an empty sector.
        let Some(Record([logical, next, ..])) = Record::parse(&sector) else {
            return Ok(());
        };
        if !logical.is_empty() {
            let partition = byte_range(number, at + logical.start, logical.len, disk.size);
            found.push(partition.ok_or_else(|| outside(number))?);
            number += 1;
        }
        if next.is_empty() || !next.is_extended() {
            return Ok(());
        }
        at = extended.start + next.start;
    }
    Err(Error::generic(
        "the chain of logical partitions does not end",
    ))
}

fn byte_range(number: u32, start: u64, len: u64, disk_size: u64) -> Option<Partition> {
    let start = start.checked_mul(SECTOR)?;
    Partition::inside(number, start, len.checked_mul(SECTOR)?, disk_size)
}

fn outside(number: u32) -> Error {
    Error::generic(format!("partition {number} is not inside the image"))
}
