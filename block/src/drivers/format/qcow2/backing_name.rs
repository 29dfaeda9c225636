//! Changing what the image calls its backing file.
//!
//! A crash at any point leaves the old name or the new one, whole. The new name goes where nothing refers to yet; then one write of the
//! header's first sector, which is never torn, switches over to it. Extensions are not moved: that of the backing format is added behind
//! the others after the switch, its content first, its type last, or changed where it is if it lies in the first sector.

use std::ops::Range;

use stord_aio::{Errno, IoBuffer};

use super::Image;
use super::header::{HEAD_BYTES, read_bytes};
use super::layout::{EXT_BACKING_FORMAT, EXT_END, MAX_BACKING_NAME, MAX_FORMAT_NAME};
use crate::driver::FILE;

/// A type of extension that means nothing; what an extension becomes whose place is too small.
const EXT_VOID: u32 = 0x766f_6964;

/// The bytes of an extension before its content: type and length.
const EXT_HEAD: usize = 8;

/// Bytes to write at an offset.
type Write = (usize, Vec<u8>);

/// What to write, in this order, each write on disk before the next.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// The new name, where nothing refers to yet.
    name: Write,
    /// The extension of the backing format, after the switch to the new name.
    format: Vec<Write>,
}

/// The extensions of a header, as far as they matter here.
struct Area {
    /// The places of backing formats, without the heads.
    formats: Vec<Range<usize>>,
    /// Where the mark of the end is, or belongs.
    end: usize,
}

impl Area {
    fn read(cluster: &[u8], start: usize, limit: usize) -> Option<Self> {
        let word = |at: usize| {
            let bytes = cluster.get(at..at + 4)?.try_into().ok()?;
            Some(u32::from_be_bytes(bytes))
        };
        let mut area = Self {
            formats: Vec::new(),
            end: start,
        };
        while area.end + EXT_HEAD <= limit {
            let kind = word(area.end)?;
            if kind == EXT_END {
                break;
            }
            let len = usize::try_from(word(area.end + 4)?).ok()?;
            let content = area.end + EXT_HEAD;
            if kind == EXT_BACKING_FORMAT {
                area.formats.push(content..content.checked_add(len)?);
            }
            area.end = content.checked_add(len.checked_next_multiple_of(8)?)?;
        }
        (area.end <= limit).then_some(area)
    }
}

fn head_of(kind: u32, len: usize) -> Vec<u8> {
    // Format names are a few bytes long.
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    [kind.to_be_bytes(), len.to_be_bytes()].concat()
}

/// Works out how to change `cluster`, the image's first, whose header is `header_length` bytes long and whose backing file's name is at
/// `old`. `None` if there is no room.
fn plan(
    cluster: &[u8],
    header_length: usize,
    old: &Range<usize>,
    name: &str,
    format: Option<&str>,
) -> Option<Plan> {
    let limit = if old.start == 0 {
        cluster.len()
    } else {
        old.start
    };
    let area = Area::read(cluster, header_length, limit)?;
    let mut plan = Plan::default();
    let mut occupied = area.end + EXT_HEAD;
    if let Some(format) = format.map(str::as_bytes) {
        let padded = |len: usize| len.next_multiple_of(8);
        let fits = |place: &&Range<usize>| {
            padded(place.len()) == padded(format.len())
                && place.start + padded(place.len()) <= HEAD_BYTES
        };
        let is_there = |place: &Range<usize>| cluster.get(place.clone()) == Some(format);
        let mut content = format.to_vec();
        content.resize(padded(format.len()), 0);
        if area.formats.last().is_some_and(is_there) {
            // It stays.
        } else if let Some(place) = area.formats.last().filter(fits) {
            let changed = [head_of(EXT_BACKING_FORMAT, format.len()), content].concat();
            plan.format.push((place.start - EXT_HEAD, changed));
        } else {
            let tail = [content, head_of(EXT_END, 0)].concat();
            occupied = area.end + EXT_HEAD + tail.len();
            plan.format.push((area.end + EXT_HEAD, tail));
            plan.format
                .push((area.end, head_of(EXT_BACKING_FORMAT, format.len())));
            for place in &area.formats {
                let void = (place.start - EXT_HEAD, head_of(EXT_VOID, place.len()));
                plan.format.push(void);
            }
        }
    }
    let behind = occupied.max(old.end);
    let at = if behind + name.len() <= cluster.len() {
        behind
    } else if occupied + name.len() <= old.start {
        occupied
    } else {
        return None;
    };
    plan.name = (at, name.as_bytes().to_vec());
    (occupied <= cluster.len()).then_some(plan)
}

impl Image {
    /// Changes what the image calls its backing file, and the format of that.
    pub(super) async fn change_backing_file(
        &self,
        name: Option<String>,
        format: Option<String>,
    ) -> Result<(), Errno> {
        if !self.writable {
            return Err(Errno::EPERM);
        }
        let Some(name) = name else {
            // The name's place goes on to bound the extensions.
            return self.switch(None, 0, 0).await;
        };
        let is_too_long = name.len() > MAX_BACKING_NAME as usize
            || format
                .as_ref()
                .is_some_and(|format| format.len() >= MAX_FORMAT_NAME as usize);
        if is_too_long || self.geometry.data_file_raw {
            return Err(Errno::EINVAL);
        }
        let size = usize::try_from(self.geometry.cluster_size()).map_err(|_| Errno::ENOMEM)?;
        let cluster = read_bytes(&self.children, 0, size, "").await;
        let cluster = cluster.map_err(|_| Errno::EIO)?;
        let (header_length, old) = {
            let raw = self.header().raw;
            let start = usize::try_from(raw.backing_file_offset.get()).unwrap_or(usize::MAX);
            let len = raw.backing_file_size.get() as usize;
            (
                raw.header_length.get() as usize,
                start..start.saturating_add(len),
            )
        };
        let plan = plan(&cluster, header_length, &old, &name, format.as_deref());
        let Plan {
            name: (at, bytes),
            format: writes,
        } = plan.ok_or(Errno::ENOSPC)?;
        self.write_durably(at, &bytes).await?;
        self.switch(Some(name), at, bytes.len()).await?;
        for (at, bytes) in writes {
            self.write_durably(at, &bytes).await?;
        }
        if format.is_some() {
            self.header().backing_format = format;
        }
        Ok(())
    }

