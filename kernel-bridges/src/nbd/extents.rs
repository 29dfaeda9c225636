//! What is where: answers to `BLOCK_STATUS`, and which parts of a read are zeroes.

use stord_aio::Errno;
use stord_block::drivers::protocol::nbd::wire::{
    Extent32, Extent64, STATE_DIRTY, STATE_HOLE, STATE_ZERO,
};
use stord_block::{Detail, Location};
use zerocopy::IntoBytes as _;

use super::connection::Service;
use super::handshake::MetaContext;
use super::reply::Style;

/// The most extents in one answer.
const MAX_EXTENTS: usize = 16 << 10;

/// Neighbouring bytes of which the same is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) length: u64,
    pub(super) flags: u32,
}

impl Extent {
    /// In the terms of `base:allocation`, whether it reads as zeroes.
    pub(super) fn is_zero(&self) -> bool {
        self.flags & STATE_ZERO != 0
    }
}

/// Extents from the start of the range on; the whole of it, unless there are too many. With `one`, the first is enough.
pub(super) async fn of(
    context: MetaContext,
    service: &Service,
    offset: u64,
    length: u64,
    one: bool,
) -> Result<Vec<Extent>, Errno> {
    let mut extents: Vec<Extent> = Vec::new();
    let end = offset.saturating_add(length);
    let mut at = offset;
    while at < end {
        let extent = first(context, service, at, end - at).await?;
        at += extent.length;
        if let Some(last) = extents.last_mut()
            && last.flags == extent.flags
        {
            last.length += extent.length;
        } else if extents.len() == MAX_EXTENTS || (one && !extents.is_empty()) {
            break;
        } else {
            extents.push(extent);
        }
    }
    Ok(extents)
}

async fn first(
    context: MetaContext,
    service: &Service,
    offset: u64,
    length: u64,
) -> Result<Extent, Errno> {
    if let MetaContext::Bitmap(index) = context {
        let index = usize::try_from(index).map_err(|_| Errno::EINVAL)?;
        let bitmap = service.bitmaps.get(index).ok_or(Errno::EINVAL)?;
        let (is_dirty, length) = bitmap.extent(offset, length);
        let flags = if is_dirty { STATE_DIRTY } else { 0 };
        return Ok(Extent { length, flags });
    }
    let location = service.backend.locate(offset, length, Detail::Map).await?;
    let flags = match context {
        MetaContext::Allocation => allocation(&location),
        _ if location.present => location.depth.saturating_add(1),
        _ => 0,
    };
    Ok(Extent {
        length: location.len,
        flags,
    })
}

fn allocation(location: &Location) -> u32 {
    let hole = if location.data { 0 } else { STATE_HOLE };
    let zero = if location.zero { STATE_ZERO } else { 0 };
    hole | zero
}

/// The extents as the wire has them, the number of their context in front.
pub(super) fn encode(style: Style, context: MetaContext, extents: &[Extent]) -> Vec<u8> {
    let mut bytes = context.id().to_be_bytes().to_vec();
    if style == Style::Extended {
        let count = u32::try_from(extents.len()).expect("at most MAX_EXTENTS");
        bytes.extend_from_slice(&count.to_be_bytes());
        for extent in extents {
            let wire = Extent64 {
                length: extent.length.into(),
                flags: u64::from(extent.flags).into(),
            };
            bytes.extend_from_slice(wire.as_bytes());
        }
    } else {
        for extent in extents {
            let wire = Extent32 {
                // No longer than the request, whose length has 32 bits.
                length: u32::try_from(extent.length).unwrap_or(u32::MAX).into(),
                flags: extent.flags.into(),
            };
            bytes.extend_from_slice(wire.as_bytes());
        }
    }
    bytes
}
