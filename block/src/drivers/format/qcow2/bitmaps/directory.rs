//! The bitmap directory: which bitmaps are stored in the image, and where. Read without believing it; sizes are checked before memory
//! is taken for them. The section of the format is "Bitmaps".

use stord_qmp::Error;
use stord_qmp::schema::node_info::{Qcow2BitmapInfo, Qcow2BitmapInfoFlags};
use zerocopy::{FromBytes, IntoBytes};

use crate::drivers::format::qcow2::header::BitmapsExtension;
use crate::drivers::format::qcow2::layout::{Geometry, RawBitmapEntry};

/// The bitmap was not stored properly.
pub(super) const IN_USE: u32 = 1;
/// It is enabled when the image opens.
pub(super) const AUTO: u32 = 1 << 1;
/// Whoever does not know the extra data may use the bitmap all the same.
const EXTRA_COMPATIBLE: u32 = 1 << 2;
/// The only type of bitmap.
const DIRTY_TRACKING: u8 = 1;
/// log2 of the least and the most bytes that a bit stands for.
pub(super) const GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 9..=31;
/// The most entries of a bitmap table.
pub(super) const MAX_TABLE: u64 = 0x800_0000;
/// The most bytes of a bitmap.
pub(super) const MAX_BYTES: u64 = 0x2000_0000;
/// The longest name in bytes.
pub(super) const MAX_NAME: usize = 1023;

/// A bitmap that is stored in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    name: Vec<u8>,
    pub(super) granularity_bits: u32,
    pub(super) table_offset: u64,
    /// Entries of the table.
    pub(super) table_size: u32,
    pub(super) flags: u32,
    extra: Vec<u8>,
}

impl Stored {
    pub(super) fn new(
        name: &str,
        granularity_bits: u32,
        flags: u32,
        (table_offset, table_size): (u64, u32),
    ) -> Self {
        Self {
            name: name.as_bytes().to_vec(),
            granularity_bits,
            table_offset,
            table_size,
            flags,
            extra: Vec::new(),
        }
    }

    pub(super) fn name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    pub(super) fn is_in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    /// Whether it may be used by us, who know no extra data.
    pub(super) fn is_understood(&self) -> bool {
        self.extra.is_empty() || self.flags & EXTRA_COMPATIBLE != 0
    }

    /// Takes over what a newer version of the same bitmap does not bring: its extra data.
    pub(super) fn keep_extra(&mut self, old: &Self) {
        self.extra.clone_from(&old.extra);
        self.flags |= old.flags & EXTRA_COMPATIBLE;
    }

    fn info(&self) -> Qcow2BitmapInfo {
        let flags = [
            (IN_USE, Qcow2BitmapInfoFlags::InUse),
            (AUTO, Qcow2BitmapInfoFlags::Auto),
        ];
        Qcow2BitmapInfo {
            name: self.name(),
            granularity: 1 << self.granularity_bits,
            flags: flags
                .into_iter()
                .filter(|(flag, _)| self.flags & flag != 0)
                .map(|(_, shown)| shown)
                .collect(),
        }
    }

    fn satisfies(&self, raw: &RawBitmapEntry, geometry: &Geometry, disk_size: u64) -> bool {
        let clusters = u64::from(self.table_size);
        let bytes = clusters << geometry.cluster_bits;
        // The width is checked below; here it may be anything.
        let covers = u128::from(bytes * 8)
            .checked_shl(self.granularity_bits)
            .unwrap_or(0);
        let known = if self.extra.is_empty() {
            IN_USE | AUTO
        } else {
            IN_USE | AUTO | EXTRA_COMPATIBLE
        };
        self.table_offset != 0
            && geometry.in_cluster(self.table_offset) == 0
            && (1..=MAX_TABLE).contains(&clusters)
            && bytes <= MAX_BYTES
            && GRANULARITY_BITS.contains(&self.granularity_bits)
            && raw.kind == DIRTY_TRACKING
            && self.flags & !known == 0
            && self.name.len() <= MAX_NAME
            && (self.is_in_use() || u128::from(disk_size) <= covers)
    }

    fn encode(&self, directory: &mut Vec<u8>) {
        // Lengths were checked when they were read or made.
        let raw = RawBitmapEntry {
            table_offset: self.table_offset.into(),
            table_size: self.table_size.into(),
            flags: self.flags.into(),
            kind: DIRTY_TRACKING,
            granularity_bits: u8::try_from(self.granularity_bits).unwrap_or(u8::MAX),
            name_size: u16::try_from(self.name.len()).unwrap_or(u16::MAX).into(),
            extra_data_size: u32::try_from(self.extra.len()).unwrap_or(u32::MAX).into(),
        };
        for part in [raw.as_bytes(), &self.extra, &self.name] {
            directory.extend_from_slice(part);
        }
        directory.resize(directory.len().next_multiple_of(8), 0);
    }
}

/// The directory, and where it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Directory {
    pub(super) offset: u64,
    pub(super) list: Vec<Stored>,
}

impl Directory {
    /// Takes a directory of `bytes` as `extension` describes it.
    pub(super) fn decode(
        bytes: &[u8],
        extension: &BitmapsExtension,
        geometry: &Geometry,
        disk_size: u64,
    ) -> Result<Self, Error> {
        if extension.directory_size == 0 {
            return Err(Error::generic("Requested bitmap_directory size is zero"));
        }
        let broken = || Error::generic("Broken bitmap directory");
        let mut rest = bytes;
        let mut list = Vec::new();
        while !rest.is_empty() {
            if list.len() as u64 >= u64::from(extension.count) {
                return Err(Error::generic(
                    "More bitmaps found than specified in header extension",
                ));
            }
            let (raw, tail) = RawBitmapEntry::read_from_prefix(rest).map_err(|_| broken())?;
            let extra_len = raw.extra_data_size.get() as usize;
            let name_len = usize::from(raw.name_size.get());
            let (extra, tail) = tail.split_at_checked(extra_len).ok_or_else(broken)?;
            let name = tail.get(..name_len).ok_or_else(broken)?;
            let len = (size_of::<RawBitmapEntry>() + extra_len + name_len).next_multiple_of(8);
            rest = rest.get(len..).ok_or_else(broken)?;
            let stored = Stored {
                name: name.to_vec(),
                granularity_bits: u32::from(raw.granularity_bits),
                table_offset: raw.table_offset.get(),
                table_size: raw.table_size.get(),
                flags: raw.flags.get(),
                extra: extra.to_vec(),
            };
            if !stored.satisfies(&raw, geometry, disk_size) {
                return Err(Error::generic(format!(
                    "Bitmap '{}' doesn't satisfy the constraints",
                    stored.name()
                )));
            }
            list.push(stored);
        }
        if list.len() as u64 != u64::from(extension.count) {
            return Err(Error::generic(
                "Less bitmaps found than specified in header extension",
            ));
        }
        Ok(Self {
            offset: extension.directory_offset,
            list,
        })
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for stored in &self.list {
            stored.encode(&mut bytes);
        }
        bytes
    }

    pub(super) fn find(&self, name: &str) -> Option<&Stored> {
        self.list.iter().find(|stored| stored.name() == name)
    }

    /// What is told of them; `None` without bitmaps.
    pub(in super::super) fn info(&self) -> Option<Vec<Qcow2BitmapInfo>> {
        (!self.list.is_empty()).then(|| self.list.iter().map(Stored::info).collect())
    }
}

/// Bytes of the directory entry of a bitmap without extra data.
pub(super) fn entry_bytes(name: &str) -> u64 {
    ((size_of::<RawBitmapEntry>() + name.len()) as u64).next_multiple_of(8)
}
