//! On-disk structures of qcow2, exactly as the format's specification (QEMU's `docs/interop/qcow2`) lays them down: the header,
//! header extensions, table entries. All numbers are big-endian; everything here is plain data without I/O.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first four bytes of an image.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes of a version 2 header.
pub(super) const V2_HEADER_LENGTH: u32 = 72;
/// Bytes of the header fields known here.
pub(super) const RAW_HEADER_LENGTH: u32 = 112;
/// Bytes of the shortest version 3 header.
pub(super) const V3_HEADER_LENGTH: u32 = 104;

/// Cluster sizes are powers of two from 512 bytes to 2 MiB.
pub(super) const MIN_CLUSTER_BITS: u32 = 9;
/// See [`MIN_CLUSTER_BITS`].
pub(super) const MAX_CLUSTER_BITS: u32 = 21;

/// The most bytes of an L1 table.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// The most bytes of a refcount table.
pub(super) const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// The most internal snapshots.
pub(super) const MAX_SNAPSHOTS: u32 = 65_536;
/// The most bytes of extra data in a snapshot table entry.
pub(super) const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// The most bytes of the snapshot table.
pub(super) const MAX_SNAPSHOTS_BYTES: u64 = 64 << 20;
/// The most persistent bitmaps.
pub(super) const MAX_BITMAPS: u32 = 65_535;
/// The most bytes of the bitmap directory: every entry with the longest name.
pub(super) const MAX_BITMAP_DIRECTORY_BYTES: u64 = 65_535 * (24 + 1000);
/// The longest backing file name in bytes.
pub(super) const MAX_BACKING_NAME: u32 = 1023;
/// Names of backing formats are shorter than this.
pub(super) const MAX_FORMAT_NAME: u32 = 16;

/// The header. A version 2 image ends it after `snapshots_offset`; what `header_length` leaves out counts as zero.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: [u8; 4],
    pub(super) version: U32,
    pub(super) backing_file_offset: U64,
    pub(super) backing_file_size: U32,
    pub(super) cluster_bits: U32,
    pub(super) size: U64,
    pub(super) crypt_method: U32,
    pub(super) l1_size: U32,
    pub(super) l1_table_offset: U64,
    pub(super) refcount_table_offset: U64,
    pub(super) refcount_table_clusters: U32,
    pub(super) nb_snapshots: U32,
    pub(super) snapshots_offset: U64,
    pub(super) incompatible: U64,
    pub(super) compatible: U64,
    pub(super) autoclear: U64,
    pub(super) refcount_order: U32,
    pub(super) header_length: U32,
    pub(super) compression_type: u8,
    pub(super) padding: [u8; 7],
}

/// What every header extension begins with.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawExtension {
    pub(super) kind: U32,
    pub(super) len: U32,
}

/// The end of the header extensions.
pub(super) const EXT_END: u32 = 0;
/// The format of the backing file, a string.
pub(super) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub(super) const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Where the persistent bitmaps are.
pub(super) const EXT_BITMAPS: u32 = 0x2385_2875;
/// Where the encryption header is.
pub(super) const EXT_CRYPTO: u32 = 0x0537_be77;
/// The name of the external data file, a string.
pub(super) const EXT_DATA_FILE: u32 = 0x4441_5441;

/// An entry of the feature name table.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawFeatureName {
    /// 0: incompatible, 1: compatible, 2: autoclear.
    pub(super) kind: u8,
    pub(super) bit: u8,
    pub(super) name: [u8; 46],
}

/// The bitmaps extension.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawBitmapsExtension {
    pub(super) nb_bitmaps: U32,
    pub(super) reserved: U32,
    pub(super) directory_size: U64,
    pub(super) directory_offset: U64,
}

/// The fixed part of a bitmap directory entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawBitmapEntry {
    pub(super) table_offset: U64,
    pub(super) table_size: U32,
    pub(super) flags: U32,
    pub(super) kind: u8,
    pub(super) granularity_bits: u8,
    pub(super) name_size: U16,
    pub(super) extra_data_size: U32,
}

