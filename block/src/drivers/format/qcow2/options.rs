//! The driver's options with their defaults filled in, checked against the image.

use bitflags::bitflags;
use stord_qmp::Error;
use stord_qmp::schema::block::{BlockdevOptionsQcow2, Qcow2OverlapCheckMode, Qcow2OverlapChecks};

use super::layout::{COMPATIBLE_LAZY_REFCOUNTS, Geometry, MIN_CLUSTER_BITS};
use crate::graph::NodeOptions;

/// The most bytes that the L2 cache takes if the user does not say otherwise.
const DEFAULT_MAX_L2_CACHE: u64 = 32 << 20;
/// Bytes of the refcount cache if the user does not say otherwise.
const DEFAULT_REFCOUNT_CACHE: u64 = 256 << 10;
/// L2 tables are cached in pieces of at most this many bytes if the user does not say otherwise.
const DEFAULT_SLICE: u64 = 4096;
/// Seconds after which unused L2 entries are dropped if the user does not say otherwise.
const DEFAULT_CLEAN_INTERVAL: u64 = 600;
/// A cache of this many bytes or more is refused.
const CACHE_LIMIT: u64 = i32::MAX as u64;

bitflags! {
    /// Structures that a write is checked not to hit.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Overlap: u16 {
        const MAIN_HEADER = 1;
        const ACTIVE_L1 = 1 << 1;
        const ACTIVE_L2 = 1 << 2;
        const REFCOUNT_BLOCK = 1 << 3;
        const REFCOUNT_TABLE = 1 << 4;
        const SNAPSHOT_TABLE = 1 << 5;
        const INACTIVE_L1 = 1 << 6;
        const INACTIVE_L2 = 1 << 7;
        const BITMAP_DIRECTORY = 1 << 8;

        const CONSTANT = Self::MAIN_HEADER.bits() | Self::ACTIVE_L1.bits() | Self::REFCOUNT_TABLE.bits()
            | Self::SNAPSHOT_TABLE.bits() | Self::BITMAP_DIRECTORY.bits();
        const CACHED = Self::CONSTANT.bits() | Self::ACTIVE_L2.bits() | Self::REFCOUNT_BLOCK.bits() | Self::INACTIVE_L1.bits();
    }
}

/// Why a cluster is given up, which decides whether the file below hears of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FreeReason {
    /// A discard or a zero write that may unmap.
    Request,
    /// Anything else: data that was copied elsewhere, compressed data that was overwritten.
    Other,
}

/// The options in force.
#[derive(Clone, Debug)]
pub(super) struct Options {
    /// Bytes of the L2 cache.
    pub(super) l2_cache: u64,
    /// log2 of the bytes of a piece of an L2 table.
    pub(super) slice_bits: u32,
    /// Bytes of the refcount cache.
    pub(super) refcount_cache: u64,
    /// Seconds; 0 for never.
    pub(super) clean_interval: u64,
    pub(super) lazy_refcounts: bool,
    pub(super) overlap: Overlap,
    pub(super) pass_request: bool,
    pub(super) pass_snapshot: bool,
    pub(super) pass_other: bool,
    pub(super) no_unref: bool,
}

impl Options {
    /// Whether a cluster freed for `reason` is discarded in the file below.
    pub(super) fn passes(&self, reason: FreeReason) -> bool {
        match reason {
            FreeReason::Request => self.pass_request,
            FreeReason::Other => self.pass_other,
        }
    }

    /// Fills in the defaults, for an image of `size` bytes with these `compatible` features.
    pub(super) fn new(
        options: &BlockdevOptionsQcow2,
        common: &NodeOptions,
        geometry: &Geometry,
        size: u64,
        compatible: u64,
    ) -> Result<Self, Error> {
        let lazy_refcounts = options
            .lazy_refcounts
            .unwrap_or(compatible & COMPATIBLE_LAZY_REFCOUNTS != 0);
        if lazy_refcounts && geometry.version < 3 {
            return Err(Error::generic(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
            ));
        }
        let no_unref = options.discard_no_unref.unwrap_or(false);
        if no_unref && geometry.version < 3 {
            return Err(Error::generic(
                "discard-no-unref is only supported since qcow2 version 3",
            ));
        }
        let slice_bits = slice_bits(options.l2_cache_entry_size, geometry)?;
        let (l2_cache, refcount_cache) = cache_sizes(options, geometry, size)?;
        Ok(Self {
            l2_cache,
            slice_bits,
            refcount_cache,
            clean_interval: clean_interval(options.cache_clean_interval)?,
            lazy_refcounts,
            overlap: overlap(options.overlap_check.as_ref()),
            pass_request: options.pass_discard_request.unwrap_or(common.discard),
            pass_snapshot: options.pass_discard_snapshot.unwrap_or(true),
            pass_other: options.pass_discard_other.unwrap_or(false),
            no_unref,
        })
    }
}

