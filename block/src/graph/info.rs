//! What the graph tells about its nodes, for `query-named-block-nodes`.

use std::sync::Arc;

use stord_qmp::Error;
use stord_qmp::schema::Data;
use stord_qmp::schema::block::BlockdevDetectZeroesOptions;
use stord_qmp::schema::node_info::{
    BlockDeviceInfo, BlockDirtyInfo, BlockIoLimits, BlockdevCacheInfo, ImageInfo,
    ImageInfoSpecific, ImageInfoSpecificKind,
};

use super::{DetectZeroes, Graph, Node};
use crate::driver::{BACKING, Driver, FILE, FormatInfo};
use crate::drivers::{description, filename};
use crate::io;

const SECTOR: u64 = 512;

impl Graph {
    /// All nodes, the newest first as the reference lists them; without the backing images' own descriptions if `flat`.
    ///
    /// # Errors
    /// The I/O context has ended.
    pub async fn query_named_block_nodes(&self, flat: bool) -> Result<Vec<BlockDeviceInfo>, Error> {
        let nodes: Vec<Arc<Node>> = self.nodes.borrow().iter().rev().cloned().collect();
        let mut infos = Vec::with_capacity(nodes.len());
        for node in nodes {
            infos.push(self.device_info(&node, flat).await?);
        }
        Ok(infos)
    }

    async fn device_info(&self, node: &Arc<Node>, flat: bool) -> Result<BlockDeviceInfo, Error> {
        let options = node.options();
        let backing = node.children().node(BACKING);
        Ok(BlockDeviceInfo {
            file: description::of_node(node),
            node_name: Some(node.name().to_owned()),
            ro: node.is_read_only(),
            drv: node.driver_name().to_owned(),
            backing_file: backing.as_deref().map(description::of_node),
            backing_file_depth: if flat { 0 } else { chain_depth(node) },
            active: node.is_active(),
            encrypted: false,
            detect_zeroes: match options.detect_zeroes {
                DetectZeroes::Off => BlockdevDetectZeroesOptions::Off,
                DetectZeroes::On => BlockdevDetectZeroesOptions::On,
                DetectZeroes::Unmap => BlockdevDetectZeroesOptions::Unmap,
            },
            limits: BlockIoLimits::default(),
            image: self.image_info(node, flat).await?,
            cache: BlockdevCacheInfo {
                writeback: true,
                direct: options.direct,
                no_flush: options.no_flush,
            },
            write_threshold: node.threshold().get(),
            dirty_bitmaps: bitmaps_of(node),
        })
    }

    async fn image_info(&self, node: &Arc<Node>, flat: bool) -> Result<ImageInfo, Error> {
        let mut infos = Vec::new();
        let mut next = Some(Arc::clone(node));
        while let Some(node) = next {
            infos.push(self.one_image_info(&node).await?);
            next = if flat {
                None
            } else {
                node.children().node(BACKING)
            };
        }
        let mut chain: Option<ImageInfo> = None;
        for mut info in infos.into_iter().rev() {
            info.backing_image = chain.map(Box::new);
            chain = Some(info);
        }
        chain.ok_or_else(|| Error::generic("a node without an image"))
    }

    async fn one_image_info(&self, node: &Arc<Node>) -> Result<ImageInfo, Error> {
        let info = format_info(node);
        let size_of = Arc::clone(node);
        let allocated = self
            .contexts
            .main()
            .run(move || async move { io::allocated_size(&size_of).await })
            .await
            .map_err(|gone| Error::generic(gone.to_string()))?;
        let base = description::of_leaf(node);
        let full_backing_filename = info
            .backing_file
            .as_ref()
            .map(|name| filename::full_name(name, &base).unwrap_or_else(|_| name.clone()));
        Ok(ImageInfo {
            filename: description::of_node(node),
            format: node.driver_name().to_owned(),
            dirty_flag: has_driver_info(node).then_some(info.dirty.unwrap_or(false)),
            actual_size: allocated.ok().and_then(|size| i64::try_from(size).ok()),
            // The reference counts in sectors.
            virtual_size: i64::try_from(node.size().next_multiple_of(SECTOR)).unwrap_or(i64::MAX),
            cluster_size: info.cluster_size.and_then(|size| i64::try_from(size).ok()),
            encrypted: None,
            compressed: None,
            backing_filename: info.backing_file,
            full_backing_filename,
            backing_filename_format: info.backing_format,
            snapshots: info.snapshots,
            format_specific: info.specific.or_else(|| specific_of_leaf(node)),
            backing_image: None,
        })
    }
}

fn bitmaps_of(node: &Node) -> Option<Vec<BlockDirtyInfo>> {
    let bitmaps = node.bitmaps().list();
    (!bitmaps.is_empty()).then(|| bitmaps.iter().map(|bitmap| bitmap.info()).collect())
}

/// What a format tells of its image; one that is no more than a window tells what lies below it does.
fn format_info(node: &Node) -> FormatInfo {
    match node.driver() {
        Driver::Format(_) if node.driver_name() == "raw" => {
            let below = node.children().node(FILE);
            let below = below.map(|file| format_info(&file)).unwrap_or_default();
            FormatInfo {
                cluster_size: below.cluster_size,
                dirty: below.dirty,
                snapshots: below.snapshots,
                ..FormatInfo::default()
            }
        }
        Driver::Format(format) => format.info(),
        Driver::Protocol(_) => FormatInfo::default(),
    }
}

/// Whether the reference's driver has anything to tell of the image: what lies on nothing does not.
fn has_driver_info(node: &Node) -> bool {
    match node.driver() {
        Driver::Protocol(leaf) => leaf.identity().is_some(),
        Driver::Format(_) if node.driver_name() == "raw" => {
            let file = node.children().node(FILE);
            file.is_some_and(|file| has_driver_info(&file))
        }
        Driver::Format(_) => true,
    }
}

fn specific_of_leaf(node: &Node) -> Option<ImageInfoSpecific> {
    (node.driver_name() == "file").then(|| ImageInfoSpecific {
        format: ImageInfoSpecificKind::File(Data::default()),
    })
}

fn chain_depth(node: &Node) -> i64 {
    let mut depth = 0;
    let mut next = node.children().node(BACKING);
    while let Some(node) = next {
        depth += 1;
        next = node.children().node(BACKING);
    }
    depth
}