/// The fixed part of a snapshot table entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawSnapshot {
    pub(super) l1_table_offset: U64,
    pub(super) l1_size: U32,
    pub(super) id_size: U16,
    pub(super) name_size: U16,
    pub(super) date_sec: U32,
    pub(super) date_nsec: U32,
    pub(super) vm_clock_nsec: U64,
    pub(super) vm_state_size: U32,
    pub(super) extra_data_size: U32,
}

bitflags::bitflags! {
    /// Features that a program must know to open the image.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Incompatible: u64 {
        /// Refcounts may be wrong.
        const DIRTY = 1;
        /// Anything may be wrong; no writing.
        const CORRUPT = 1 << 1;
        /// Guest data is in another file.
        const DATA_FILE = 1 << 2;
        /// Clusters are compressed with something else than deflate.
        const COMPRESSION = 1 << 3;
        /// L2 entries are 16 bytes long and tell of subclusters.
        const EXTENDED_L2 = 1 << 4;
    }

    /// Features whose bits a program that does not know them must clear before it writes.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Autoclear: u64 {
        /// The bitmaps are consistent.
        const BITMAPS = 1;
        /// The external data file is a valid raw image by itself.
        const DATA_FILE_RAW = 1 << 1;
    }
}

/// In the compatible features: refcounts may be written late.
pub(super) const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;

/// In L1 and L2 entries: what the entry names has a refcount of exactly one.
pub(super) const COPIED: u64 = 1 << 63;
/// In L2 entries: the cluster is compressed.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// In L2 entries of standard clusters: the cluster reads as zeroes.
pub(super) const ZERO: u64 = 1;
/// In L1 and L2 entries: the offset.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// In refcount table entries: the offset.
pub(super) const REFTABLE_OFFSET_MASK: u64 = !0x1ff;
/// Metadata and data lie below this offset, in bytes.
pub(super) const MAX_HOST_OFFSET: u64 = 1 << 56;

/// Subclusters in a cluster of an image with extended L2 entries.
pub(super) const SUBCLUSTERS: u32 = 32;

/// The sizes that follow from the header; they never change while the image is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) extended_l2: bool,
    /// Guest data is in the data file, at the guest's own offsets.
    pub(super) data_file: bool,
    /// The data file is a raw image by itself.
    pub(super) data_file_raw: bool,
    pub(super) zstd: bool,
}

impl Geometry {
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The offset within its cluster.
    pub(super) fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    pub(super) fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// Clusters that `bytes` take up; never overflows.
    pub(super) fn clusters_for(&self, bytes: u64) -> u64 {
        (bytes >> self.cluster_bits) + u64::from(self.in_cluster(bytes) != 0)
    }

    pub(super) fn subcluster_bits(&self) -> u32 {
        if self.extended_l2 {
            self.cluster_bits - 5
        } else {
            self.cluster_bits
        }
    }

    pub(super) fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// 64-bit words of an L2 entry.
    pub(super) fn entry_words(&self) -> usize {
        if self.extended_l2 { 2 } else { 1 }
    }

    /// log2 of the bytes of an L2 entry.
    pub(super) fn entry_bits(&self) -> u32 {
        if self.extended_l2 { 4 } else { 3 }
    }

    /// log2 of the entries of an L2 table.
    pub(super) fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.entry_bits()
    }

    /// log2 of the guest bytes that one L1 entry stands for.
    pub(super) fn l1_shift(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub(super) fn l1_entries_for(&self, size: u64) -> u64 {
        let mask = (1u64 << self.l1_shift()) - 1;
        (size >> self.l1_shift()) + u64::from(size & mask != 0)
    }

    pub(super) fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// log2 of the entries of a refcount block.
    pub(super) fn refblock_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// The highest refcount that the width can hold.
    pub(super) fn max_refcount(&self) -> u64 {
        if self.refcount_order == 6 {
            u64::MAX
        } else {
            (1 << self.refcount_bits()) - 1
        }
    }
}

/// A compressed cluster: where its data lies in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CompressedRun {
    /// Byte offset, not aligned to anything.
    pub(super) offset: u64,
    /// Bytes up to the end of the last 512-byte sector; the data may end before.
    pub(super) len: u64,
}

