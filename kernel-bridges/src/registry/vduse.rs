//! VDUSE exports among the others.

use std::path::Path;
use std::rc::Rc;

use stord_block::drivers::description;
use stord_qmp::Error;
use stord_qmp::schema::export::BlockExportOptionsVduseBlk;

use super::{Entry, ExportRegistry};
use crate::export::{Ended, Export, Parts};
use crate::vduse::{VduseExport, VduseOptions};

const DEFAULT_QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: std::ops::RangeInclusive<u16> = 2..=1024;
/// In bytes.
const DEFAULT_BLOCK_SIZE: u32 = 512;
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=2 << 20;

/// The number of queues.
///
/// # Errors
/// An option makes no sense.
pub(super) fn check(options: &BlockExportOptionsVduseBlk) -> Result<u16, Error> {
    let queues = options.num_queues.unwrap_or(1);
    if queues == 0 {
        return Err(Error::generic("num-queues must be greater than 0"));
    }
    queue_size(options)?;
    block_size(options)?;
    if options.name.parse::<vduse::DeviceName>().is_err() {
        return Err(Error::generic("failed to create vduse device").with_hint(
            "the name has 1 to 255 bytes, is the name of a file, and is not 'control'",
        ));
    }
    Ok(queues)
}

fn queue_size(options: &BlockExportOptionsVduseBlk) -> Result<u16, Error> {
    let size = options.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE);
    if size.is_power_of_two() && QUEUE_SIZES.contains(&size) {
        return Ok(size);
    }
    Err(Error::generic("queue-size is invalid"))
}

fn block_size(options: &BlockExportOptionsVduseBlk) -> Result<u32, Error> {
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

impl ExportRegistry {
    pub(super) async fn start_vduse(
        &self,
        entry: &Entry,
        options: &BlockExportOptionsVduseBlk,
        parts: Parts,
    ) -> Result<(Rc<dyn Export>, Ended), Error> {
        let node = self.graph.find(&entry.node_name)?;
        let image = description::of_node(&node);
        drop(node);
        // The next daemon may be started in another directory.
        let image = stord_aio::pool::run(move || {
            let absolute = std::fs::canonicalize(Path::new(&image)).ok();
            let absolute = absolute.and_then(|path| path.into_os_string().into_string().ok());
            absolute.unwrap_or(image)
        })
        .await;
        let options = VduseOptions {
            name: options
                .name
                .parse()
                .map_err(|_| Error::generic("failed to create vduse device"))?,
            image,
            queues: check(options)?,
            queue_size: queue_size(options)?,
            logical_block_size: block_size(options)?,
            serial: options.serial.clone().unwrap_or_default(),
            attach: options.attach.unwrap_or(false),
        };
        let (export, ended) = VduseExport::start(options, parts).await?;
        Ok((export, ended))
    }
}