    /// Has the header name the bytes at `at`.
    async fn switch(&self, name: Option<String>, at: usize, len: usize) -> Result<(), Errno> {
        let len = u32::try_from(len).map_err(|_| Errno::EINVAL)?;
        self.change_header(|header| {
            if name.is_some() {
                header.raw.backing_file_offset = (at as u64).into();
            }
            header.raw.backing_file_size = len.into();
            header.backing_file = name;
        })
        .await
    }

    /// Writes bytes of the first cluster, those of the first sector together with the header's present values.
    pub(super) async fn write_durably(&self, at: usize, bytes: &[u8]) -> Result<(), Errno> {
        let in_head = HEAD_BYTES.saturating_sub(at).min(bytes.len());
        let (head, rest) = bytes.split_at(in_head);
        if !rest.is_empty() {
            let at = (at + in_head) as u64;
            let rest = IoBuffer::copy_of(rest);
            self.children.write(FILE, at, rest.into(), false).await?;
            self.children.flush(FILE).await?;
        }
        if !head.is_empty() {
            self.change_header(|header| header.patch(at, head)).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: usize = 112;

    /// A cluster with these extensions and this name of the backing file behind them.
    fn cluster(size: usize, extensions: &[(u32, usize)], name: &str) -> (Vec<u8>, Range<usize>) {
        let mut bytes = vec![0; HEADER];
        for (kind, len) in extensions {
            bytes.extend(head_of(*kind, *len));
            let content = if *kind == EXT_BACKING_FORMAT {
                b'f'
            } else {
                b'x'
            };
            bytes.extend(vec![content; *len]);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend(head_of(EXT_END, 0));
        let old = bytes.len()..bytes.len() + name.len();
        bytes.extend(name.as_bytes());
        bytes.resize(size, 0);
        (bytes, if name.is_empty() { 0..0 } else { old })
    }

    /// Carries out a plan write by write; `see` looks at the state after each, with the place of the name that counts then.
    fn carry_out(
        mut bytes: Vec<u8>,
        old: Range<usize>,
        plan: &Plan,
        mut see: impl FnMut(&[u8], &Range<usize>),
    ) {
        let mut put = |(at, new): &Write, counts: &Range<usize>| {
            bytes[*at..at + new.len()].copy_from_slice(new);
            see(&bytes, counts);
        };
        put(&plan.name, &old);
        let new = plan.name.0..plan.name.0 + plan.name.1.len();
        put(&plan.name, &new);
        for write in &plan.format {
            put(write, &new);
        }
    }

    fn formats(bytes: &[u8], name: &Range<usize>) -> Vec<Vec<u8>> {
        let limit = if name.start == 0 {
            bytes.len()
        } else {
            name.start
        };
        let area = Area::read(bytes, HEADER, limit).expect("the extensions stay readable");
        let content = |place: &Range<usize>| bytes[place.clone()].to_vec();
        area.formats.iter().map(content).collect()
    }

    #[test]
    fn every_state_in_between_has_one_whole_name() {
        let names = [(0x6803_f857, 392)];
        let with_format = [(EXT_BACKING_FORMAT, 5), (0x6803_f857, 384)];
        let far_format = [(0x6803_f857, 480), (EXT_BACKING_FORMAT, 5)];
        let long_format = [(EXT_BACKING_FORMAT, 11), (0x6803_f857, 384)];
        for extensions in [&names[..], &with_format, &far_format, &long_format] {
            for before in ["old", "", "a-name-that-is-longer-than-all-the-others"] {
                let (bytes, old) = cluster(4096, extensions, before);
                let new = "new.qcow2";
                let plan = plan(&bytes, HEADER, &old, new, Some("qcow2")).expect("room");
                let mut last = Vec::new();
                carry_out(bytes, old.clone(), &plan, |bytes, name| {
                    let text = &bytes[name.clone()];
                    assert!(text == before.as_bytes() || text == new.as_bytes());
                    last = formats(bytes, name);
                });
                assert_eq!(last, [b"qcow2"], "{extensions:?} {before:?}");
            }
        }
    }

    #[test]
    fn names_take_turns_where_there_is_little_room() {
        let (mut bytes, mut old) = cluster(512, &[], "0123456789");
        for turn in 0..20 {
            let name = "n".repeat(150 + turn % 2);
            let Some(plan) = plan(&bytes, HEADER, &old, &name, None) else {
                panic!("no room in turn {turn}");
            };
            let (at, new) = plan.name;
            let place = at..at + new.len();
            assert!(place.end <= bytes.len());
            assert!(place.start >= old.end || place.end <= old.start);
            bytes[place.clone()].copy_from_slice(&new);
            old = place;
        }
        assert_eq!(plan(&bytes, HEADER, &old, &"n".repeat(400), None), None);
    }
}
