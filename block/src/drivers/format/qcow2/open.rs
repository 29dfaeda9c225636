//! Opening: what the image needs beside itself, then the image.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::ArcSwap;
use stord_aio::sync;
use stord_qmp::Error;
use stord_qmp::schema::block::BlockdevOptionsQcow2;

use super::cache::SliceCache;
use super::clean::Cleaning;
use super::compressed::Decompressed;
use super::header::Header;
use super::l1::L1;
use super::layout::Incompatible;
use super::meta::Meta;
use super::options::Options;
use super::pins::Pins;
use super::single_flight::SingleFlight;
use super::snapshot::Snapshots;
use super::{Image, Qcow2, check};
use crate::driver::{DATA_FILE, ImageLinks};
use crate::graph::{Children, NodeOptions};

/// Guest-visible lengths are multiples of this.
const SECTOR: u64 = 512;

/// Reads what the image says of the files it needs beside itself.
///
/// # Errors
/// The header cannot be read or is not that of an image that can be opened.
pub async fn links(children: &Children) -> Result<ImageLinks, Error> {
    let header = Header::read(children).await?;
    Ok(ImageLinks {
        backing_file: header.backing_file,
        backing_format: header.backing_format,
        data_file: header.geometry.data_file.then_some(header.data_file),
    })
}

/// Opens the image, whose children are in place.
///
/// # Errors
/// The image cannot be read, is not supported, is damaged, or does not fit the options.
pub async fn open(
    children: Children,
    options: BlockdevOptionsQcow2,
    common: NodeOptions,
) -> Result<Qcow2, Error> {
    let mut header = Header::read(&children).await?;
    let writable = !common.read_only;
    if writable && header.incompatible().contains(Incompatible::CORRUPT) {
        return Err(Error::generic(
            "qcow2: Image is corrupt; cannot be opened read/write",
        ));
    }
    if writable && header.incompatible().contains(Incompatible::DIRTY) {
        check::repair_dirty(&children).await?;
        header = Header::read(&children).await?;
    }
    let geometry = header.geometry;
    if geometry.data_file && children.node(DATA_FILE).is_none() {
        return Err(Error::generic("'data-file' is required for this image"));
    }
    let size = header.raw.size.get() & !(SECTOR - 1);
    let options = Options::new(
        &options,
        &common,
        &geometry,
        size,
        header.raw.compatible.get(),
    )?;
    // At most 2^22 entries.
    let l1_len = usize::try_from(header.raw.l1_size.get()).unwrap_or(usize::MAX);
    let l1 = L1::read(&children, header.raw.l1_table_offset.get(), l1_len)
        .await
        .map_err(|errno| Error::os("Could not read L1 table", errno))?;
    let snapshots = Snapshots::read(&children, &header).await?;
    let image = Image {
        slices: SliceCache::new(options.l2_cache, 1 << options.slice_bits),
        children,
        geometry,
        options,
        writable,
        header: Mutex::new(header),
        header_writes: sync::Mutex::new(()),
        header_unsure: AtomicBool::new(false),
        size: AtomicU64::new(size),
        l1: ArcSwap::from_pointee(l1),
        loading: SingleFlight::default(),
        decompressed: Decompressed::default(),
        snapshots: ArcSwap::from_pointee(snapshots),
        bitmaps: Arc::default(),
        directory: ArcSwap::default(),
        unsettled: AtomicBool::new(false),
        unusable: AtomicBool::new(false),
        unwritten: OnceLock::new(),
        corruption_reported: AtomicBool::new(false),
        reporter: OnceLock::new(),
        armed: AtomicBool::new(false),
        metadata_places: AtomicU64::new(1),
        meta: Mutex::new(Meta::default()),
        pins: Pins::default(),
        loading_refcounts: SingleFlight::default(),
        copying: SingleFlight::default(),
        writing_back: sync::Mutex::new(()),
        resizing: sync::Mutex::new(()),
        cleaning: Cleaning::default(),
    };
    image.load_bitmaps().await?;
    let image = Arc::new(image);
    image.start_cleaning();
    Ok(Qcow2(image))
}