impl CompressedRun {
    /// The L2 entry of data of `len` bytes, less than a cluster, at `offset`; `None` if there is no room for such an offset.
    pub(super) fn encode(offset: u64, len: u64, cluster_bits: u32) -> Option<u64> {
        let split = 62 - (cluster_bits - 8);
        let more_sectors = ((offset + len - 1) >> 9) - (offset >> 9);
        (offset + len <= 1 << split.min(MAX_HOST_OFFSET.trailing_zeros()))
            .then_some(COMPRESSED | more_sectors << split | offset)
    }

    /// Decodes the descriptor in an L2 entry.
    pub(super) fn decode(entry: u64, cluster_bits: u32) -> Self {
        let split = 62 - (cluster_bits - 8);
        let offset = entry & ((1u64 << split) - 1) & (MAX_HOST_OFFSET - 1);
        let sectors = ((entry >> split) & ((1u64 << (cluster_bits - 8)) - 1)) + 1;
        Self {
            offset,
            len: sectors * 512 - (offset & 511),
        }
    }
}

/// How one L2 entry of an image without subclusters maps its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// Not in this image.
    Unallocated,
    /// Reads as zeroes, no space behind it.
    Zero,
    /// Reads as zeroes; space is reserved.
    ReservedZero { host: u64, copied: bool },
    /// Stored as it is.
    Data { host: u64, copied: bool },
    /// Stored compressed.
    Compressed,
}

/// Why an L2 entry cannot be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadEntry {
    /// The zero flag in a version 2 image.
    ZeroInV2,
    /// Compressed with an external data file.
    CompressedWithDataFile,
    /// A host offset that is not a multiple of the cluster size.
    Unaligned(u64),
    /// An offset in the data file that is not the guest's.
    NotGuestOffset(u64),
    /// Subcluster bits that contradict each other or the offset.
    Subclusters,
}

impl Mapping {
    /// Decodes the first word of the entry for the guest cluster that starts at `guest`. With extended L2 entries the zero flag does not
    /// exist, and subclusters refine the answer.
    pub(super) fn decode(entry: u64, guest: u64, geometry: &Geometry) -> Result<Self, BadEntry> {
        if entry & COMPRESSED != 0 {
            return if geometry.data_file {
                Err(BadEntry::CompressedWithDataFile)
            } else {
                Ok(Self::Compressed)
            };
        }
        let host = entry & OFFSET_MASK;
        let copied = entry & COPIED != 0;
        let zero = entry & ZERO != 0 && !geometry.extended_l2;
        if zero && geometry.version < 3 {
            return Err(BadEntry::ZeroInV2);
        }
        // In a data file, offset 0 is the place of the first guest cluster.
        let has_space = host != 0 || (geometry.data_file && copied);
        if has_space && geometry.in_cluster(host) != 0 {
            return Err(BadEntry::Unaligned(host));
        }
        if has_space && geometry.data_file && host != guest {
            return Err(BadEntry::NotGuestOffset(host));
        }
        Ok(match (has_space, zero) {
            (true, true) => Self::ReservedZero { host, copied },
            (true, false) => Self::Data { host, copied },
            (false, true) => Self::Zero,
            (false, false) => Self::Unallocated,
        })
    }
}

/// The second word of an extended L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Subclusters(pub(super) u64);

impl Subclusters {
    /// All subclusters read as zeroes.
    pub(super) const ALL_ZERO: Self = Self(0xffff_ffff_0000_0000);

    pub(super) fn allocated(self) -> u32 {
        (self.0 & 0xffff_ffff) as u32
    }

    pub(super) fn zero(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub(super) fn new(allocated: u32, zero: u32) -> Self {
        Self(u64::from(allocated) | u64::from(zero) << 32)
    }

    /// A set of `count` subclusters from `first` on.
    pub(super) fn range(first: u32, count: u32) -> u32 {
        if count >= SUBCLUSTERS {
            u32::MAX
        } else {
            ((1u32 << count) - 1) << first
        }
    }

    /// Whether the bits fit together and with the entry's first word.
    pub(super) fn check(self, mapping: Mapping) -> Result<(), BadEntry> {
        let without_space = matches!(mapping, Mapping::Unallocated);
        if self.allocated() & self.zero() != 0 || (without_space && self.allocated() != 0) {
            return Err(BadEntry::Subclusters);
        }
        Ok(())
    }
}
