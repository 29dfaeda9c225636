//! The request path: takes a request at a node and moves the bytes between the caller's memory and the leaf that holds them.
//!
//! A read asks the maps from the top down (`walk`). As long as one extent covers the whole request the walk needs no future; at the
//! leaf there is one. Only a request that spans extents, or whose metadata is not in memory, takes the slower way, in which all its
//! pieces are in flight together.
//!
//! What holds everywhere here: the caller has counted the request at its root ([`crate::Backend`]), so the graph does not change under
//! it; a format's space stays pinned (`walk::Path`) from the first look at its map until the last byte has moved; past a node's end
//! reads give zeroes, and only `Backend` refuses them.

mod align;
mod discard;
mod flush;
mod read;
mod status;
mod truncate;
mod walk;
mod write;
mod zero;

pub(crate) use discard::discard;
pub(crate) use flush::{flush, settle};
pub(crate) use read::{read, try_read};
pub use status::{Detail, HostPlace, Location};
pub(crate) use status::{block_status, locate};
pub(crate) use truncate::{allocated_size, truncate};
pub(crate) use write::{try_write, write, write_compressed};
pub(crate) use zero::write_zeroes;

/// The most pieces of one request in flight at a time.
const MAX_PIECES: usize = 32;

/// Awaits all pieces of a request, `MAX_PIECES` at a time, and gives the first error in request order. Every piece is finished when
/// this returns: none is abandoned half-way because another failed.
async fn join_pieces(mut pieces: Vec<crate::driver::IoFuture<'_>>) -> Result<(), stord_aio::Errno> {
    while !pieces.is_empty() {
        let rest = pieces.split_off(pieces.len().min(MAX_PIECES));
        for result in stord_aio::join_all(pieces).await {
            result?;
        }
        pieces = rest;
    }
    Ok(())
}