/// The seconds after which what is not used is dropped from the caches.
fn clean_interval(wanted: Option<i64>) -> Result<u64, Error> {
    let Some(wanted) = wanted else {
        return Ok(DEFAULT_CLEAN_INTERVAL);
    };
    u32::try_from(wanted)
        .map(u64::from)
        .map_err(|_| Error::generic("Cache clean interval too big"))
}

fn size_option(value: Option<i64>, name: &str) -> Result<Option<u64>, Error> {
    value
        .map(|value| {
            u64::try_from(value).map_err(|_| {
                Error::generic(format!(
                    "Value '{value}' is out of range for parameter '{name}'"
                ))
            })
        })
        .transpose()
}

fn slice_bits(wanted: Option<i64>, geometry: &Geometry) -> Result<u32, Error> {
    let cluster = geometry.cluster_size();
    let size = size_option(wanted, "l2-cache-entry-size")?.unwrap_or(DEFAULT_SLICE.min(cluster));
    if !size.is_power_of_two() || size < 1 << MIN_CLUSTER_BITS || size > cluster {
        return Err(Error::generic(format!(
            "L2 cache entry size must be a power of two between {} and the cluster size ({cluster})",
            1 << MIN_CLUSTER_BITS
        )));
    }
    Ok(size.trailing_zeros())
}

fn cache_sizes(
    options: &BlockdevOptionsQcow2,
    geometry: &Geometry,
    size: u64,
) -> Result<(u64, u64), Error> {
    let combined = size_option(options.cache_size, "cache-size")?;
    let l2 = size_option(options.l2_cache_size, "l2-cache-size")?;
    let refcounts = size_option(options.refcount_cache_size, "refcount-cache-size")?;
    // What it takes to map the whole disk.
    let whole_disk = geometry
        .clusters_for(size)
        .saturating_mul(1 << geometry.entry_bits())
        .max(geometry.cluster_size());
    let (l2, refcounts) = match (combined, l2, refcounts) {
        (Some(_), Some(_), Some(_)) => {
            return Err(Error::generic(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ));
        }
        (Some(all), Some(l2), None) if l2 > all => {
            return Err(Error::generic("l2-cache-size may not exceed cache-size"));
        }
        (Some(all), None, Some(refcounts)) if refcounts > all => {
            return Err(Error::generic(
                "refcount-cache-size may not exceed cache-size",
            ));
        }
        (Some(all), Some(l2), None) => (l2, all - l2),
        (Some(all), None, Some(refcounts)) => (all - refcounts, refcounts),
        (Some(all), None, None) => {
            let l2 = whole_disk
                .min(all.saturating_sub(DEFAULT_REFCOUNT_CACHE))
                .max(all / 2);
            (l2, all - l2)
        }
        (None, l2, refcounts) => (
            l2.unwrap_or(DEFAULT_MAX_L2_CACHE),
            refcounts.unwrap_or(DEFAULT_REFCOUNT_CACHE),
        ),
    };
    if l2 > CACHE_LIMIT {
        return Err(Error::generic("L2 cache size too big"));
    }
    if refcounts > CACHE_LIMIT {
        return Err(Error::generic("Refcount cache size too big"));
    }
    Ok((l2.min(whole_disk), refcounts))
}

fn overlap(checks: Option<&Qcow2OverlapChecks>) -> Overlap {
    let of_mode = |mode: Option<Qcow2OverlapCheckMode>| match mode {
        Some(Qcow2OverlapCheckMode::None) => Overlap::empty(),
        Some(Qcow2OverlapCheckMode::Constant) => Overlap::CONSTANT,
        Some(Qcow2OverlapCheckMode::Cached) | None => Overlap::CACHED,
        Some(Qcow2OverlapCheckMode::All) => Overlap::all(),
    };
    match checks {
        None => Overlap::CACHED,
        Some(Qcow2OverlapChecks::Mode(mode)) => of_mode(Some(*mode)),
        Some(Qcow2OverlapChecks::Flags(flags)) => {
            let mut checks = of_mode(flags.template);
            for (flag, wanted) in [
                (Overlap::MAIN_HEADER, flags.main_header),
                (Overlap::ACTIVE_L1, flags.active_l1),
                (Overlap::ACTIVE_L2, flags.active_l2),
                (Overlap::REFCOUNT_BLOCK, flags.refcount_block),
                (Overlap::REFCOUNT_TABLE, flags.refcount_table),
                (Overlap::SNAPSHOT_TABLE, flags.snapshot_table),
                (Overlap::INACTIVE_L1, flags.inactive_l1),
                (Overlap::INACTIVE_L2, flags.inactive_l2),
                (Overlap::BITMAP_DIRECTORY, flags.bitmap_directory),
            ] {
                if let Some(wanted) = wanted {
                    checks.set(flag, wanted);
                }
            }
            checks
        }
    }
}
