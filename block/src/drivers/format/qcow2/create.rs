//! Making an image: its whole layout is worked out first ([`Plan`]), then written in one ascending pass, the header last.
//!
//! ```text
//! | header | refcount table | refcount blocks | L1 table | L2 tables | data |
//! ```
//!
//! L2 tables and data are there only with preallocation. Until the header is written the file is no image, so that a crash cannot leave
//! one that looks whole and is not.

use stord_aio::{Errno, IoBuffer, IoVec};
use stord_qmp::Error;
use stord_qmp::schema::create::{BlockdevCreateOptionsQcow2, BlockdevQcow2Version, PreallocMode};
use stord_qmp::schema::node_info::Qcow2CompressionType;
use zerocopy::IntoBytes;

use super::layout::{
    Autoclear, COMPATIBLE_LAZY_REFCOUNTS, COPIED, EXT_BACKING_FORMAT, EXT_DATA_FILE, EXT_END,
    EXT_FEATURE_NAMES, Geometry, Incompatible, MAGIC, MAX_BACKING_NAME, MAX_CLUSTER_BITS,
    MAX_FORMAT_NAME, MAX_L1_BYTES, MAX_REFTABLE_BYTES, MIN_CLUSTER_BITS, RawHeader, SUBCLUSTERS,
    V2_HEADER_LENGTH,
};
use crate::backend::Backend;
use crate::driver::ZeroFlags;
use crate::graph::MAX_LENGTH;
use crate::job::JobControl;
use crate::job::create::CreateError;

/// Tables are written in pieces of this many bytes.
const PIECE: u64 = 1 << 20;

/// Bytes of a version 3 header as it is written, with the compression type.
const HEADER_LENGTH: u32 = 112;

/// The names of the feature bits, as the format's specification gives them: type, bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// What to write: all offsets in bytes of the image file.
struct Plan<'a> {
    options: &'a BlockdevCreateOptionsQcow2,
    data_file_name: Option<String>,
    geometry: Geometry,
    size: u64,
    preallocation: PreallocMode,
    reftable_clusters: u64,
    refblocks: u64,
    l1_entries: u64,
    l1_clusters: u64,
    l2_tables: u64,
    data_clusters: u64,
}

/// Says what is wrong with the options.
///
/// # Errors
/// In the reference's wording where it has one.
pub fn check(options: &BlockdevCreateOptionsQcow2) -> Result<(), Error> {
    let plan = Plan::make(options, None)?;
    plan.header().map(|_| ())
}

/// Makes an image on `file`, with its data on `data_file` if there is one, whose name the image keeps.
///
/// # Errors
/// In the reference's wording where it has one; what is left where something was touched.
pub async fn create(
    options: &BlockdevCreateOptionsQcow2,
    file: &Backend,
    data_file: Option<(&Backend, String)>,
    control: &JobControl,
) -> Result<(), CreateError> {
    let data_backend = data_file.as_ref().map(|(backend, _)| (*backend).clone());
    let plan = Plan::make(options, data_file.map(|(_, name)| name))?;
    let header = plan.header()?;
    let written = plan
        .write(header, file, data_backend.as_ref(), control)
        .await;
    written.map_err(|error| CreateError {
        error,
        // The old header is the first to go, the new one the last to come.
        left: Some(format!(
            "node '{}' holds no image now, and what it held before is lost",
            file.node_name()
        )),
    })
}

impl<'a> Plan<'a> {
    fn make(
        options: &'a BlockdevCreateOptionsQcow2,
        data_file_name: Option<String>,
    ) -> Result<Self, Error> {
        let geometry = geometry(options)?;
        let size = options.size;
        if !size.is_multiple_of(512) {
            return Err(Error::generic("Image size must be a multiple of 512 bytes"));
        }
        let preallocation = options.preallocation.unwrap_or(PreallocMode::Off);
        if options.backing_file.is_some()
            && preallocation != PreallocMode::Off
            && !geometry.extended_l2
        {
            return Err(Error::generic(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            ));
        }
        if size > MAX_LENGTH {
            return Err(Error::generic(format!(
                "Could not resize image: offset({size}) exceeds maximum({MAX_LENGTH})"
            )));
        }
        let l1_entries = geometry.l1_entries_for(size);
        if l1_entries > MAX_L1_BYTES / 8 {
            return Err(Error::generic(
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            ));
        }
        let guest_clusters = geometry.clusters_for(size);
        let preallocated = preallocation != PreallocMode::Off;
        let mut plan = Self {
            options,
            data_file_name,
            geometry,
            size,
            preallocation,
            reftable_clusters: 1,
            refblocks: 1,
            l1_entries,
            l1_clusters: geometry.clusters_for(l1_entries * 8),
            l2_tables: if preallocated { l1_entries } else { 0 },
            data_clusters: if preallocated && !geometry.data_file {
                guest_clusters
            } else {
                0
            },
        };
        plan.fit_refcounts();
        if plan.reftable_clusters * geometry.cluster_size() > MAX_REFTABLE_BYTES {
            return Err(Error::generic(
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            ));
        }
        Ok(plan)
    }

