//! copy_file_range(2) inside the file system: the bytes go from one backend to the other, past the kernel and the caller, and holes
//! are copied as holes.

use stord_aio::{Errno, IoBuffer, IoVec, join_all};
use stord_block::ZeroFlags;

use super::disk_file::DiskFile;

/// One call copies at most so many bytes, so that the caller can be interrupted in between.
const LONGEST: u64 = 256 << 20;
/// So many bytes are asked about at a time, and made holes at a time.
const STEP: u64 = 64 << 20;
/// Bytes of data that one read and one write move, and how many of these are under way at a time.
const PIECE: u64 = 512 << 10;
const PIECES: u64 = 4;

/// Copies bytes, as many as there are in the source and as the target has room for; gives their number. What is beyond the end of a
/// growable target makes it longer.
///
/// # Errors
/// `EACCES` where the target is read-only, `EIO` where it ends before `to`, and what the storage says.
pub(super) async fn copy(
    source: &DiskFile,
    from: u64,
    target: &DiskFile,
    to: u64,
    length: u64,
) -> Result<u64, Errno> {
    target.check_writable()?;
    let left = source.backend.size().saturating_sub(from);
    let length = length.min(left).min(LONGEST);
    if length == 0 {
        return Ok(0);
    }
    let change = target.begin_change();
    let length = target.make_room(to, length).await?;
    target.note_write();
    let mut done = 0;
    while done < length {
        let rest = (length - done).min(STEP);
        let status = source.backend.block_status(from + done, rest).await?;
        let step = status.len.clamp(1, rest);
        if status.zero {
            let flags = target.durability(ZeroFlags::MAY_UNMAP);
            let zeroed = target.backend.write_zeroes(to + done, step, flags);
            zeroed.await?;
        } else {
            copy_data(source, from + done, target, to + done, step).await?;
        }
        done += step;
    }
    target.settle(change).await?;
    Ok(length)
}

async fn copy_data(
    source: &DiskFile,
    from: u64,
    target: &DiskFile,
    to: u64,
    length: u64,
) -> Result<(), Errno> {
    let mut done = 0;
    while done < length {
        let end = length.min(done + PIECE * PIECES);
        let mut pieces = Vec::new();
        while done < end {
            let piece = (end - done).min(PIECE);
            pieces.push(copy_piece(source, from + done, target, to + done, piece));
            done += piece;
        }
        for copied in join_all(pieces).await {
            copied?;
        }
    }
    Ok(())
}

async fn copy_piece(
    source: &DiskFile,
    from: u64,
    target: &DiskFile,
    to: u64,
    length: u64,
) -> Result<(), Errno> {
    let buffer = IoBuffer::zeroed(usize::try_from(length).expect("a piece is small"));
    let bytes = IoVec::from(buffer);
    source.backend.read(from, bytes.clone()).await?;
    target
        .backend
        .write(to, bytes, target.is_writethrough())
        .await
}
