//! A chain of descriptors as a request of a block device (5.2.6), checked against the disk.
//!
//! How the bytes are spread over descriptors says nothing (2.7.4.1): the header may be in several, and the status is the last byte that
//! the device may write, wherever that is. What is answered to requests that make no sense is what the reference answers.

use stord_aio::{IoBuffer, IoVec};

use super::super::ring::Broken;
use super::super::ring::chain::Chain;
use super::config::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, SECTOR};

/// Bytes of a header: u32 type, u32 reserved, u64 sector.
const HEADER: usize = 16;
/// Bytes of a segment of a discard: u64 sector, u32 number of sectors, u32 flags.
const SEGMENT: usize = 16;
const FLAG_UNMAP: u32 = 1;
/// What a driver gets for `GET_ID`, in bytes.
pub(crate) const ID_LEN: usize = 20;
/// The longest request, in bytes: that of the reference's block layer.
const LONGEST: u64 = (i32::MAX as u64) & !(SECTOR - 1);

// 5.2.6
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Of drivers before version 1; means nothing any more.
const BARRIER: u32 = 1 << 31;

/// The last byte of a request, for the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    /// `VIRTIO_BLK_S_OK`.
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`.
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported = 2,
}

/// What a driver wants, in bytes.
#[derive(Debug)]
pub(crate) enum Command {
    Read {
        offset: u64,
        data: IoVec,
    },
    Write {
        offset: u64,
        data: IoVec,
    },
    Flush,
    GetId(IoVec),
    Discard {
        offset: u64,
        len: u64,
    },
    WriteZeroes {
        offset: u64,
        len: u64,
        unmap: bool,
    },
    /// It is answered without being done.
    Refused(Status),
}

/// A request.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) command: Command,
    /// One byte.
    pub(crate) status: IoBuffer,
    /// Bytes that the device may write, the status among them.
    pub(crate) writable: u32,
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) logical_block_size: u32,
    pub(crate) writable: bool,
}

impl Limits {
    /// The offset of a range that is on the disk and begins with a block.
    fn check(&self, sector: u64, len: u64) -> Option<u64> {
        let sectors = self.size / SECTOR;
        let count = len / SECTOR;
        let is_inside = sector <= sectors && count <= sectors - sector;
        if !len.is_multiple_of(SECTOR) || len > LONGEST || !is_inside {
            return None;
        }
        let offset = sector.checked_mul(SECTOR)?;
        offset
            .is_multiple_of(self.logical_block_size.into())
            .then_some(offset)
    }

    /// A request to discard or to write zeroes: one segment of data.
    fn ranged(&self, kind: u32, data: &IoVec) -> Command {
        const TOO_LONG: u64 = SEGMENT as u64 + 1;
        if !self.writable {
            return Command::Refused(Status::IoError);
        }
        match data.len() {
            // Several segments, though `max_discard_seg` is 1.
            TOO_LONG.. => return Command::Refused(Status::Unsupported),
            len if len < SEGMENT as u64 => return Command::Refused(Status::IoError),
            _ => {}
        }
        let mut bytes = [0; SEGMENT];
        data.read_at(0, &mut bytes);
        let (sector, count, flags) = split(bytes);
        let most = if kind == DISCARD {
            MAX_DISCARD_SECTORS
        } else {
            MAX_WRITE_ZEROES_SECTORS
        };
        let len = u64::from(count) * SECTOR;
        let range = self.check(sector, len).filter(|_| count <= most);
        let Some(offset) = range else {
            return Command::Refused(Status::IoError);
        };
        let unmap = flags & FLAG_UNMAP != 0;
        // 5.2.6.2: an unknown flag, or one that the type does not have.
        if flags & !FLAG_UNMAP != 0 || (kind == DISCARD && unmap) {
            return Command::Refused(Status::Unsupported);
        }
        if kind == DISCARD {
            Command::Discard { offset, len }
        } else {
            Command::WriteZeroes { offset, len, unmap }
        }
    }
}

/// The fields of a segment.
fn split(bytes: [u8; SEGMENT]) -> (u64, u32, u32) {
    let number = u128::from_le_bytes(bytes);
    #[expect(clippy::cast_possible_truncation, reason = "fields of a number")]
    (number as u64, (number >> 64) as u32, (number >> 96) as u32)
}

/// The type and the sector of a header.
fn split_header(bytes: [u8; HEADER]) -> (u32, u64) {
    let number = u128::from_le_bytes(bytes);
    #[expect(clippy::cast_possible_truncation, reason = "fields of a number")]
    (number as u32, (number >> 64) as u64)
}

impl Request {
    /// Reads what a chain asks for.
    ///
    /// # Errors
    /// It has no room for what every request has.
    pub(crate) fn parse(chain: &Chain, limits: Limits) -> Result<Self, Broken> {
        let Chain {
            readable, writable, ..
        } = chain;
        let (readable_len, writable_len) = (readable.len(), writable.len());
        if readable_len < HEADER as u64 {
            return Err(Broken::Header);
        }
        let last = writable.buffers().last().ok_or(Broken::Status)?;
        let status = last.slice(last.len() - 1..last.len());
        let mut header = [0; HEADER];
        readable.read_at(0, &mut header);
        let (kind, sector) = split_header(header);
        let out = || readable.slice(HEADER as u64..readable_len);
        let into = || writable.slice(0..writable_len - 1);
        let refused = Command::Refused(Status::IoError);
        let command = match kind & !BARRIER {
            IN => match limits.check(sector, writable_len - 1) {
                Some(offset) => Command::Read {
                    offset,
                    data: into(),
                },
                None => refused,
            },
            OUT if !limits.writable => refused,
            OUT => match limits.check(sector, readable_len - HEADER as u64) {
                Some(offset) => Command::Write {
                    offset,
                    data: out(),
                },
                None => refused,
            },
            FLUSH => Command::Flush,
            GET_ID => Command::GetId(into()),
            kind @ (DISCARD | WRITE_ZEROES) => limits.ranged(kind, &out()),
            _ => Command::Refused(Status::Unsupported),
        };
        Ok(Self {
            command,
            status,
            writable: u32::try_from(writable_len).map_err(|_| Broken::Length)?,
        })
    }
}