    /// Makes room for the counts of all clusters, those of the counts themselves included. Every round can only grow, and growth has
    /// ever less to count, so this ends.
    fn fit_refcounts(&mut self) {
        let per_block = 1u64 << self.geometry.refblock_bits();
        loop {
            let refblocks = self.clusters().div_ceil(per_block).max(1);
            let reftable_clusters = self.geometry.clusters_for(refblocks * 8).max(1);
            if (refblocks, reftable_clusters) == (self.refblocks, self.reftable_clusters) {
                return;
            }
            (self.refblocks, self.reftable_clusters) = (refblocks, reftable_clusters);
        }
    }

    fn clusters(&self) -> u64 {
        self.data_start() + self.data_clusters
    }

    // First clusters of the parts.
    fn refblocks_start(&self) -> u64 {
        1 + self.reftable_clusters
    }

    fn l1_start(&self) -> u64 {
        self.refblocks_start() + self.refblocks
    }

    fn l2_start(&self) -> u64 {
        self.l1_start() + self.l1_clusters
    }

    fn data_start(&self) -> u64 {
        self.l2_start() + self.l2_tables
    }

    fn offset(&self, cluster: u64) -> u64 {
        cluster << self.geometry.cluster_bits
    }

    async fn write(
        &self,
        header: IoBuffer,
        file: &Backend,
        data_file: Option<&Backend>,
        control: &JobControl,
    ) -> Result<(), Error> {
        self.make_room(file, data_file).await?;
        // What is not written here is zero from `make_room`.
        let cluster = self.geometry.cluster_size();
        let refblocks = self.offset(self.refblocks_start());
        let l2_tables = self.offset(self.l2_start());
        let reftable = |index: u64| refblocks + index * cluster;
        let l1_table = |index: u64| (l2_tables + index * cluster) | COPIED;
        write_table(file, self.offset(1), self.refblocks, control, &reftable).await?;
        write_table(
            file,
            self.offset(self.l1_start()),
            self.l2_tables,
            control,
            &l1_table,
        )
        .await?;
        self.write_refcounts(file, control).await?;
        self.write_l2_tables(file, control).await?;
        file.flush()
            .await
            .map_err(|errno| Error::os("Could not flush the new image", errno))?;
        write(file, 0, header).await?;
        file.flush()
            .await
            .map_err(|errno| Error::os("Could not flush the new image", errno))
    }

    /// Gives the files their lengths, reading as zeroes all over.
    async fn make_room(&self, file: &Backend, data_file: Option<&Backend>) -> Result<(), Error> {
        let failed = |errno| Error::os("Could not resize image", errno);
        let own = if data_file.is_some() {
            PreallocMode::Off
        } else {
            self.preallocation
        };
        let (size, data_start) = (self.offset(self.clusters()), self.offset(self.data_start()));
        clear(file, size, data_start, own).await.map_err(failed)?;
        match data_file {
            Some(data_file) => clear(data_file, self.size, 0, self.preallocation)
                .await
                .map_err(failed),
            None => Ok(()),
        }
    }

    async fn write_refcounts(&self, file: &Backend, control: &JobControl) -> Result<(), Error> {
        // A count of one for each cluster in use, in ascending order, whatever the width.
        let order = self.geometry.refcount_order;
        let in_use = self.clusters();
        let bytes = ((in_use << order).div_ceil(8)).next_multiple_of(8);
        write_pieces(
            file,
            self.offset(self.refblocks_start()),
            bytes,
            control,
            |at, len| {
                let mut block = vec![0u8; usize::try_from(len).unwrap_or(0)];
                let first = (at * 8) >> order;
                let count = ((len * 8) >> order).min(in_use.saturating_sub(first));
                for index in 0..count {
                    let bit = index << order;
                    // Big-endian counts end at their last byte; those narrower than a byte start at its lowest bit.
                    let (byte, mask) = if order >= 3 {
                        (((index + 1) << (order - 3)) - 1, 1)
                    } else {
                        (bit / 8, 1u8 << (bit % 8))
                    };
                    if let Some(byte) = usize::try_from(byte)
                        .ok()
                        .and_then(|byte| block.get_mut(byte))
                    {
                        *byte |= mask;
                    }
                }
                block
            },
        )
        .await
    }

