//! Internal snapshots: their table is read, so that writes keep away from what belongs to them, and to tell of them. Their clusters are
//! protected by refcounts above one, which make every write to them go elsewhere.

use stord_qmp::Error;
use stord_qmp::schema::node_info::SnapshotInfo;
use zerocopy::FromBytes;

use super::header::{Header, read_bytes};
use super::layout::{MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOTS_BYTES, RawSnapshot};
use crate::driver::FILE;
use crate::graph::Children;

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    pub(super) info: SnapshotInfo,
}

/// Snapshots, and how many bytes their table takes up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Snapshots {
    pub(super) list: Vec<Snapshot>,
    pub(super) table_bytes: u64,
}

impl Snapshots {
    /// Reads the snapshot table.
    pub(super) async fn read(children: &Children, header: &Header) -> Result<Self, Error> {
        let start = header.raw.snapshots_offset.get();
        let file_size = children.size(FILE);
        let mut table = Table {
            children,
            start: 0,
            bytes: Vec::new(),
        };
        let mut list = Vec::new();
        let mut offset = start;
        for _ in 0..header.raw.nb_snapshots.get() {
            if offset >= file_size {
                // Past the end all fields are zero: such an entry protects nothing.
                offset += size_of::<RawSnapshot>() as u64;
                continue;
            }
            let (snapshot, len) = table.entry(offset).await?;
            list.push(snapshot);
            offset += len;
            if offset - start > MAX_SNAPSHOTS_BYTES {
                return Err(Error::generic(
                    "Could not read snapshots: Snapshot table is too big",
                ));
            }
        }
        Ok(Self {
            list,
            table_bytes: offset - start,
        })
    }

    /// What is told of them; `None` without snapshots.
    pub(super) fn info(&self) -> Option<Vec<SnapshotInfo>> {
        (!self.list.is_empty()).then(|| {
            self.list
                .iter()
                .map(|snapshot| snapshot.info.clone())
                .collect()
        })
    }
}

/// A window on the snapshot table.
struct Table<'a> {
    children: &'a Children,
    start: u64,
    bytes: Vec<u8>,
}

impl Table<'_> {
    /// More than the longest entry: its strings have at most 64 KiB each.
    const STEP: usize = 256 << 10;

    /// The entry at `offset`, and its length in bytes.
    async fn entry(&mut self, offset: u64) -> Result<(Snapshot, u64), Error> {
        if let Some(found) = self.parse(offset)? {
            return Ok(found);
        }
        self.bytes = read_bytes(
            self.children,
            offset,
            Self::STEP,
            "Could not read snapshots",
        )
        .await?;
        self.start = offset;
        self.parse(offset)?
            .ok_or_else(|| Error::generic("Could not read snapshots"))
    }

    /// Takes the entry out of the window; `None` if it is not wholly there.
    fn parse(&self, offset: u64) -> Result<Option<(Snapshot, u64)>, Error> {
        let inside = offset
            .checked_sub(self.start)
            .and_then(|at| usize::try_from(at).ok());
        let Some(rest) = inside.and_then(|at| self.bytes.get(at..)) else {
            return Ok(None);
        };
        let Ok((raw, rest)) = RawSnapshot::read_from_prefix(rest) else {
            return Ok(None);
        };
        let extra_len = raw.extra_data_size.get();
        if extra_len > MAX_SNAPSHOT_EXTRA {
            return Err(Error::generic(
                "Could not read snapshots: Too much extra metadata in snapshot table entry",
            ));
        }
        let (id_len, name_len) = (
            usize::from(raw.id_size.get()),
            usize::from(raw.name_size.get()),
        );
        let Some((extra, rest)) = rest.split_at_checked(extra_len as usize) else {
            return Ok(None);
        };
        let Some((id, name)) = rest
            .split_at_checked(id_len)
            .and_then(|(id, rest)| Some((id, rest.get(..name_len)?)))
        else {
            return Ok(None);
        };
        let len = (size_of::<RawSnapshot>() + extra.len() + id_len + name_len).next_multiple_of(8);
        let snapshot = Snapshot {
            l1_offset: raw.l1_table_offset.get(),
            l1_size: raw.l1_size.get(),
            info: info(&raw, extra, id, name),
        };
        Ok(Some((snapshot, len as u64)))
    }
}

fn info(raw: &RawSnapshot, extra: &[u8], id: &[u8], name: &[u8]) -> SnapshotInfo {
    const SECOND: u64 = 1_000_000_000;
    let word = |at: usize| {
        let bytes = extra.get(at..at + 8)?.try_into().ok()?;
        Some(i64::from_be_bytes(bytes))
    };
    let vm_clock = raw.vm_clock_nsec.get();
    SnapshotInfo {
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        vm_state_size: word(0).unwrap_or_else(|| i64::from(raw.vm_state_size.get())),
        date_sec: i64::from(raw.date_sec.get()),
        date_nsec: i64::from(raw.date_nsec.get()),
        vm_clock_sec: i64::try_from(vm_clock / SECOND).unwrap_or(0),
        vm_clock_nsec: i64::try_from(vm_clock % SECOND).unwrap_or(0),
        icount: word(16).filter(|&icount| icount != -1),
    }
}
