//! An ordered list of buffers that one request transfers as if it were one piece of memory.
//!
//! Positions and lengths are in bytes from the start of the first buffer, as `u64`, like offsets
//! in a disk. Up to two buffers need no allocation.

use std::ops::Range;

use smallvec::SmallVec;

use crate::buffer::IoBuffer;

/// An ordered list of buffers; clones share the memory.
#[derive(Clone, Debug, Default)]
pub struct IoVec {
    buffers: SmallVec<[IoBuffer; 2]>,
}

impl IoVec {
    /// A list without buffers.
    pub fn new() -> IoVec {
        IoVec::default()
    }

    /// Adds a buffer at the end; an empty one is left out.
    pub fn push(&mut self, buffer: IoBuffer) {
        if !buffer.is_empty() {
            self.buffers.push(buffer);
        }
    }

    /// Adds the buffers of `other` at the end.
    pub fn append(&mut self, other: IoVec) {
        self.buffers.extend(other.buffers);
    }

    /// The number of bytes in all buffers together.
    pub fn len(&self) -> u64 {
        self.buffers.iter().map(|buffer| buffer.len() as u64).sum()
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// The buffers in order, none of them empty.
    pub fn buffers(&self) -> &[IoBuffer] {
        &self.buffers
    }

    /// The bytes `range` of this list, as a list that shares the memory.
    ///
    /// # Panics
    ///
    /// When the range does not lie inside the list.
    pub fn slice(&self, range: Range<u64>) -> IoVec {
        let mut slice = IoVec::new();
        self.visit(range.start, range.end, |buffer, part, _| {
            slice.push(buffer.slice(part));
        });
        slice
    }

    /// Copies `bytes` into the buffers, from position `at` on.
    ///
    /// # Panics
    ///
    /// When they do not fit.
    pub fn write_at(&self, at: u64, bytes: &[u8]) {
        let end = at.saturating_add(bytes.len() as u64);
        self.visit(at, end, |buffer, part, done| {
            let len = part.len();
            buffer.write_at(part.start, &bytes[done..done + len]);
        });
    }

    /// Copies bytes out of the buffers, from position `at` on, until `out` is full.
    ///
    /// # Panics
    ///
    /// When the list does not hold so many.
    pub fn read_at(&self, at: u64, out: &mut [u8]) {
        let end = at.saturating_add(out.len() as u64);
        self.visit(at, end, |buffer, part, done| {
            let len = part.len();
            buffer.read_at(part.start, &mut out[done..done + len]);
        });
    }

    /// A copy of the content.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for buffer in &self.buffers {
            all.extend_from_slice(&buffer.to_vec());
        }
        all
    }

    /// Sets every byte to `byte`.
    pub fn fill(&self, byte: u8) {
        for buffer in &self.buffers {
            buffer.fill(byte);
        }
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        self.buffers.iter().all(IoBuffer::is_zero)
    }

    /// Whether every buffer starts at a multiple of `mem_align` and is a multiple of `len_align`
    /// long, in bytes.
    pub fn is_aligned(&self, mem_align: usize, len_align: usize) -> bool {
        self.buffers.iter().all(|buffer| {
            buffer.addr().is_multiple_of(mem_align) && buffer.len().is_multiple_of(len_align)
        })
    }

    /// Copies the whole content to the start of `to`.
    ///
    /// # Panics
    ///
    /// When it does not fit.
    pub fn copy_to(&self, to: &IoVec) {
        let mut at = 0;
        for from in &self.buffers {
            let end = at + from.len() as u64;
            let mut done = 0;
            to.visit(at, end, |buffer, part, _| {
                let len = part.len();
                buffer.copy_from(part.start, &from.slice(done..done + len));
                done += len;
            });
            at = end;
        }
    }

    /// Cuts off and returns the longest front part of at most `max_buffers` buffers and
    /// `max_bytes` bytes; the rest stays here.
    pub(crate) fn split_front(&mut self, max_buffers: usize, max_bytes: u64) -> IoVec {
        let mut bytes = 0;
        let fits = self
            .buffers
            .iter()
            .take(max_buffers)
            .take_while(|buffer| {
                bytes += buffer.len() as u64;
                bytes <= max_bytes
            })
            .count();
        if fits == self.buffers.len() {
            return std::mem::take(self);
        }
        if fits == 0 {
            let front = self.slice(0..max_bytes.min(self.len()));
            *self = self.slice(front.len()..self.len());
            return front;
        }
        let rest = self.buffers.drain(fits..).collect();
        IoVec {
            buffers: std::mem::replace(&mut self.buffers, rest),
        }
    }

    /// Calls `f` with each buffer that bytes `start..end` touch, the part of it inside them, and
    /// how many of the bytes came before.
    fn visit(&self, start: u64, end: u64, mut f: impl FnMut(&IoBuffer, Range<usize>, usize)) {
        assert!(
            start <= end && end <= self.len(),
            "bytes {start}..{end} of an I/O vector of {} bytes",
            self.len()
        );
        let mut skip = start;
        let mut left = end - start;
        let mut done = 0;
        for buffer in &self.buffers {
            if left == 0 {
                break;
            }
            let len = buffer.len() as u64;
            if skip >= len {
                skip -= len;
                continue;
            }
            let take = (len - skip).min(left);
            // Both are at most the length of this buffer, which is a `usize`.
            #[expect(
                clippy::cast_possible_truncation,
                reason = "at most the buffer's length"
            )]
            let (from, count) = (skip as usize, take as usize);
            f(buffer, from..from + count, done);
            done += count;
            left -= take;
            skip = 0;
        }
    }
}

impl From<IoBuffer> for IoVec {
    fn from(buffer: IoBuffer) -> IoVec {
        let mut list = IoVec::new();
        list.push(buffer);
        list
    }
}

impl FromIterator<IoBuffer> for IoVec {
    fn from_iter<I: IntoIterator<Item = IoBuffer>>(buffers: I) -> IoVec {
        let mut list = IoVec::new();
        for buffer in buffers {
            list.push(buffer);
        }
        list
    }
}
