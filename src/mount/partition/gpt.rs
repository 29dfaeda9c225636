//! The GUID partition table (UEFI specification, section 5.3): a header in the second block and a
//! copy in the last one, each with checksums over itself and over the entries it points to.

use stord_aio::Errno;
use stord_qmp::Error;

use super::{Disk, Partition, u32_at, u64_at};

/// Block sizes that disks have, in bytes.
const BLOCK_SIZES: [u64; 2] = [512, 4096];

/// The smallest header and the smallest entry, in bytes.
const HEADER_SIZE: usize = 92;
const ENTRY_SIZE: usize = 128;

/// The most bytes of entries that are looked at; the usual table has 16 KiB.
const MAX_ENTRIES_SIZE: usize = 1 << 20;

/// A header whose checksum is right.
struct Header {
    block_size: u64,
    entries_at: u64,
    entry_count: u32,
    entry_size: usize,
    entries_checksum: u32,
}

/// The partitions that the first good copy of the table lists.
pub async fn partitions<R>(disk: &Disk<R>) -> Result<Vec<Partition>, Error>
where
    R: AsyncFn(u64, usize) -> Result<Vec<u8>, Errno>,
{
    for block_size in BLOCK_SIZES {
        let last = (disk.size / block_size).saturating_sub(1);
        for block in [1, last] {
            if let Some(found) = read_table(disk, block_size, block).await? {
                return Ok(found);
            }
        }
    }
    Err(Error::generic(
        "the GUID partition table and its backup are damaged",
    ))
}

async fn read_table<R>(
    disk: &Disk<R>,
    block_size: u64,
    block: u64,
) -> Result<Option<Vec<Partition>>, Error>
where
    R: AsyncFn(u64, usize) -> Result<Vec<u8>, Errno>,
{
    let Some(sector) = disk.read(block * block_size, 512).await? else {
        return Ok(None);
    };
    let Some(header) = Header::parse(&sector, block_size, block) else {
        return Ok(None);
    };
    let Some((offset, len)) = header.entries_range() else {
        return Ok(None);
    };
    let Some(entries) = disk.read(offset, len).await? else {
        return Ok(None);
    };
    if crc32(&entries) != header.entries_checksum {
        return Ok(None);
    }
    let mut found = Vec::new();
    for (entry, number) in entries.chunks_exact(header.entry_size).zip(1..) {
        if entry.iter().take(16).all(|byte| *byte == 0) {
            continue;
        }
        let partition = entry_range(entry, block_size)
            .and_then(|(start, len)| Partition::inside(number, start, len, disk.size));
        found.push(partition.ok_or_else(|| {
            Error::generic(format!("partition {number} is not inside the image"))
        })?);
    }
    Ok(Some(found))
}

fn entry_range(entry: &[u8], block_size: u64) -> Option<(u64, u64)> {
    let first = u64_at(entry, 32)?;
    let last = u64_at(entry, 40)?;
    let blocks = last.checked_sub(first)?.checked_add(1)?;
    Some((
        first.checked_mul(block_size)?,
        blocks.checked_mul(block_size)?,
    ))
}

impl Header {
    /// Reads the header in a block; `None` if there is no good one.
    fn parse(sector: &[u8], block_size: u64, block: u64) -> Option<Self> {
        let size = usize::try_from(u32_at(sector, 12)?).ok()?;
        if !sector.starts_with(b"EFI PART") || size < HEADER_SIZE {
            return None;
        }
        let mut bytes = sector.get(..size)?.to_vec();
        bytes.get_mut(16..20)?.fill(0);
        let good = crc32(&bytes) == u32_at(sector, 16)? && u64_at(sector, 24)? == block;
        good.then_some(Self {
            block_size,
            entries_at: u64_at(sector, 72)?,
            entry_count: u32_at(sector, 80)?,
            entry_size: usize::try_from(u32_at(sector, 84)?).ok()?,
            entries_checksum: u32_at(sector, 88)?,
        })
    }

    /// Offset and length of the entries in bytes; `None` if they are out of bounds.
    fn entries_range(&self) -> Option<(u64, usize)> {
        let len = usize::try_from(self.entry_count)
            .ok()?
            .checked_mul(self.entry_size)?;
        let good = self.entry_size >= ENTRY_SIZE && len <= MAX_ENTRIES_SIZE;
        good.then_some((self.entries_at.checked_mul(self.block_size)?, len))
    }
}

/// The CRC-32 of IEEE 802.3, as UEFI uses it.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = crc & 1;
            crc >>= 1;
            if carry == 1 {
                crc ^= 0xedb8_8320;
            }
        }
    }
    !crc
}
