//! The header extension that names the bitmap directory: added, changed in place, taken away. Other extensions stay where they are.
//!
//! A cut at any moment leaves the old state, the new one, or an extension that the header declares void (the autoclear bit is off): a
//! new extension's content is on disk before its type, which is one write within a sector; content that lies in two sectors is changed
//! while the extension is void; a backing file's name that is in the way is copied before the header names the copy.

use stord_aio::Errno;

use crate::drivers::format::qcow2::Image;
use crate::drivers::format::qcow2::header::{BitmapsExtension, HEAD_BYTES, Header, read_bytes};
use crate::drivers::format::qcow2::layout::{Autoclear, EXT_BITMAPS, EXT_END};

/// Bytes of an extension before its content.
const HEAD: usize = 8;
/// Bytes of the content.
const CONTENT: usize = 24;

/// Where extensions are in the first cluster, in bytes.
struct Area {
    /// That of the bitmaps.
    bitmaps: Option<usize>,
    /// The mark of the end.
    end: usize,
    /// That of the bitmaps is the last.
    is_last: bool,
}

fn word(cluster: &[u8], at: usize) -> Option<u32> {
    let bytes = cluster.get(at..at.checked_add(4)?)?.try_into().ok()?;
    Some(u32::from_be_bytes(bytes))
}

impl Area {
    fn read(cluster: &[u8], start: usize, limit: usize) -> Option<Self> {
        let mut area = Self {
            bitmaps: None,
            end: start,
            is_last: false,
        };
        while area.end + HEAD <= limit {
            let kind = word(cluster, area.end)?;
            if kind == EXT_END {
                return Some(area);
            }
            let len = usize::try_from(word(cluster, area.end + 4)?).ok()?;
            area.is_last = kind == EXT_BITMAPS;
            if area.is_last {
                area.bitmaps = Some(area.end);
            }
            let content = area.end + HEAD;
            area.end = content.checked_add(len.checked_next_multiple_of(8)?)?;
        }
        (area.end <= limit).then_some(area)
    }
}

fn content_of(extension: &BitmapsExtension) -> Vec<u8> {
    let mut content = Vec::with_capacity(CONTENT);
    content.extend(extension.count.to_be_bytes());
    content.extend(0u32.to_be_bytes());
    content.extend(extension.directory_size.to_be_bytes());
    content.extend(extension.directory_offset.to_be_bytes());
    content
}

fn declare(header: &mut Header, valid: bool) {
    let bit = Autoclear::BITMAPS.bits();
    let bits = header.raw.autoclear.get();
    header.raw.autoclear = if valid { bits | bit } else { bits & !bit }.into();
}

impl Image {
    /// Has the header name this directory, or none. Everything it leads to is on disk.
    pub(super) async fn name_bitmaps(
        &self,
        extension: Option<BitmapsExtension>,
    ) -> Result<(), Errno> {
        let len = usize::try_from(self.geometry.cluster_size()).map_err(|_| Errno::ENOMEM)?;
        let cluster = read_bytes(&self.children, 0, len, "").await;
        let cluster = cluster.map_err(|_| Errno::EIO)?;
        let (start, name) = {
            let raw = self.header().raw;
            let at = usize::try_from(raw.backing_file_offset.get()).unwrap_or(usize::MAX);
            let name_len = raw.backing_file_size.get() as usize;
            (
                raw.header_length.get() as usize,
                at..at.saturating_add(name_len),
            )
        };
        let limit = if name.start == 0 { len } else { name.start };
        let area = Area::read(&cluster, start, limit).ok_or(Errno::EIO)?;
        match (extension, area.bitmaps) {
            (Some(extension), Some(at)) => self.change_extension(at, extension).await,
            (Some(extension), None) => {
                self.make_room(&cluster, &area, &name).await?;
                self.add_extension(area.end, extension).await
            }
            (None, Some(at)) if area.is_last => self.drop_last_extension(at).await,
            // In front of others it stays, void.
            (None, _) => self.void_bitmaps().await,
        }
    }

    /// Declares void what the header says of bitmaps.
    pub(super) async fn void_bitmaps(&self) -> Result<(), Errno> {
        self.change_header(|header| {
            declare(header, false);
            header.bitmaps = None;
        })
        .await
    }

    async fn change_extension(&self, at: usize, extension: BitmapsExtension) -> Result<(), Errno> {
        let content = at + HEAD;
        let spans_sectors = content / HEAD_BYTES != (content + CONTENT - 1) / HEAD_BYTES;
        if spans_sectors {
            self.change_header(|header| declare(header, false)).await?;
        }
        self.write_durably(content, &content_of(&extension)).await?;
        self.change_header(|header| {
            declare(header, true);
            header.bitmaps = Some(extension);
        })
        .await
    }

    async fn add_extension(&self, at: usize, extension: BitmapsExtension) -> Result<(), Errno> {
        let mut tail = content_of(&extension);
        tail.extend([0; HEAD]);
        self.write_durably(at + HEAD, &tail).await?;
        let mut head = EXT_BITMAPS.to_be_bytes().to_vec();
        head.extend(
            u32::try_from(CONTENT)
                .map_err(|_| Errno::EINVAL)?
                .to_be_bytes(),
        );
        self.write_durably(at, &head).await?;
        self.change_header(|header| {
            declare(header, true);
            header.bitmaps = Some(extension);
        })
        .await
    }

    async fn drop_last_extension(&self, at: usize) -> Result<(), Errno> {
        self.void_bitmaps().await?;
        self.write_durably(at, &[0; HEAD]).await
    }

    /// Sees to it that behind the last extension there is room for one more, and the mark of the end.
    async fn make_room(
        &self,
        cluster: &[u8],
        area: &Area,
        name: &std::ops::Range<usize>,
    ) -> Result<(), Errno> {
        let needed = area.end + HEAD + CONTENT + HEAD;
        if needed > cluster.len() {
            return Err(Errno::ENOSPC);
        }
        if name.start == 0 || needed <= name.start {
            return Ok(());
        }
        if area.end + HEAD > name.start {
            // Without a mark of the end, what comes before the name would be read as an extension once that is elsewhere.
            return Err(Errno::ENOSPC);
        }
        let at = needed.max(name.end).next_multiple_of(8);
        let text = cluster.get(name.clone()).ok_or(Errno::EIO)?;
        if at + text.len() > cluster.len() {
            return Err(Errno::ENOSPC);
        }
        self.write_durably(at, text).await?;
        self.change_header(|header| header.raw.backing_file_offset = (at as u64).into())
            .await
    }
}
