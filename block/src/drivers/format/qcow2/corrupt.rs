//! What happens when the image is found corrupt: the first finding is reported; if the image could be written to, it is marked corrupt
//! and takes no more requests, as the reference does.

use std::ops::Range;
use std::sync::atomic::Ordering;

use stord_aio::Errno;

use super::Image;
use super::layout::{BadEntry, Incompatible};

impl Image {
    /// Reports corruption found while reading or writing, and gives the errno for the request. `fatal` findings end the use of an
    /// image that is open for writing.
    pub(super) async fn corruption(&self, fatal: bool, message: &str) -> Errno {
        self.corruption_at(fatal, message, None).await
    }

    /// The same, for bytes of the image file.
    pub(super) async fn corruption_at(
        &self,
        fatal: bool,
        message: &str,
        place: Option<Range<u64>>,
    ) -> Errno {
        let fatal = fatal && self.writable;
        let before = if fatal {
            self.corruption_reported.store(true, Ordering::Release);
            self.unusable.swap(true, Ordering::AcqRel)
        } else {
            self.corruption_reported.swap(true, Ordering::AcqRel)
        };
        if before {
            return Errno::EIO;
        }
        if fatal {
            tracing::error!(
                "qcow2: Marking image as corrupt: {message}; further corruption events will be suppressed"
            );
        } else {
            tracing::error!(
                "qcow2: Image is corrupt: {message}; further non-fatal corruption events will be suppressed"
            );
        }
        if let Some(reporter) = self.reporter.get() {
            reporter.image_corrupted(message, place, fatal);
        }
        if fatal {
            self.mark_corrupt().await;
        }
        Errno::EIO
    }

    /// Sets the corrupt bit; version 2 has none.
    async fn mark_corrupt(&self) {
        if self.geometry.version < 3 {
            return;
        }
        let marked =
            self.change_header(|header| header.set_incompatible(Incompatible::CORRUPT, true));
        if let Err(errno) = marked.await {
            tracing::error!("qcow2: cannot mark the image as corrupt: {errno}");
        }
    }

    /// Reports the entry for the guest cluster at `guest` that cannot be right.
    pub(super) async fn bad_entry(&self, bad: BadEntry, guest: u64) -> Errno {
        let position = self.position(guest);
        let table = self
            .l1
            .load()
            .table(position.l1_index)
            .map_or(0, |table| table.offset);
        let entries = 1u64 << self.geometry.l2_bits();
        let index = (guest >> self.geometry.cluster_bits) & (entries - 1);
        let place = format!("(L2 offset: {table:#x}, L2 index: {index:#x})");
        let message = match bad {
            BadEntry::ZeroInV2 => format!("Zero cluster entry found in pre-v3 image {place}"),
            BadEntry::CompressedWithDataFile => {
                format!("Compressed cluster entry found in image with external data file {place}")
            }
            BadEntry::Unaligned(offset) => {
                format!("Cluster allocation offset {offset:#x} unaligned {place}")
            }
            BadEntry::NotGuestOffset(offset) => format!(
                "External data file host cluster offset {offset:#x} does not match guest cluster offset: {guest:#x}, L2 index: {index:#x})"
            ),
            BadEntry::Subclusters => {
                format!("Invalid cluster entry found (L2 offset: {table:#x}, L2 index: {index:#x})")
            }
        };
        self.corruption(true, &message).await
    }
}
