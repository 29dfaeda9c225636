//! References of the persistent bitmaps: their directory, their tables, their data. The section of the format is "Bitmaps".
//!
//! A directory or a table that breaks the format's rules ends the check, as it keeps the image from being opened: what the bitmaps
//! refer to cannot be known then, and must not be taken for leaked.

use zerocopy::FromBytes;

use super::file::ImageFile;
use super::report::CheckError;
use super::survey::Survey;
use crate::drivers::format::qcow2::header::Header;
use crate::drivers::format::qcow2::layout::{OFFSET_MASK, RawBitmapEntry};

/// In bitmap table entries: bits that must be zero.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// In bitmap table entries without an offset: the bits are all ones.
const ALL_ONES: u64 = 1;
/// The bitmap was not saved properly.
const FLAG_IN_USE: u32 = 1;
/// Flags that must be zero.
const FLAGS_RESERVED: u32 = !0b11;
/// The only type of bitmap.
const DIRTY_TRACKING: u8 = 1;
/// The most entries of a bitmap table.
const MAX_TABLE: u64 = 0x800_0000;
/// The most bytes of a bitmap.
const MAX_BYTES: u64 = 0x2000_0000;
/// The longest name in bytes.
const MAX_NAME: u16 = 1023;

pub(super) async fn count(
    survey: &mut Survey,
    file: &ImageFile,
    header: &Header,
) -> Result<(), CheckError> {
    let Some(extension) = header.bitmaps else {
        return Ok(());
    };
    let (offset, size) = (extension.directory_offset, extension.directory_size);
    survey.refer(offset, size, 1, "bitmap directory");
    // Past the file's end there are zeroes, which are no entry.
    let in_file = size.min(file.size().saturating_sub(offset));
    let directory = file
        .read(offset, in_file)
        .await
        .map_err(|errno| CheckError::read("the bitmap directory", offset, errno))?;
    let mut rest = directory.as_slice();
    let mut count = 0;
    while !rest.is_empty() {
        let broken = || CheckError::Bitmaps("the directory is broken".to_owned());
        let (entry, _) = RawBitmapEntry::read_from_prefix(rest).map_err(|_| broken())?;
        count += 1;
        if entry.extra_data_size.get() != 0 {
            return Err(CheckError::Bitmaps(format!(
                "bitmap {count} has extra data"
            )));
        }
        let len = size_of::<RawBitmapEntry>() + usize::from(entry.name_size.get());
        rest = rest.get(len.next_multiple_of(8)..).ok_or_else(broken)?;
        check_entry(survey, header, &entry)
            .map_err(|what| CheckError::Bitmaps(format!("{what} of bitmap {count} is wrong")))?;
        count_table(survey, file, &entry).await?;
    }
    if in_file != size || count != extension.count {
        return Err(CheckError::Bitmaps(format!(
            "the directory has {count} entries, not {}",
            extension.count
        )));
    }
    Ok(())
}

fn check_entry(
    survey: &Survey,
    header: &Header,
    entry: &RawBitmapEntry,
) -> Result<(), &'static str> {
    let geometry = survey.geometry;
    let table = entry.table_offset.get();
    let clusters = u64::from(entry.table_size.get());
    let bytes = clusters << geometry.cluster_bits;
    if table == 0 || geometry.in_cluster(table) != 0 {
        return Err("the table's place");
    }
    if clusters == 0 || clusters > MAX_TABLE || bytes > MAX_BYTES {
        return Err("the size");
    }
    if !(9..=31).contains(&entry.granularity_bits) {
        return Err("the granularity");
    }
    if entry.kind != DIRTY_TRACKING {
        return Err("the type");
    }
    if entry.flags.get() & FLAGS_RESERVED != 0 {
        return Err("a flag");
    }
    if entry.name_size.get() > MAX_NAME {
        return Err("the name's length");
    }
    let size = header.raw.size.get() & !511;
    let in_use = entry.flags.get() & FLAG_IN_USE != 0;
    if !in_use && u128::from(size) > u128::from(bytes * 8) << entry.granularity_bits {
        return Err("the size");
    }
    Ok(())
}

async fn count_table(
    survey: &mut Survey,
    file: &ImageFile,
    entry: &RawBitmapEntry,
) -> Result<(), CheckError> {
    let geometry = survey.geometry;
    let (offset, size) = (entry.table_offset.get(), u64::from(entry.table_size.get()));
    survey.refer(offset, size * 8, 1, "bitmap table");
    let table = file
        .read_table(offset, size)
        .await
        .map_err(|errno| CheckError::read("a bitmap table", offset, errno))?;
    for entry in table {
        let data = entry & OFFSET_MASK;
        let wrong = entry & TABLE_RESERVED != 0
            || (data != 0 && entry & ALL_ONES != 0)
            || geometry.in_cluster(data) != 0;
        if wrong {
            return Err(CheckError::Bitmaps(format!(
                "entry {entry:#x} of the table at {offset:#x} is wrong"
            )));
        }
        if data != 0 {
            survey.refer(data, geometry.cluster_size(), 1, "bitmap data");
        }
    }
    Ok(())
}
