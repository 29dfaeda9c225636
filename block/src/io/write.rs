//! Writes: overwrite in place where the map allows it, otherwise prepare, write, commit.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use stord_aio::{Errno, IoBuffer, IoVec};

use super::walk::{self, Path, Place, leaf_driver};
use super::{align, flush, join_pieces, read, write_zeroes};
use crate::driver::{
    ChildId, Driver, Extent, ExtentKind, IoFuture, Lookup, PieceSource, WritePlan, ZeroFlags,
};
use crate::graph::{DetectZeroes, Node};

/// Notes a change of the node's content, for the next flush.
pub(super) fn note_change(node: &Node) {
    node.written.fetch_add(1, Ordering::AcqRel);
}

/// Notes a write that reached as far as `end`.
pub(super) fn note_write(node: &Node, end: u64) {
    if leaf_driver(node).is_some() {
        node.grow_to(end);
    }
    node.note_write(end);
    note_change(node);
}

/// Notes in the bitmaps of every node on the way that a write has ended, well or badly.
fn note_dirty(leaf: &Node, at: u64, path: &Path, len: u64) {
    leaf.bitmaps().mark(at, len);
    path.nodes()
        .for_each(|(node, at)| node.bitmaps().mark(at, len));
}

/// Writes all of `src`. `durable` makes the write survive a power failure once this returns.
pub(crate) async fn write(
    node: &Arc<Node>,
    offset: u64,
    src: IoVec,
    durable: bool,
) -> Result<(), Errno> {
    if node.is_read_only() {
        return Err(Errno::EPERM);
    }
    if src.is_empty() {
        return Ok(());
    }
    if let Some(flags) = zeroes_instead(node, &src, durable) {
        return Box::pin(write_zeroes(node, offset, src.len(), flags)).await;
    }
    write_as_is(node, offset, src, durable).await
}

/// Writes whole clusters of `src` compressed, where the node's format can do that.
pub(crate) async fn write_compressed(
    node: &Arc<Node>,
    offset: u64,
    src: IoVec,
) -> Result<(), Errno> {
    if node.is_read_only() {
        return Err(Errno::EPERM);
    }
    let Driver::Format(format) = node.driver() else {
        return Err(Errno::ENOTSUP);
    };
    let end = offset.checked_add(src.len()).ok_or(Errno::EINVAL)?;
    if end > node.size() {
        return Err(Errno::EINVAL);
    }
    if src.is_empty() {
        return Ok(());
    }
    let mut path = Path::default();
    path.pin(node, offset);
    let len = src.len();
    let result = format.write_compressed(offset, src).await;
    node.bitmaps().mark(offset, len);
    result?;
    note_write(node, end);
    Ok(())
}

/// Writes without a look at what is written.
pub(super) async fn write_as_is(
    node: &Arc<Node>,
    offset: u64,
    src: IoVec,
    durable: bool,
) -> Result<(), Errno> {
    let mut path = Path::default();
    let len = src.len();
    if let Driver::Format(filter) = node.driver()
        && filter.takes_writes()
    {
        let result = filter.write(offset, src).await;
        node.bitmaps().mark(offset, len);
        result?;
        note_write(node, offset + len);
        return if durable { flush(node).await } else { Ok(()) };
    }
    match walk::to_overwrite(node, offset, len, &mut path)? {
        Place::Leaf(leaf, at) => {
            let result = align::write(&leaf, at, src, durable).await;
            note_dirty(&leaf, at, &path, len);
            result?;
            note_write(&leaf, at + len);
            path.nodes()
                .for_each(|(node, at)| note_write(node, at + len));
            // Mapped by a write whose metadata may still be on its way.
            if durable && !Arc::ptr_eq(&leaf, node) {
                flush(node).await?;
            }
            Ok(())
        }
        _ => {
            let result = allocating(node, offset, src, durable).await;
            node.bitmaps().mark(offset, len);
            result
        }
    }
}

/// Writes at once if the bytes are overwritten in place and the leaf can take them without waiting; `None` where it would wait: then
/// the whole has to be written again.
pub(crate) fn try_write(node: &Arc<Node>, offset: u64, src: &IoVec) -> Option<Result<(), Errno>> {
    if node.is_read_only() {
        return Some(Err(Errno::EPERM));
    }
    if node.options().detect_zeroes != DetectZeroes::Off {
        return None;
    }
    let mut path = Path::default();
    match walk::to_overwrite(node, offset, src.len(), &mut path) {
        Ok(Place::Leaf(leaf, at))
            if leaf.limits().request_alignment == 1 && align::fits(&leaf, at, src) =>
        {
            let result = leaf_driver(&leaf)?.try_write(at, src)?;
            note_dirty(&leaf, at, &path, src.len());
            if result.is_ok() {
                note_write(&leaf, at + src.len());
                path.nodes()
                    .for_each(|(node, at)| note_write(node, at + src.len()));
            }
            Some(result)
        }
        Ok(_) => None,
        Err(errno) => Some(Err(errno)),
    }
}

