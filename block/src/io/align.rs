//! Requests at a leaf, made to fit its limits: alignment by bounce buffers and read-modify-write, length by splitting.
//!
//! A write that does not fit the alignment reads the blocks at its edges first. Another write to the same block in between would be
//! lost, so on leaves with an alignment above 1 every write holds its range: aligned ones shared, unaligned ones alone.

use std::sync::Arc;

use stord_aio::{Errno, IoBuffer, IoVec};

use super::join_pieces;
use super::walk::leaf_driver;
use crate::driver::{IoFuture, Protocol};
use crate::graph::Node;

/// Whether the leaf takes the request as it is.
pub(super) fn fits(leaf: &Node, offset: u64, iov: &IoVec) -> bool {
    let limits = leaf.limits();
    let align = u64::from(limits.request_alignment);
    (limits.max_transfer == 0 || iov.len() <= u64::from(limits.max_transfer))
        && (align == 1
            || (is_aligned(offset, align)
                && iov.is_aligned(
                    limits.memory_alignment as usize,
                    limits.request_alignment as usize,
                )))
}

fn is_aligned(value: u64, align: u64) -> bool {
    value & (align - 1) == 0
}

fn align_down(value: u64, align: u64) -> u64 {
    value & !(align - 1)
}

fn align_up(value: u64, align: u64) -> Result<u64, Errno> {
    Ok(align_down(
        value.checked_add(align - 1).ok_or(Errno::EFBIG)?,
        align,
    ))
}

/// The aligned range around a request, and a buffer of its length.
struct Bounce {
    start: u64,
    buffer: IoBuffer,
}

impl Bounce {
    fn around(offset: u64, len: u64, align: u64) -> Result<Self, Errno> {
        let start = align_down(offset, align);
        let end = align_up(offset.checked_add(len).ok_or(Errno::EFBIG)?, align)?;
        let len = usize::try_from(end - start).map_err(|_| Errno::ENOMEM)?;
        Ok(Self {
            start,
            buffer: IoBuffer::zeroed(len),
        })
    }

    fn end(&self) -> u64 {
        self.start + self.buffer.len() as u64
    }

    /// The request's bytes within the buffer.
    fn inner(&self, offset: u64, len: u64) -> IoVec {
        let head = offset - self.start;
        IoVec::from(self.buffer.clone()).slice(head..head + len)
    }
}

/// Reads from a leaf.
pub(super) async fn read(leaf: &Arc<Node>, offset: u64, dst: IoVec) -> Result<(), Errno> {
    let driver = leaf_driver(leaf).ok_or(Errno::EINVAL)?;
    if fits(leaf, offset, &dst) {
        return driver.read(offset, dst).await;
    }
    if let Some(pieces) = split(leaf, offset, &dst) {
        return join_pieces(
            pieces
                .map(|(at, piece)| Box::pin(read_piece(leaf, driver, at, piece)) as IoFuture<'_>)
                .collect(),
        )
        .await;
    }
    read_piece(leaf, driver, offset, dst).await
}

async fn read_piece(
    leaf: &Node,
    driver: &dyn Protocol,
    offset: u64,
    dst: IoVec,
) -> Result<(), Errno> {
    if fits(leaf, offset, &dst) {
        return driver.read(offset, dst).await;
    }
    let bounce = Bounce::around(
        offset,
        dst.len(),
        u64::from(leaf.limits().request_alignment),
    )?;
    driver
        .read(bounce.start, bounce.buffer.clone().into())
        .await?;
    bounce.inner(offset, dst.len()).copy_to(&dst);
    Ok(())
}

/// Cuts a request longer than the leaf's largest transfer at multiples of it; `None` for one that is short enough.
fn split(leaf: &Node, offset: u64, iov: &IoVec) -> Option<impl Iterator<Item = (u64, IoVec)>> {
    let max = u64::from(leaf.limits().max_transfer);
    if max == 0 || iov.len() <= max {
        return None;
    }
    let align = u64::from(leaf.limits().request_alignment);
    // Leaves room for an unaligned piece's bounce buffer, which may be two blocks longer.
    let step = max.saturating_sub(2 * align).max(align);
    let (iov, total) = (iov.clone(), iov.len());
    let mut done = 0;
    Some(std::iter::from_fn(move || {
        if done == total {
            return None;
        }
        let at = offset + done;
        let len = (step - (at & (align - 1))).min(total - done);
        let piece = iov.slice(done..done + len);
        done += len;
        Some((at, piece))
    }))
}

/// Writes to a leaf.
pub(super) async fn write(
    leaf: &Arc<Node>,
    offset: u64,
    src: IoVec,
    durable: bool,
) -> Result<(), Errno> {
    let driver = leaf_driver(leaf).ok_or(Errno::EINVAL)?;
    if let Some(pieces) = split(leaf, offset, &src) {
        return join_pieces(
            pieces
                .map(|(at, piece)| {
                    Box::pin(write_piece(leaf, driver, at, piece, durable)) as IoFuture<'_>
                })
                .collect(),
        )
        .await;
    }
    write_piece(leaf, driver, offset, src, durable).await
}

async fn write_piece(
    leaf: &Node,
    driver: &dyn Protocol,
    offset: u64,
    src: IoVec,
    durable: bool,
) -> Result<(), Errno> {
    let align = u64::from(leaf.limits().request_alignment);
    if align == 1 {
        return driver.write(offset, src, durable).await;
    }
    let len = src.len();
    if is_aligned(offset | len, align) {
        let _range = leaf.serialising.lock_shared(offset..offset + len).await;
        if fits(leaf, offset, &src) {
            return driver.write(offset, src, durable).await;
        }
        // Only the memory is badly placed.
        let bounce = Bounce::around(offset, len, align)?;
        src.copy_to(&bounce.inner(offset, len));
        return driver.write(offset, bounce.buffer.into(), durable).await;
    }
    let bounce = Bounce::around(offset, len, align)?;
    let _range = leaf.serialising.lock(bounce.start..bounce.end()).await;
    read_edges(driver, &bounce, offset, len, align).await?;
    src.copy_to(&bounce.inner(offset, len));
    driver
        .write(bounce.start, bounce.buffer.into(), durable)
        .await
}

/// Fills the blocks of the bounce buffer that the request covers only in part.
async fn read_edges(
    driver: &dyn Protocol,
    bounce: &Bounce,
    offset: u64,
    len: u64,
    align: u64,
) -> Result<(), Errno> {
    let whole = IoVec::from(bounce.buffer.clone());
    let last = bounce.end() - align;
    let mut edges: Vec<IoFuture<'_>> = Vec::new();
    if !is_aligned(offset, align) {
        edges.push(driver.read(bounce.start, whole.slice(0..align)));
    }
    if !is_aligned(offset + len, align) && (edges.is_empty() || last != bounce.start) {
        edges.push(driver.read(
            last,
            whole.slice(last - bounce.start..bounce.end() - bounce.start),
        ));
    }
    join_pieces(edges).await
}
