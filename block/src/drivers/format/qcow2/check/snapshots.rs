//! The snapshot table as the check needs it: where L1 tables are, and which entries lack what version 3 demands of them.

use zerocopy::FromBytes;

use super::file::ImageFile;
use super::report::CheckError;
use crate::drivers::format::qcow2::header::Header;
use crate::drivers::format::qcow2::layout::{
    MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOTS, MAX_SNAPSHOTS_BYTES, RawSnapshot,
};

/// Bytes of extra data that every entry of a version 3 image has: the size of the machine's state and that of the disk.
const V3_EXTRA: u32 = 16;
/// Bytes read at a time: more than the longest entry has in front of its strings.
const WINDOW: u64 = 64 << 10;

/// An entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    /// Where the entry starts and how long it is, in bytes of the file.
    offset: u64,
    len: u64,
    extra_len: u32,
}

/// The table.
#[derive(Clone, Debug, Default)]
pub(super) struct SnapshotTable {
    pub(super) list: Vec<Entry>,
    /// Bytes that the table takes up.
    pub(super) bytes: u64,
    /// Entries that lack extra data, those past the end of the file included.
    pub(super) incomplete: u64,
    /// Entries with more extra data than is allowed.
    pub(super) too_long: u64,
    /// Entries that had to be left out because there are too many.
    pub(super) overhanging: u64,
}

impl SnapshotTable {
    /// Reads the table. With `repairs`, what is too much is left out instead of refused.
    pub(super) async fn read(
        file: &ImageFile,
        header: &Header,
        repairs: bool,
    ) -> Result<Self, CheckError> {
        let start = header.raw.snapshots_offset.get();
        let stored = header.raw.nb_snapshots.get();
        if stored > MAX_SNAPSHOTS && !repairs {
            return Err(CheckError::Snapshots("Snapshot table too large"));
        }
        let count = stored.min(MAX_SNAPSHOTS);
        let table = Self {
            overhanging: u64::from(stored - count),
            ..Self::default()
        };
        if count == 0 {
            return Ok(table);
        }
        let most = u64::from(count) * size_of::<RawSnapshot>() as u64;
        let end = start
            .checked_add(most)
            .and_then(|end| i64::try_from(end).ok());
        if end.is_none() || header.geometry.in_cluster(start) != 0 {
            return Err(CheckError::Snapshots("Snapshot table offset invalid"));
        }
        table
            .read_entries(file, start, count, header, repairs)
            .await
    }

    async fn read_entries(
        mut self,
        file: &ImageFile,
        start: u64,
        count: u32,
        header: &Header,
        repairs: bool,
    ) -> Result<Self, CheckError> {
        const FIXED: u64 = size_of::<RawSnapshot>() as u64;
        let needs_extra = header.geometry.version >= 3;
        let mut end = start;
        let mut kept = 0u64;
        let mut window = Window::default();
        for number in 0..count {
            let offset = end.next_multiple_of(8);
            if offset >= file.size() {
                // All that follows is zero.
                let rest = u64::from(count - number);
                self.incomplete += if needs_extra { rest } else { 0 };
                end = offset + rest * FIXED;
                break;
            }
            let raw = window.entry(file, offset).await?;
            let extra_len = raw.extra_data_size.get();
            if extra_len > MAX_SNAPSHOT_EXTRA {
                if !repairs {
                    return Err(CheckError::Snapshots(
                        "Too much extra metadata in snapshot table entry",
                    ));
                }
                self.too_long += 1;
            } else if extra_len < V3_EXTRA && needs_extra {
                self.incomplete += 1;
            }
            let strings = u64::from(raw.id_size.get()) + u64::from(raw.name_size.get());
            end = offset + FIXED + u64::from(extra_len) + strings;
            kept = kept.next_multiple_of(8) + FIXED + strings;
            kept += u64::from(extra_len.min(MAX_SNAPSHOT_EXTRA));
            if kept > MAX_SNAPSHOTS_BYTES || end - start > i32::MAX as u64 {
                if !repairs {
                    return Err(CheckError::Snapshots("Snapshot table is too big"));
                }
                self.overhanging += u64::from(count - number);
                end = offset;
                break;
            }
            self.list.push(Entry {
                l1_offset: raw.l1_table_offset.get(),
                l1_entries: raw.l1_size.get(),
                offset,
                len: end - offset,
                extra_len,
            });
        }
        self.bytes = end - start;
        Ok(self)
    }

