//! The snapshot table: read without believing it, and written anew whenever it changes.
//!
//! An entry keeps what it holds beyond our knowledge, its extra data of any length included. Only what the format demands and an old
//! entry lacks (the sizes of the machine's state and of the disk) is added when the table is written. The section of the format is
//! "Snapshots".

use stord_aio::Errno;
use stord_qmp::Error;
use stord_qmp::schema::node_info::SnapshotInfo;
use zerocopy::{FromBytes, IntoBytes};

use crate::driver::{FILE, NewSnapshot};
use crate::drivers::format::qcow2::header::{Header, read_bytes};
use crate::drivers::format::qcow2::layout::{
    MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOTS, MAX_SNAPSHOTS_BYTES, RawSnapshot,
};
use crate::graph::Children;

const SECOND: u64 = 1_000_000_000;
/// Bytes of extra data that tell of the machine's state, the disk's size and the instruction count.
const FULL_EXTRA: usize = 24;
/// Bytes of extra data that every entry must have.
const LEAST_EXTRA: usize = 16;
/// The instruction count where none was kept.
const NO_COUNT: i64 = -1;

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Snapshot {
    pub(in super::super) l1_offset: u64,
    /// Entries of the L1 table.
    pub(in super::super) l1_size: u32,
    id: Vec<u8>,
    name: Vec<u8>,
    date_sec: u32,
    date_nsec: u32,
    vm_clock_nsec: u64,
    /// The size of the machine's state in the fixed part of the entry; the extra data says more.
    vm_state_size: u32,
    extra: Vec<u8>,
}

impl Snapshot {
    /// A snapshot of a disk of `disk_size` bytes, without a machine's state.
    pub(super) fn new(
        new: &NewSnapshot,
        id: u64,
        l1_offset: u64,
        l1_size: u32,
        disk_size: u64,
    ) -> Self {
        Self {
            l1_offset,
            l1_size,
            id: id.to_string().into_bytes(),
            name: new.name.clone().into_bytes(),
            date_sec: new.date_sec,
            date_nsec: new.date_nsec,
            vm_clock_nsec: new.vm_clock_nsec,
            vm_state_size: 0,
            extra: full_extra(0, disk_size),
        }
    }

    fn word(&self, at: usize) -> Option<i64> {
        let bytes = self.extra.get(at..at + 8)?.try_into().ok()?;
        Some(i64::from_be_bytes(bytes))
    }

    /// The disk's length in bytes; `None` where the entry does not say.
    pub(super) fn disk_size(&self) -> Option<u64> {
        self.word(8)
            .map(|size| u64::from_be_bytes(size.to_be_bytes()))
    }

    fn state_size(&self) -> i64 {
        self.word(0)
            .unwrap_or_else(|| i64::from(self.vm_state_size))
    }

    pub(super) fn info(&self) -> SnapshotInfo {
        SnapshotInfo {
            id: String::from_utf8_lossy(&self.id).into_owned(),
            name: String::from_utf8_lossy(&self.name).into_owned(),
            vm_state_size: self.state_size(),
            date_sec: i64::from(self.date_sec),
            date_nsec: i64::from(self.date_nsec),
            vm_clock_sec: i64::try_from(self.vm_clock_nsec / SECOND).unwrap_or(0),
            vm_clock_nsec: i64::try_from(self.vm_clock_nsec % SECOND).unwrap_or(0),
            icount: self.word(16).filter(|&icount| icount != NO_COUNT),
        }
    }

    /// The number that the id begins with; 0 where it begins with none.
    fn number(&self) -> u64 {
        let digits = self.id.iter().take_while(|byte| byte.is_ascii_digit());
        digits.fold(0u64, |number, digit| {
            number
                .saturating_mul(10)
                .saturating_add(u64::from(digit - b'0'))
        })
    }

    fn encode(&self, disk_size: u64, table: &mut Vec<u8>) -> Result<(), Errno> {
        let state = u64::try_from(self.state_size()).unwrap_or(0);
        let extra = if self.extra.len() < LEAST_EXTRA {
            &full_extra(state, disk_size)
        } else {
            &self.extra
        };
        let short = |len: usize| u16::try_from(len).map_err(|_| Errno::EINVAL);
        let raw = RawSnapshot {
            l1_table_offset: self.l1_offset.into(),
            l1_size: self.l1_size.into(),
            id_size: short(self.id.len())?.into(),
            name_size: short(self.name.len())?.into(),
            date_sec: self.date_sec.into(),
            date_nsec: self.date_nsec.into(),
            vm_clock_nsec: self.vm_clock_nsec.into(),
            vm_state_size: self.vm_state_size.into(),
            extra_data_size: u32::try_from(extra.len())
                .map_err(|_| Errno::EINVAL)?
                .into(),
        };
        table.resize(table.len().next_multiple_of(8), 0);
        for part in [raw.as_bytes(), extra, &self.id, &self.name] {
            table.extend_from_slice(part);
        }
        Ok(())
    }
}

fn full_extra(state_size: u64, disk_size: u64) -> Vec<u8> {
    let mut extra = Vec::with_capacity(FULL_EXTRA);
    extra.extend(state_size.to_be_bytes());
    extra.extend(disk_size.to_be_bytes());
    extra.extend(NO_COUNT.to_be_bytes());
    extra
}

/// Snapshots, and how many bytes their table takes up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Snapshots {
    pub(in super::super) list: Vec<Snapshot>,
    pub(in super::super) table_bytes: u64,
}

impl Snapshots {
    /// Reads the snapshot table.
    pub(in super::super) async fn read(
        children: &Children,
        header: &Header,
    ) -> Result<Self, Error> {
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
    pub(in super::super) fn info(&self) -> Option<Vec<SnapshotInfo>> {
        (!self.list.is_empty()).then(|| self.list.iter().map(Snapshot::info).collect())
    }

    /// The id for a new snapshot: one more than the highest.
    pub(super) fn next_id(&self) -> u64 {
        let highest = self.list.iter().map(Snapshot::number).max();
        highest.unwrap_or(0).saturating_add(1)
    }

    /// These snapshots as a new table, and the table's bytes. An entry that does not tell the size of its disk gets `disk_size`.
    ///
    /// # Errors
    /// `EFBIG` for more than the format allows.
    pub(super) fn table(list: Vec<Snapshot>, disk_size: u64) -> Result<(Self, Vec<u8>), Errno> {
        let mut table = Vec::new();
        for snapshot in &list {
            snapshot.encode(disk_size, &mut table)?;
        }
        let too_many = u32::try_from(list.len()).is_ok_and(|count| count > MAX_SNAPSHOTS);
        if too_many || table.len() as u64 > MAX_SNAPSHOTS_BYTES {
            return Err(Errno::EFBIG);
        }
        let snapshots = Self {
            list,
            table_bytes: table.len() as u64,
        };
        Ok((snapshots, table))
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
            id: id.to_vec(),
            name: name.to_vec(),
            date_sec: raw.date_sec.get(),
            date_nsec: raw.date_nsec.get(),
            vm_clock_nsec: raw.vm_clock_nsec.get(),
            vm_state_size: raw.vm_state_size.get(),
            extra: extra.to_vec(),
        };
        Ok(Some((snapshot, len as u64)))
    }
}
