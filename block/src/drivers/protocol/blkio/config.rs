//! What a virtio block device says of itself (5.2.3 and 5.2.4 of the virtio specification), made into terms that can be worked with.
//!
//! A device may say anything: what comes out of here is in bytes, inside sane bounds, and consistent.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::driver::Limits;

/// The unit of addresses and lengths, whatever the block size.
pub(super) const SECTOR: u64 = 512;
/// The most bytes of a read or write.
const MAX_TRANSFER: u32 = 1 << 20;
/// The largest block that is believed.
const MAX_BLOCK: u32 = 1 << 16;
/// The most bytes of a discard or of a request to write zeroes, whatever the device takes: lengths are 32 bits of sectors.
const MAX_RANGE: u64 = 1 << 31;

bitflags! {
    /// Features of virtio devices and of block devices among them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Features: u64 {
        const SIZE_MAX = 1 << 1;
        const RO = 1 << 5;
        const BLK_SIZE = 1 << 6;
        const FLUSH = 1 << 9;
        const CONFIG_WCE = 1 << 11;
        const MQ = 1 << 12;
        const DISCARD = 1 << 13;
        const WRITE_ZEROES = 1 << 14;
        const RING_INDIRECT_DESC = 1 << 28;
        const RING_EVENT_IDX = 1 << 29;
        /// Vhost-user's own: there are protocol features.
        const PROTOCOL = 1 << 30;
        const VERSION_1 = 1 << 32;
    }
}

/// The beginning of `struct virtio_blk_config`, little-endian.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Config {
    capacity: zerocopy::little_endian::U64,
    size_max: zerocopy::little_endian::U32,
    seg_max: zerocopy::little_endian::U32,
    geometry: [u8; 4],
    blk_size: zerocopy::little_endian::U32,
    topology: [u8; 8],
    writeback: u8,
    unused: u8,
    num_queues: zerocopy::little_endian::U16,
    max_discard_sectors: zerocopy::little_endian::U32,
    max_discard_seg: zerocopy::little_endian::U32,
    discard_sector_alignment: zerocopy::little_endian::U32,
    max_write_zeroes_sectors: zerocopy::little_endian::U32,
    max_write_zeroes_seg: zerocopy::little_endian::U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// Bytes of the configuration space that are asked for.
pub(super) const CONFIG_LEN: usize = size_of::<Config>();
const _: () = assert!(CONFIG_LEN == 60);

/// What the device is, and what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    /// Bytes.
    pub(super) capacity: u64,
    pub(super) is_read_only: bool,
    /// There is a cache to flush.
    pub(super) has_cache: bool,
    pub(super) limits: Limits,
    /// The most bytes of a discard; `None` where there are none.
    pub(super) discard: Option<u64>,
    /// The same for writing zeroes.
    pub(super) zeroes: Option<u64>,
    pub(super) zeroes_may_unmap: bool,
    /// How many queues it has.
    pub(super) queues: u16,
}

/// What cannot be a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unfit {
    #[error("the configuration space has {0} bytes")]
    Short(usize),
    #[error("a capacity of {0} sectors is too large")]
    Capacity(u64),
    #[error("a block size of {0} bytes is not supported")]
    BlockSize(u32),
    #[error("segments of {0} bytes are too small for a block")]
    Segment(u32),
    #[error("the device has no queue")]
    NoQueue,
}

/// The capacity in bytes that a configuration space tells.
///
/// # Errors
/// It cannot be one.
pub(super) fn capacity(config: &[u8]) -> Result<u64, Unfit> {
    let (config, _) = Config::read_from_prefix(config).map_err(|_| Unfit::Short(config.len()))?;
    let sectors = config.capacity.get();
    sectors
        .checked_mul(SECTOR)
        .filter(|bytes| i64::try_from(*bytes).is_ok())
        .ok_or(Unfit::Capacity(sectors))
}

