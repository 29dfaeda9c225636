//! The features and the configuration space of a block device (5.2.3 and 5.2.4).

use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};

/// Offsets, lengths and alignments of requests are in units of 512 bytes, whatever the block size.
pub(crate) const SECTOR: u64 = 512;
/// The most sectors of one discard, and of one request to write zeroes; those of the reference.
pub(crate) const MAX_DISCARD_SECTORS: u32 = 32768;
pub(crate) const MAX_WRITE_ZEROES_SECTORS: u32 = 32768;

// 5.2.3
/// `VIRTIO_BLK_F_SEG_MAX`.
pub(crate) const F_SEG_MAX: u64 = 1 << 2;
/// `VIRTIO_BLK_F_RO`.
pub(crate) const F_RO: u64 = 1 << 5;
/// `VIRTIO_BLK_F_BLK_SIZE`.
pub(crate) const F_BLK_SIZE: u64 = 1 << 6;
/// `VIRTIO_BLK_F_FLUSH`.
pub(crate) const F_FLUSH: u64 = 1 << 9;
/// `VIRTIO_BLK_F_TOPOLOGY`.
pub(crate) const F_TOPOLOGY: u64 = 1 << 10;
/// `VIRTIO_BLK_F_CONFIG_WCE`.
pub(crate) const F_CONFIG_WCE: u64 = 1 << 11;
/// `VIRTIO_BLK_F_MQ`.
pub(crate) const F_MQ: u64 = 1 << 12;
/// `VIRTIO_BLK_F_DISCARD`.
pub(crate) const F_DISCARD: u64 = 1 << 13;
/// `VIRTIO_BLK_F_WRITE_ZEROES`.
pub(crate) const F_WRITE_ZEROES: u64 = 1 << 14;

/// What every device here has.
pub(crate) const FEATURES: u64 = F_VERSION_1
    | F_INDIRECT_DESC
    | F_EVENT_IDX
    | F_SEG_MAX
    | F_BLK_SIZE
    | F_FLUSH
    | F_TOPOLOGY
    | F_CONFIG_WCE
    | F_DISCARD
    | F_WRITE_ZEROES;

/// The number of bytes of the configuration space, with the fields of devices that are not offered here (secure erase, zones): that of
/// `struct virtio_blk_config` in linux/virtio_blk.h.
pub(crate) const CONFIG_SIZE: usize = 96;

/// `struct virtio_blk_config`, little-endian.
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Config {
    /// In sectors of 512 bytes.
    pub(crate) capacity: u64,
    pub(crate) size_max: u32,
    /// The most segments of data of one request.
    pub(crate) seg_max: u32,
    pub(crate) geometry: [u8; 4],
    /// In bytes.
    pub(crate) blk_size: u32,
    pub(crate) physical_block_exp: u8,
    pub(crate) alignment_offset: u8,
    /// In blocks.
    pub(crate) min_io_size: u16,
    pub(crate) opt_io_size: u32,
    /// 1 with a volatile write cache.
    pub(crate) writeback: u8,
    pub(crate) unused0: u8,
    pub(crate) num_queues: u16,
    pub(crate) max_discard_sectors: u32,
    pub(crate) max_discard_seg: u32,
    /// In sectors.
    pub(crate) discard_sector_alignment: u32,
    pub(crate) max_write_zeroes_sectors: u32,
    pub(crate) max_write_zeroes_seg: u32,
    pub(crate) write_zeroes_may_unmap: u8,
    pub(crate) unused1: [u8; 3],
    pub(crate) secure_erase: [u32; 3],
    pub(crate) zoned: [u32; 6],
}

const _: () = assert!(size_of::<Config>() == CONFIG_SIZE);
#[cfg(target_endian = "big")]
compile_error!("the configuration space is written in the byte order of the machine");

/// Where the field `writeback` is, the only one that a driver may write.
pub(crate) const WRITEBACK: u32 = 32;
const _: () = assert!(std::mem::offset_of!(Config, writeback) == WRITEBACK as usize);
