//! The header: read, checked as far as it can be without looking at what it points to, and written back.
//!
//! Nothing is allocated by a size in the header before that size is checked, and every size is bounded by a constant of the format or
//! by the cluster size. Messages are the reference's.
//!
//! Only the first 512 bytes are ever written back: all fields that change while an image is open lie there. Extensions, known or not,
//! stay as they are.

use stord_aio::IoBuffer;
use stord_qmp::Error;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::layout::{
    Autoclear, COMPATIBLE_LAZY_REFCOUNTS, EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_CRYPTO,
    EXT_DATA_FILE, EXT_END, EXT_FEATURE_NAMES, Geometry, Incompatible, MAGIC, MAX_BACKING_NAME,
    MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, MAX_CLUSTER_BITS, MAX_FORMAT_NAME, MAX_L1_BYTES,
    MAX_REFTABLE_BYTES, MAX_SNAPSHOTS, MIN_CLUSTER_BITS, RAW_HEADER_LENGTH, RawBitmapsExtension,
    RawExtension, RawFeatureName, RawHeader, V2_HEADER_LENGTH, V3_HEADER_LENGTH,
};
use crate::driver::FILE;
use crate::graph::Children;

/// Bytes at the file's start that hold every field that changes.
pub(super) const HEAD_BYTES: usize = 512;

/// A checked header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) raw: RawHeader,
    pub(super) geometry: Geometry,
    pub(super) backing_file: Option<String>,
    pub(super) backing_format: Option<String>,
    pub(super) data_file: Option<String>,
    pub(super) bitmaps: Option<BitmapsExtension>,
    /// The first [`HEAD_BYTES`] of the file.
    head: Vec<u8>,
}

/// Where the persistent bitmaps are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BitmapsExtension {
    pub(super) count: u32,
    pub(super) directory_offset: u64,
    pub(super) directory_size: u64,
}

/// What a header is read for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Requests to the image.
    Use,
    /// Looking for damage: a refcount table and a place for snapshots need not be there.
    Check,
}

impl Header {
    /// Reads and checks the header and its extensions.
    pub(super) async fn read(children: &Children) -> Result<Self, Error> {
        Self::read_for(children, Purpose::Use).await
    }

    /// The same for a check, which can tell more of what is wrong, and repair some of it.
    pub(super) async fn read_for_check(children: &Children) -> Result<Self, Error> {
        Self::read_for(children, Purpose::Check).await
    }

    async fn read_for(children: &Children, purpose: Purpose) -> Result<Self, Error> {
        let head = read_bytes(children, 0, HEAD_BYTES, "Could not read qcow2 header").await?;
        let (mut raw, _) = RawHeader::read_from_prefix(&head)
            .map_err(|_| Error::generic("qcow2 header too short"))?;
        if raw.magic != MAGIC {
            return Err(Error::generic("Image is not in qcow2 format"));
        }
        check_lengths(&mut raw)?;
        let extensions_end = match raw.backing_file_offset.get() {
            0 => 1u64 << raw.cluster_bits.get(),
            offset => offset,
        };
        let unknown = raw.incompatible.get() & !Incompatible::all().bits();
        let mut extensions = Extensions::default();
        if unknown != 0 {
            // Only the names of the features matter now, and any error in the extensions comes second.
            let _ = extensions.read(children, &raw, extensions_end).await;
            return Err(unsupported(unknown, &extensions.feature_names));
        }
        let geometry = check_fields(&raw, purpose)?;
        extensions.read(children, &raw, extensions_end).await?;
        check_compression(&raw)?;
        if geometry.data_file_raw && !geometry.data_file {
            return Err(Error::generic("data-file-raw requires a data file"));
        }
        let backing_file = read_backing_name(children, &raw).await?;
        Ok(Self {
            raw,
            geometry,
            backing_file,
            backing_format: extensions.backing_format,
            data_file: extensions.data_file,
            bitmaps: extensions.bitmaps,
            head,
        })
    }

    pub(super) fn incompatible(&self) -> Incompatible {
        Incompatible::from_bits_retain(self.raw.incompatible.get())
    }

    pub(super) fn has_lazy_refcounts(&self) -> bool {
        self.raw.compatible.get() & COMPATIBLE_LAZY_REFCOUNTS != 0
    }

    pub(super) fn set_incompatible(&mut self, bit: Incompatible, on: bool) {
        let mut bits = self.incompatible();
        bits.set(bit, on);
        self.raw.incompatible = bits.bits().into();
    }