    async fn write_l2_tables(&self, file: &Backend, control: &JobControl) -> Result<(), Error> {
        if self.l2_tables == 0 {
            return Ok(());
        }
        let words = self.geometry.entry_words() as u64;
        let guest_clusters = self.geometry.clusters_for(self.size);
        let first = if self.geometry.data_file {
            0
        } else {
            self.offset(self.data_start())
        };
        let value = |word: u64| {
            let cluster = word / words;
            // The second word of an extended entry says that no subcluster holds data yet.
            if cluster >= guest_clusters || !word.is_multiple_of(words) {
                0
            } else {
                (first + self.offset(cluster)) | COPIED
            }
        };
        let count = self.offset(self.l2_tables) / 8;
        write_table(file, self.offset(self.l2_start()), count, control, &value).await
    }

    /// The first cluster.
    fn header(&self) -> Result<IoBuffer, Error> {
        let options = self.options;
        let v3 = self.geometry.version >= 3;
        let zstd = self.geometry.zstd;
        let mut incompatible = Incompatible::empty();
        incompatible.set(Incompatible::DATA_FILE, self.geometry.data_file);
        incompatible.set(Incompatible::COMPRESSION, zstd);
        incompatible.set(Incompatible::EXTENDED_L2, self.geometry.extended_l2);
        let mut autoclear = Autoclear::empty();
        autoclear.set(Autoclear::DATA_FILE_RAW, self.geometry.data_file_raw);
        let length = if v3 { HEADER_LENGTH } else { V2_HEADER_LENGTH };
        let extensions = self.extensions()?;
        let backing = options.backing_file.as_deref().unwrap_or_default();
        let backing_offset = u64::from(length) + extensions.len() as u64;
        let mut raw = RawHeader {
            magic: MAGIC,
            version: self.geometry.version.into(),
            cluster_bits: self.geometry.cluster_bits.into(),
            size: self.size.into(),
            l1_size: narrow(self.l1_entries)?.into(),
            l1_table_offset: self.offset(self.l1_start()).into(),
            refcount_table_offset: self.offset(1).into(),
            refcount_table_clusters: narrow(self.reftable_clusters)?.into(),
            refcount_order: self.geometry.refcount_order.into(),
            header_length: length.into(),
            compression_type: u8::from(zstd),
            incompatible: incompatible.bits().into(),
            autoclear: autoclear.bits().into(),
            ..RawHeader::default()
        };
        if options.lazy_refcounts == Some(true) {
            raw.compatible = COMPATIBLE_LAZY_REFCOUNTS.into();
        }
        if !backing.is_empty() {
            raw.backing_file_offset = backing_offset.into();
            raw.backing_file_size = narrow(backing.len() as u64)?.into();
        }
        let mut bytes = raw.as_bytes()[..length as usize].to_vec();
        bytes.extend(extensions);
        bytes.extend(backing.as_bytes());
        if backing.len() > MAX_BACKING_NAME as usize
            || bytes.len() as u64 > self.geometry.cluster_size()
        {
            return Err(Error::generic("Backing file name too long"));
        }
        // Whole blocks, for files that take no less.
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        Ok(IoBuffer::copy_of(&bytes))
    }

    fn extensions(&self) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        let mut add = |kind: u32, data: &[u8]| {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        };
        if let Some(format) = self.options.backing_fmt {
            if format.name().len() >= MAX_FORMAT_NAME as usize {
                return Err(Error::generic("Backing format name too long"));
            }
            add(EXT_BACKING_FORMAT, format.name().as_bytes());
        }
        if let Some(name) = &self.data_file_name {
            add(EXT_DATA_FILE, name.as_bytes());
        }
        // In the smallest clusters the names leave no room for a backing file's.
        if self.geometry.version >= 3 && self.geometry.cluster_size() >= 4096 {
            add(EXT_FEATURE_NAMES, &feature_names());
        }
        add(EXT_END, &[]);
        Ok(bytes)
    }
}

fn feature_names() -> Vec<u8> {
    let mut table = Vec::new();
    for (kind, bit, name) in FEATURE_NAMES {
        table.extend([kind, bit]);
        let end = table.len() + 46;
        table.extend(name.as_bytes());
        table.resize(end, 0);
    }
    table
}

fn narrow(value: u64) -> Result<u32, Error> {
    u32::try_from(value).map_err(|_| Error::generic("Image is too big"))
}