    /// Whether the table has to be written anew.
    pub(super) fn is_damaged(&self) -> bool {
        self.incomplete > 0 || self.too_long > 0
    }

    /// The table as it ought to be: with all the extra data that version 3 demands, and not too much.
    pub(super) async fn mended(
        &self,
        file: &ImageFile,
        header: &Header,
    ) -> Result<Vec<u8>, CheckError> {
        let mut table = Vec::new();
        for entry in &self.list {
            table.resize(table.len().next_multiple_of(8), 0);
            // Of extra data that claims to be gigabytes, no more than is kept.
            let kept = entry.extra_len.min(MAX_SNAPSHOT_EXTRA);
            let fixed = size_of::<RawSnapshot>() as u64;
            let strings = entry.offset + fixed + u64::from(entry.extra_len);
            let parts = [
                (entry.offset, fixed + u64::from(kept)),
                (strings, entry.offset + entry.len - strings),
            ];
            let mut bytes = Vec::new();
            for (offset, len) in parts {
                let part = file
                    .read(offset, len)
                    .await
                    .map_err(|errno| CheckError::read("a snapshot", offset, errno))?;
                bytes.extend(part);
            }
            append_mended(&mut table, &bytes, kept, header.raw.size.get());
        }
        Ok(table)
    }

    /// How many entries there are once it is mended: those past the file's end never were snapshots.
    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.list.len()).unwrap_or(MAX_SNAPSHOTS)
    }
}

/// Appends an entry with as much extra data as it ought to have.
fn append_mended(table: &mut Vec<u8>, bytes: &[u8], extra_len: u32, disk_size: u64) {
    let Ok((mut raw, rest)) = RawSnapshot::read_from_prefix(bytes) else {
        return;
    };
    let (extra, strings) = rest.split_at(rest.len().min(extra_len as usize));
    let mut known = [0; V3_EXTRA as usize];
    known[..8].copy_from_slice(&u64::from(raw.vm_state_size.get()).to_be_bytes());
    known[8..].copy_from_slice(&disk_size.to_be_bytes());
    for (known, stored) in known.chunks_exact_mut(8).zip(extra.chunks_exact(8)) {
        known.copy_from_slice(stored);
    }
    let more = extra.get(V3_EXTRA as usize..).unwrap_or_default();
    let more = &more[..more.len().min((MAX_SNAPSHOT_EXTRA - V3_EXTRA) as usize)];
    raw.extra_data_size = u32::try_from(known.len() + more.len())
        .expect("limited to the longest allowed")
        .into();
    table.extend_from_slice(zerocopy::IntoBytes::as_bytes(&raw));
    table.extend_from_slice(&known);
    table.extend_from_slice(more);
    table.extend_from_slice(strings);
}

/// A part of the table in memory.
#[derive(Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    async fn entry(&mut self, file: &ImageFile, offset: u64) -> Result<RawSnapshot, CheckError> {
        if let Some(raw) = self.parse(offset) {
            return Ok(raw);
        }
        self.bytes = file
            .read(offset, WINDOW)
            .await
            .map_err(|errno| CheckError::read("the snapshot table", offset, errno))?;
        self.start = offset;
        self.parse(offset)
            .ok_or(CheckError::Snapshots("Snapshot table is too big"))
    }

    fn parse(&self, offset: u64) -> Option<RawSnapshot> {
        let at = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        let (raw, _) = RawSnapshot::read_from_prefix(self.bytes.get(at..)?).ok()?;
        Some(raw)
    }
}
