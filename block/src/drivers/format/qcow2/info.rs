//! What `query-named-block-nodes` tells of the image.

use stord_qmp::schema::Data;
use stord_qmp::schema::node_info::{
    ImageInfoSpecific, ImageInfoSpecificKind, ImageInfoSpecificQCow2, Qcow2CompressionType,
};

use super::Image;
use super::layout::Incompatible;
use crate::driver::FormatInfo;

impl Image {
    pub(super) fn info(&self) -> FormatInfo {
        let header = self.header();
        let incompatible = header.incompatible();
        let v3 = self.geometry.version >= 3;
        let specific = ImageInfoSpecificQCow2 {
            compat: if v3 { "1.1" } else { "0.10" }.to_owned(),
            data_file: header.data_file.clone(),
            data_file_raw: (v3 && self.geometry.data_file).then_some(self.geometry.data_file_raw),
            extended_l2: v3.then_some(self.geometry.extended_l2),
            lazy_refcounts: v3.then_some(header.has_lazy_refcounts()),
            corrupt: v3.then(|| incompatible.contains(Incompatible::CORRUPT)),
            refcount_bits: i64::from(self.geometry.refcount_bits()),
            bitmaps: self.directory.load().info(),
            compression_type: if self.geometry.zstd {
                Qcow2CompressionType::Zstd
            } else {
                Qcow2CompressionType::Zlib
            },
        };
        FormatInfo {
            cluster_size: Some(self.geometry.cluster_size()),
            dirty: Some(incompatible.contains(Incompatible::DIRTY)),
            backing_file: header.backing_file.clone(),
            backing_format: header.backing_format.clone(),
            snapshots: self.snapshots.load().info(),
            specific: Some(ImageInfoSpecific {
                format: ImageInfoSpecificKind::Qcow2(Data { data: specific }),
            }),
        }
    }
}