    /// The bits of autoclear features that this driver keeps in force; the others must be cleared before the image changes.
    pub(super) fn autoclear_to_keep(&self) -> u64 {
        let mut kept = Autoclear::DATA_FILE_RAW;
        kept.set(Autoclear::BITMAPS, self.bitmaps.is_some());
        self.raw.autoclear.get() & kept.bits()
    }

    /// Takes over bytes that are to be written with the header and are no fields of it.
    pub(super) fn patch(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.head.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// The file's first bytes with the header's present values, ready to be written at offset 0.
    pub(super) fn to_head(&self) -> IoBuffer {
        let mut head = self.head.clone();
        let fields = if self.geometry.version < 3 {
            V2_HEADER_LENGTH
        } else {
            self.raw.header_length.get().min(RAW_HEADER_LENGTH)
        };
        let fields = fields as usize;
        head[..fields].copy_from_slice(&self.raw.as_bytes()[..fields]);
        IoBuffer::copy_of(&head)
    }
}

/// Reads bytes of the image file; zeroes past its end.
pub(super) async fn read_bytes(
    children: &Children,
    offset: u64,
    len: usize,
    what: &str,
) -> Result<Vec<u8>, Error> {
    let buffer = IoBuffer::zeroed(len);
    children
        .read(FILE, offset, buffer.clone().into())
        .await
        .map_err(|errno| Error::os(what, errno))?;
    Ok(buffer.to_vec())
}

/// Checks version and lengths, and clears the fields that the header does not have.
fn check_lengths(raw: &mut RawHeader) -> Result<(), Error> {
    let version = raw.version.get();
    if !(2..=3).contains(&version) {
        return Err(Error::generic(format!(
            "Unsupported qcow2 version {version}"
        )));
    }
    let cluster_bits = raw.cluster_bits.get();
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
        return Err(Error::generic(format!(
            "Unsupported cluster size: 2^{cluster_bits}"
        )));
    }
    if version == 2 {
        raw.incompatible = 0.into();
        raw.compatible = 0.into();
        raw.autoclear = 0.into();
        raw.refcount_order = 4.into();
        raw.header_length = V2_HEADER_LENGTH.into();
        raw.compression_type = 0;
        raw.padding.zero();
    } else {
        let length = raw.header_length.get();
        if length < V3_HEADER_LENGTH {
            return Err(Error::generic("qcow2 header too short"));
        }
        if length > 1 << cluster_bits {
            return Err(Error::generic("qcow2 header exceeds cluster size"));
        }
        if length <= V3_HEADER_LENGTH {
            raw.compression_type = 0;
        }
    }
    if raw.backing_file_offset.get() > 1 << cluster_bits {
        return Err(Error::generic("Invalid backing file offset"));
    }
    Ok(())
}

fn check_fields(raw: &RawHeader, purpose: Purpose) -> Result<Geometry, Error> {
    let incompatible = Incompatible::from_bits_retain(raw.incompatible.get());
    let autoclear = Autoclear::from_bits_retain(raw.autoclear.get());
    let geometry = Geometry {
        version: raw.version.get(),
        cluster_bits: raw.cluster_bits.get(),
        refcount_order: raw.refcount_order.get(),
        extended_l2: incompatible.contains(Incompatible::EXTENDED_L2),
        data_file: incompatible.contains(Incompatible::DATA_FILE),
        data_file_raw: autoclear.contains(Autoclear::DATA_FILE_RAW),
        zstd: raw.compression_type == 1,
    };
    if geometry.extended_l2 && geometry.subcluster_size() < 1 << MIN_CLUSTER_BITS {
        return Err(Error::generic(format!(
            "Unsupported subcluster size: {}",
            geometry.subcluster_size()
        )));
    }
    if geometry.refcount_order > 6 {
        return Err(Error::generic(
            "Reference count entry width too large; may not exceed 64 bits",
        ));
    }
    match raw.crypt_method.get() {
        0 => {}
        1 => {
            return Err(Error::generic(
                "Encryption method 'aes' of qcow2 images is not supported",
            ));
        }
        2 => {
            return Err(Error::generic(
                "Encryption method 'luks' of qcow2 images is not supported",
            ));
        }
        other => {
            return Err(Error::generic(format!(
                "Unsupported encryption method {other}"
            )));
        }
    }
    check_tables(raw, &geometry, purpose)?;
    Ok(geometry)
}