/// Checks the options against each other.
fn geometry(options: &BlockdevCreateOptionsQcow2) -> Result<Geometry, Error> {
    const NEEDS_V3: &str = "compatibility level 1.1 and above (use version=v3 or greater)";
    let refuse = |message: String| Err(Error::generic(message));
    let v2 = options.version == Some(BlockdevQcow2Version::V2);
    let cluster_size = u64::try_from(options.cluster_size.unwrap_or(65536)).unwrap_or(0);
    let allowed = 1u64 << MIN_CLUSTER_BITS..=1 << MAX_CLUSTER_BITS;
    if !cluster_size.is_power_of_two() || !allowed.contains(&cluster_size) {
        return refuse("Cluster size must be a power of two between 512 and 2048k".to_owned());
    }
    let extended_l2 = options.extended_l2 == Some(true);
    let smallest = u64::from(SUBCLUSTERS) << MIN_CLUSTER_BITS;
    if extended_l2 && v2 {
        return refuse(format!(
            "Extended L2 entries are only supported with {NEEDS_V3}"
        ));
    }
    if extended_l2 && cluster_size < smallest {
        return refuse(format!(
            "Extended L2 entries are only supported with cluster sizes of at least {smallest} bytes"
        ));
    }
    if options.lazy_refcounts == Some(true) && v2 {
        return refuse(format!("Lazy refcounts only supported with {NEEDS_V3}"));
    }
    let refcount_bits = u64::try_from(options.refcount_bits.unwrap_or(16)).unwrap_or(0);
    if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
        return refuse(
            "Refcount width must be a power of two and may not exceed 64 bits".to_owned(),
        );
    }
    if v2 && refcount_bits != 16 {
        return refuse("Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)".to_owned());
    }
    let data_file_raw = options.data_file_raw == Some(true);
    if options.data_file.is_none() && data_file_raw {
        return refuse("data-file-raw requires data-file".to_owned());
    }
    if options.backing_file.is_some() && data_file_raw {
        return refuse("Backing file and data-file-raw cannot be used at the same time".to_owned());
    }
    if options.data_file.is_some() && v2 {
        return refuse(format!(
            "External data files are only supported with {NEEDS_V3}"
        ));
    }
    if options.backing_fmt.is_some() && options.backing_file.is_none() {
        return refuse("Backing format cannot be used without backing file".to_owned());
    }
    let zstd = options.compression_type == Some(Qcow2CompressionType::Zstd);
    if zstd && v2 {
        return refuse(format!(
            "Non-zlib compression type is only supported with {NEEDS_V3}"
        ));
    }
    Ok(Geometry {
        version: if v2 { 2 } else { 3 },
        cluster_bits: cluster_size.trailing_zeros(),
        refcount_order: refcount_bits.trailing_zeros(),
        extended_l2,
        data_file: options.data_file.is_some(),
        data_file_raw,
        zstd,
    })
}

/// Makes a file `size` bytes long and zero all over, and reserves its space from `data_start` on.
async fn clear(
    file: &Backend,
    size: u64,
    data_start: u64,
    preallocation: PreallocMode,
) -> Result<(), Errno> {
    match file.truncate(0, true).await {
        Ok(()) => file.truncate(size, true).await?,
        // A device: it has its length, and anything in it.
        Err(Errno::ENOTSUP) if file.size() >= size => {
            file.write_zeroes(0, size, ZeroFlags::MAY_UNMAP).await?;
        }
        Err(Errno::ENOTSUP) => return Err(Errno::ENOSPC),
        Err(errno) => return Err(errno),
    }
    match preallocation {
        PreallocMode::Off | PreallocMode::Metadata => Ok(()),
        PreallocMode::Falloc => {
            file.write_zeroes(data_start, size - data_start, ZeroFlags::empty())
                .await
        }
        PreallocMode::Full => {
            let zeroes = IoBuffer::zeroed(1 << 20);
            let mut at = data_start;
            while at < size {
                let len = (size - at).min(PIECE);
                file.write(at, IoVec::from(zeroes.clone()).slice(0..len), false)
                    .await?;
                at += len;
            }
            Ok(())
        }
    }
}

/// Writes `count` big-endian numbers from `offset` on.
async fn write_table(
    file: &Backend,
    offset: u64,
    count: u64,
    control: &JobControl,
    value: &dyn Fn(u64) -> u64,
) -> Result<(), Error> {
    write_pieces(file, offset, count * 8, control, |at, len| {
        (at / 8..(at + len) / 8)
            .flat_map(|index| value(index).to_be_bytes())
            .collect()
    })
    .await
}

/// Writes `len` bytes from `offset` on, made piece by piece.
async fn write_pieces(
    file: &Backend,
    offset: u64,
    len: u64,
    control: &JobControl,
    make: impl Fn(u64, u64) -> Vec<u8>,
) -> Result<(), Error> {
    let mut done = 0;
    while done < len {
        if control.is_cancelled() {
            return Err(Error::generic("Operation canceled"));
        }
        let piece = (len - done).min(PIECE);
        write(file, offset + done, IoBuffer::from_vec(make(done, piece))).await?;
        done += piece;
    }
    Ok(())
}

async fn write(file: &Backend, offset: u64, bytes: IoBuffer) -> Result<(), Error> {
    file.write(offset, bytes.into(), false)
        .await
        .map_err(|errno| Error::os("Could not write the new image", errno))
}