fn zeroes_instead(node: &Node, src: &IoVec, durable: bool) -> Option<ZeroFlags> {
    let mut flags = match node.options().detect_zeroes {
        DetectZeroes::Off => return None,
        DetectZeroes::On => ZeroFlags::empty(),
        DetectZeroes::Unmap => ZeroFlags::MAY_UNMAP,
    };
    flags.set(ZeroFlags::DURABLE, durable);
    src.is_zero().then_some(flags)
}

/// Writes to a format node piece by piece. The caller holds the pin.
///
/// Pieces are prepared in ascending order, so that two requests that wait for each other's clusters cannot both wait.
fn allocating<'a>(node: &'a Arc<Node>, offset: u64, src: IoVec, durable: bool) -> IoFuture<'a> {
    Box::pin(async move {
        let Driver::Format(format) = node.driver() else {
            return Err(Errno::EINVAL);
        };
        let total = src.len();
        if offset
            .checked_add(total)
            .is_none_or(|end| end > node.size())
        {
            return Err(Errno::EINVAL);
        }
        let mut pieces: Vec<IoFuture<'a>> = Vec::new();
        let mut done = 0;
        while done < total {
            let (at, left) = (offset + done, total - done);
            if let Lookup::Ready(Extent { kind, len }) = format.map_write(at, left)? {
                let ExtentKind::Data { child, offset } = kind else {
                    return Err(Errno::EIO);
                };
                pieces.push(to_child(node, child, offset, src.slice(done..done + len))?);
                done += len;
            } else {
                let plan = format.prepare_write(at, left).await?;
                let payload = src.slice(done..done + plan.len);
                done += plan.len;
                pieces.push(Box::pin(carry_out(node, at, plan, payload)));
            }
        }
        join_pieces(pieces).await?;
        note_write(node, offset + total);
        if durable { flush(node).await } else { Ok(()) }
    })
}

fn to_child<'a>(
    node: &Arc<Node>,
    child: ChildId,
    offset: u64,
    src: IoVec,
) -> Result<IoFuture<'a>, Errno> {
    let below = node.children().node(child).ok_or(Errno::ENOMEDIUM)?;
    Ok(Box::pin(
        async move { write(&below, offset, src, false).await },
    ))
}

/// Gathers the bytes of a plan's pieces, writes them, and commits. `payload` begins at guest offset `start`.
async fn carry_out(
    node: &Arc<Node>,
    start: u64,
    plan: WritePlan,
    payload: IoVec,
) -> Result<(), Errno> {
    let mut existing: Vec<IoFuture<'_>> = Vec::new();
    let mut runs: Vec<(ChildId, u64, IoVec)> = Vec::new();
    for piece in &plan.pieces {
        let bytes: IoVec = match piece.source {
            PieceSource::Payload => {
                let from = piece.guest.checked_sub(start).ok_or(Errno::EIO)?;
                payload.slice(from..from + piece.len)
            }
            PieceSource::Zeroes => zeroes(piece.len)?,
            PieceSource::Existing => {
                let buffer = zeroes(piece.len)?;
                existing.push(Box::pin(read(node, piece.guest, buffer.clone())));
                buffer
            }
        };
        match runs.last_mut() {
            Some((child, offset, run))
                if *child == piece.child && *offset + run.len() == piece.offset =>
            {
                run.append(bytes);
            }
            _ => runs.push((piece.child, piece.offset, bytes)),
        }
    }
    join_pieces(existing).await?;
    let writes = runs
        .into_iter()
        .map(|(child, offset, run)| to_child(node, child, offset, run))
        .collect::<Result<Vec<_>, Errno>>()?;
    join_pieces(writes).await?;
    match plan.commit {
        Some(commit) => commit.commit().await,
        None => Ok(()),
    }
}

fn zeroes(len: u64) -> Result<IoVec, Errno> {
    Ok(IoBuffer::zeroed(usize::try_from(len).map_err(|_| Errno::ENOMEM)?).into())
}