fn check_tables(raw: &RawHeader, geometry: &Geometry, purpose: Purpose) -> Result<(), Error> {
    let reftable_clusters = u64::from(raw.refcount_table_clusters.get());
    if reftable_clusters == 0 && purpose == Purpose::Use {
        return Err(Error::generic(
            "Image does not contain a reference count table",
        ));
    }
    let table = |offset: u64, entries: u64, entry_bytes: u64, max_bytes: u64, name: &str| {
        if entries > max_bytes / entry_bytes {
            return Err(Error::generic(format!("{name} too large")));
        }
        let end = offset.checked_add(entries * entry_bytes);
        if end.is_none_or(|end| i64::try_from(end).is_err()) || geometry.in_cluster(offset) != 0 {
            return Err(Error::generic(format!("{name} offset invalid")));
        }
        Ok(())
    };
    let cluster = geometry.cluster_size();
    table(
        raw.refcount_table_offset.get(),
        reftable_clusters,
        cluster,
        MAX_REFTABLE_BYTES,
        "Reference count table",
    )?;
    if purpose == Purpose::Use {
        let max_snapshots = u64::from(MAX_SNAPSHOTS);
        table(
            raw.snapshots_offset.get(),
            u64::from(raw.nb_snapshots.get()),
            40,
            max_snapshots * 40,
            "Snapshot table",
        )?;
    }
    let l1_size = u64::from(raw.l1_size.get());
    table(
        raw.l1_table_offset.get(),
        l1_size,
        8,
        MAX_L1_BYTES,
        "Active L1 table",
    )?;
    let needed = geometry.l1_entries_for(raw.size.get());
    if i32::try_from(needed).is_err() {
        return Err(Error::generic("Image is too big"));
    }
    if l1_size < needed {
        return Err(Error::generic("L1 table is too small"));
    }
    Ok(())
}

fn check_compression(raw: &RawHeader) -> Result<(), Error> {
    let bit =
        Incompatible::from_bits_retain(raw.incompatible.get()).contains(Incompatible::COMPRESSION);
    match (raw.compression_type, bit) {
        (0, false) | (1, true) => Ok(()),
        (0, true) => Err(Error::generic(
            "qcow2: Compression type incompatible feature bit must not be set",
        )),
        (1, false) => Err(Error::generic(
            "qcow2: Compression type incompatible feature bit must be set",
        )),
        (other, _) => Err(Error::generic(format!(
            "qcow2: unknown compression type: {other}"
        ))),
    }
}

async fn read_backing_name(children: &Children, raw: &RawHeader) -> Result<Option<String>, Error> {
    let offset = raw.backing_file_offset.get();
    if offset == 0 {
        return Ok(None);
    }
    let len = raw.backing_file_size.get();
    let room = (1u64 << raw.cluster_bits.get()) - offset;
    if len > MAX_BACKING_NAME || u64::from(len) > room {
        return Err(Error::generic("Backing file name too long"));
    }
    let bytes = read_bytes(
        children,
        offset,
        len as usize,
        "Could not read backing file name",
    )
    .await?;
    let name = text(&bytes);
    Ok((!name.is_empty()).then_some(name))
}

/// A string of the image; it ends at the first zero byte.
fn text(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn unsupported(mut bits: u64, names: &[(u8, u8, String)]) -> Error {
    let mut list = Vec::new();
    for (kind, bit, name) in names {
        let mask = 1u64.checked_shl(u32::from(*bit)).unwrap_or(0);
        if *kind == 0 && bits & mask != 0 {
            list.push(name.clone());
            bits &= !mask;
        }
    }
    if bits != 0 {
        list.push(format!("Unknown incompatible feature: {bits:x}"));
    }
    Error::generic(format!("Unsupported qcow2 feature(s): {}", list.join(", ")))
}

/// What the header extensions say.
#[derive(Debug, Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<String>,
    bitmaps: Option<BitmapsExtension>,
    feature_names: Vec<(u8, u8, String)>,
}

/// The part of the first cluster that has been read.
struct Window<'a> {
    children: &'a Children,
    bytes: Vec<u8>,
}

impl Window<'_> {
    /// Bytes read at a time: extensions rarely need more.
    const STEP: u64 = 4096;

    async fn get(&mut self, offset: u64, len: u64) -> Result<&[u8], Error> {
        let end = offset + len;
        if end > self.bytes.len() as u64 {
            let start = self.bytes.len() as u64;
            let more = usize::try_from(end.next_multiple_of(Self::STEP) - start).unwrap_or(0);
            self.bytes.extend(
                read_bytes(
                    self.children,
                    start,
                    more,
                    "Could not read header extensions",
                )
                .await?,
            );
        }
        let range = usize::try_from(offset).ok().zip(usize::try_from(end).ok());
        range
            .and_then(|(start, end)| self.bytes.get(start..end))
            .ok_or_else(|| Error::generic("Header extension too large"))
    }
}

