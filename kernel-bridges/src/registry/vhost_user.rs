//! vhost-user-blk exports among the others.

use std::rc::Rc;

use stord_qmp::Error;
use stord_qmp::schema::export::BlockExportOptionsVhostUserBlk;

use super::Entry;
use crate::export::{Ended, Export, Parts};
use crate::vhost_user::{VhostUserExport, VhostUserOptions};

/// In bytes.
const DEFAULT_BLOCK_SIZE: u32 = 512;
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=2 << 20;

/// The number of queues.
///
/// # Errors
/// An option makes no sense.
pub(super) fn check(options: &BlockExportOptionsVhostUserBlk) -> Result<u16, Error> {
    block_size(options)?;
    match options.num_queues {
        None => Ok(1),
        Some(0) => Err(Error::generic("num-queues must be greater than 0")),
        Some(queues) => Ok(queues),
    }
}

fn block_size(options: &BlockExportOptionsVhostUserBlk) -> Result<u32, Error> {
    // To the reference, zero is as good as nothing.
    let asked = options.logical_block_size.filter(|size| *size != 0);
    let size = u32::try_from(asked.unwrap_or(DEFAULT_BLOCK_SIZE.into())).ok();
    let is_fit = |size: &u32| size.is_power_of_two() && BLOCK_SIZES.contains(size);
    size.filter(is_fit).ok_or_else(|| {
        let (least, most) = (BLOCK_SIZES.start(), BLOCK_SIZES.end());
        Error::generic(format!(
            "parameter logical-block-size must be a power of 2 between {least} and {most}"
        ))
    })
}

pub(super) async fn start(
    entry: &Entry,
    options: &BlockExportOptionsVhostUserBlk,
    parts: Parts,
) -> Result<(Rc<dyn Export>, Ended), Error> {
    let options = VhostUserOptions {
        id: entry.id.clone(),
        address: options.addr.address.clone(),
        logical_block_size: block_size(options)?,
        queues: check(options)?,
    };
    let (export, ended) = VhostUserExport::start(options, parts).await?;
    Ok((export, ended))
}
