//! Space in the file: fallocate(2), and where its data and holes are.
//!
//! Served are punching holes, zeroing a range, and allocating past the end; the rest is `EOPNOTSUPP`, on which programs fall back to
//! writing.

use stord_aio::Errno;
use stord_block::ZeroFlags;

use super::abi::LseekOut;
use super::disk_file::DiskFile;
use super::request::Reply;

// linux/falloc.h
const KEEP_SIZE: u32 = 0x01;
const PUNCH_HOLE: u32 = 0x02;
const ZERO_RANGE: u32 = 0x10;

// linux/fs.h
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

/// The largest unit in which a format allocates, in bytes.
const LARGEST_CLUSTER: u64 = 2 << 20;
/// Zeroing goes in steps of at most this many bytes, so that others get their turn.
const STEP: u64 = 1 << 30;
/// A search for data or a hole asks for the status of so many bytes at a time.
const SEARCH_STEP: u64 = 1 << 30;

impl DiskFile {
    pub(super) async fn fallocate(
        &self,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> Result<Reply, Errno> {
        self.check_writable()?;
        let end = offset.checked_add(length).ok_or(Errno::EFBIG)?;
        if i64::try_from(end).is_err() {
            return Err(Errno::EFBIG);
        }
        let change = self.begin_change();
        let size = self.backend.size();
        const PUNCH: u32 = PUNCH_HOLE | KEEP_SIZE;
        const ZERO_INSIDE: u32 = ZERO_RANGE | KEEP_SIZE;
        match mode {
            // Allocated space cannot be told from other space, so the middle of the file is left to the caller.
            0 if offset >= size => {
                self.grow(end).await?;
                self.zero(size, end, ZeroFlags::empty()).await?;
            }
            // Past the end there is nothing, and so nothing to do.
            PUNCH | ZERO_INSIDE if offset >= size => {}
            PUNCH => self.punch(offset, end.min(size)).await?,
            ZERO_INSIDE => {
                self.zero(offset, end.min(size), ZeroFlags::empty()).await?;
            }
            ZERO_RANGE => {
                self.grow(end).await?;
                self.zero(offset, end, ZeroFlags::empty()).await?;
            }
            _ => return Err(Errno::EOPNOTSUPP),
        }
        self.settle(change).await?;
        Ok(Reply::Done)
    }

    /// Frees what can be freed of the range, and makes all of it read as zeroes.
    ///
    /// Data is written only for the edges of clusters: where the storage can free nothing, the caller shall know.
    async fn punch(&self, start: u64, end: u64) -> Result<(), Errno> {
        let freeing = ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK;
        match self.zero(start, end, freeing).await {
            Err(Errno::ENOTSUP) => {}
            done => return done,
        }
        let body_start = start.next_multiple_of(LARGEST_CLUSTER).min(end);
        let body_end = (end - end % LARGEST_CLUSTER).max(body_start);
        if body_start < body_end {
            self.zero(body_start, body_end, freeing).await?;
        }
        self.zero(start, body_start, ZeroFlags::MAY_UNMAP).await?;
        self.zero(body_end, end, ZeroFlags::MAY_UNMAP).await
    }

    async fn zero(&self, start: u64, end: u64, flags: ZeroFlags) -> Result<(), Errno> {
        self.note_write();
        let flags = self.durability(flags);
        let mut at = start;
        while at < end {
            let length = (end - at).min(STEP);
            self.backend.write_zeroes(at, length, flags).await?;
            at += length;
        }
        Ok(())
    }

    /// Finds the next data or hole. The end of the file counts as a hole, but nothing begins there.
    pub(super) async fn lseek(&self, offset: u64, whence: u32) -> Result<Reply, Errno> {
        let want_hole = match whence {
            SEEK_HOLE => true,
            SEEK_DATA => false,
            _ => return Err(Errno::EINVAL),
        };
        let size = self.backend.size();
        if offset >= size {
            return Err(Errno::ENXIO);
        }
        let mut at = offset;
        while at < size {
            let status = self
                .backend
                .block_status(at, (size - at).min(SEARCH_STEP))
                .await?;
            if status.zero == want_hole {
                return Ok(Reply::of(&LseekOut { offset: at }));
            }
            // A status is never empty; should one be, this still ends.
            at = at.saturating_add(status.len.max(1));
        }
        if want_hole {
            Ok(Reply::of(&LseekOut { offset: size }))
        } else {
            Err(Errno::ENXIO)
        }
    }
}