impl Extensions {
    async fn read(&mut self, children: &Children, raw: &RawHeader, end: u64) -> Result<(), Error> {
        let mut window = Window {
            children,
            bytes: Vec::new(),
        };
        let mut offset = u64::from(raw.header_length.get());
        while offset < end {
            let Ok((extension, _)) = RawExtension::read_from_prefix(window.get(offset, 8).await?)
            else {
                return Ok(());
            };
            let (kind, len) = (extension.kind.get(), extension.len.get());
            offset += 8;
            if offset > end || u64::from(len) > end - offset {
                return Err(Error::generic("Header extension too large"));
            }
            if kind == EXT_END {
                return Ok(());
            }
            let known = matches!(
                kind,
                EXT_BACKING_FORMAT | EXT_FEATURE_NAMES | EXT_CRYPTO | EXT_BITMAPS | EXT_DATA_FILE
            );
            if known {
                let data = window.get(offset, u64::from(len)).await?;
                self.take(kind, data, raw)?;
            }
            offset += u64::from(len).next_multiple_of(8);
        }
        Ok(())
    }

    fn take(&mut self, kind: u32, data: &[u8], raw: &RawHeader) -> Result<(), Error> {
        match kind {
            EXT_BACKING_FORMAT => {
                let len = data.len();
                if len >= MAX_FORMAT_NAME as usize {
                    return Err(Error::generic(format!(
                        "ERROR: ext_backing_format: len={len} too large (>={MAX_FORMAT_NAME})"
                    )));
                }
                self.backing_format = Some(text(data));
            }
            EXT_DATA_FILE => self.data_file = Some(text(data)),
            EXT_CRYPTO if raw.crypt_method.get() != 2 => {
                return Err(Error::generic(
                    "CRYPTO header extension only expected with LUKS encryption method",
                ));
            }
            EXT_FEATURE_NAMES => {
                let names = data.chunks_exact(size_of::<RawFeatureName>());
                self.feature_names = names
                    .filter_map(|chunk| RawFeatureName::read_from_bytes(chunk).ok())
                    .map(|name| (name.kind, name.bit, text(&name.name)))
                    .collect();
            }
            EXT_BITMAPS => self.bitmaps = bitmaps(data, raw)?,
            _ => {}
        }
        Ok(())
    }
}

fn bitmaps(data: &[u8], raw: &RawHeader) -> Result<Option<BitmapsExtension>, Error> {
    let Ok(extension) = RawBitmapsExtension::read_from_bytes(data) else {
        return Err(Error::generic("bitmaps_ext: Invalid extension length"));
    };
    if !Autoclear::from_bits_retain(raw.autoclear.get()).contains(Autoclear::BITMAPS) {
        if raw.version.get() < 3 {
            tracing::warn!(
                "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent bitmap support; \
                 so now they must all be considered inconsistent"
            );
        } else {
            tracing::warn!(
                "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
            );
        }
        return Ok(None);
    }
    if extension.reserved.get() != 0 {
        return Err(Error::generic("bitmaps_ext: Reserved field is not zero"));
    }
    let count = extension.nb_bitmaps.get();
    if count > MAX_BITMAPS {
        return Err(Error::generic(format!(
            "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
        )));
    }
    if count == 0 {
        return Err(Error::generic(
            "bitmaps_ext: found bitmaps extension with zero bitmaps",
        ));
    }
    let directory_offset = extension.directory_offset.get();
    if directory_offset & ((1u64 << raw.cluster_bits.get()) - 1) != 0 {
        return Err(Error::generic(
            "bitmaps_ext: invalid bitmap directory offset",
        ));
    }
    let directory_size = extension.directory_size.get();
    if directory_size > MAX_BITMAP_DIRECTORY_BYTES {
        return Err(Error::generic(format!(
            "bitmaps_ext: bitmap directory size ({directory_size}) exceeds the maximum supported size ({MAX_BITMAP_DIRECTORY_BYTES})"
        )));
    }
    Ok(Some(BitmapsExtension {
        count,
        directory_offset,
        directory_size,
    }))
}