impl Terms {
    /// What features that were agreed on and a configuration space mean.
    ///
    /// # Errors
    /// This cannot be a disk.
    pub(super) fn of(features: Features, config: &[u8]) -> Result<Self, Unfit> {
        let capacity = capacity(config)?;
        let (config, _) =
            Config::read_from_prefix(config).map_err(|_| Unfit::Short(config.len()))?;
        let has = |feature| features.contains(feature);
        let block = if has(Features::BLK_SIZE) {
            config.blk_size.get()
        } else {
            512
        };
        if !block.is_power_of_two() || !(512..=MAX_BLOCK).contains(&block) {
            return Err(Unfit::BlockSize(block));
        }
        // QEMU's back end has a limit and leaves it at 0.
        let segment = match config.size_max.get() {
            limit if has(Features::SIZE_MAX) && limit > 0 => limit,
            _ => MAX_TRANSFER,
        };
        // All data of a request is one segment.
        let max_transfer = segment.min(MAX_TRANSFER) / block * block;
        if max_transfer == 0 {
            return Err(Unfit::Segment(segment));
        }
        let queues = if has(Features::MQ) {
            config.num_queues.get()
        } else {
            1
        };
        if queues == 0 {
            return Err(Unfit::NoQueue);
        }
        let alignment = u64::from(config.discard_sector_alignment.get()) * SECTOR;
        // It is a wish: one that cannot be fulfilled is left out.
        let alignment = u32::try_from(alignment)
            .ok()
            .filter(|bytes| bytes.is_power_of_two())
            .unwrap_or(0);
        Ok(Self {
            capacity,
            is_read_only: has(Features::RO),
            has_cache: has(Features::FLUSH)
                && (!has(Features::CONFIG_WCE) || config.writeback != 0),
            limits: Limits {
                request_alignment: block,
                max_transfer,
                zero_alignment: block,
                discard_alignment: alignment.max(block),
                ..Limits::default()
            },
            discard: has(Features::DISCARD)
                .then(|| range(config.max_discard_sectors.get(), block))
                .flatten(),
            zeroes: has(Features::WRITE_ZEROES)
                .then(|| range(config.max_write_zeroes_sectors.get(), block))
                .flatten(),
            zeroes_may_unmap: config.write_zeroes_may_unmap != 0,
            queues,
        })
    }

    /// Whether what was begun with these terms can go on with others.
    pub(super) fn allow(&self, other: &Self) -> bool {
        other.capacity >= self.capacity
            && (self.is_read_only || !other.is_read_only)
            && (self.has_cache || !other.has_cache)
            && other.limits == self.limits
    }
}

/// The most bytes of a range, in whole blocks; `None` where not one fits.
fn range(sectors: u32, block: u32) -> Option<u64> {
    let bytes = (u64::from(sectors) * SECTOR).min(MAX_RANGE);
    let bytes = bytes / u64::from(block) * u64::from(block);
    (bytes > 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(set: &[(usize, u32)]) -> Vec<u8> {
        let mut bytes = vec![0; CONFIG_LEN];
        for (at, word) in set {
            bytes[*at..*at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn what_cannot_be_a_disk_is_refused() {
        let of = |features, set: &[(usize, u32)]| Terms::of(features, &config(set));
        assert_eq!(
            Terms::of(Features::empty(), &[0; 59]),
            Err(Unfit::Short(59))
        );
        assert_eq!(
            of(Features::empty(), &[(4, 0x0040_0000)]),
            Err(Unfit::Capacity(0x0040_0000_0000_0000))
        );
        assert_eq!(
            of(Features::empty(), &[(4, u32::MAX)]),
            Err(Unfit::Capacity(0xffff_ffff_0000_0000))
        );
        for size in [0, 1, 256, 513, 1 << 17, u32::MAX] {
            assert_eq!(
                of(Features::BLK_SIZE, &[(20, size)]),
                Err(Unfit::BlockSize(size))
            );
        }
        assert_eq!(
            of(Features::SIZE_MAX, &[(8, 511)]),
            Err(Unfit::Segment(511))
        );
        assert_eq!(of(Features::MQ, &[]), Err(Unfit::NoQueue));
    }

    #[test]
    fn odd_wishes_become_limits_that_hold() {
        let features = Features::all() - Features::RO;
        let terms = Terms::of(
            features,
            &config(&[
                (0, 2048),
                (8, 10_000),
                (20, 4096),
                // num_queues
                (32, 3 << 16),
                (36, u32::MAX),
                // The alignment of discards.
                (44, 3),
                (48, 7),
            ]),
        )
        .unwrap();
        assert_eq!(terms.capacity, 1 << 20);
        assert_eq!(terms.limits.request_alignment, 4096);
        assert_eq!(terms.limits.max_transfer, 8192);
        assert_eq!(terms.limits.discard_alignment, 4096);
        assert_eq!(terms.discard, Some(1 << 31));
        // Seven sectors are less than a block.
        assert_eq!(terms.zeroes, None);
        assert_eq!(terms.queues, 3);
        assert!(!terms.has_cache && !terms.is_read_only);
    }
}
