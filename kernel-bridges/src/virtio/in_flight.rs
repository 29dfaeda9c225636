//! What is under way in a queue, kept in memory that outlives the process: whoever serves the queue next carries it out again and
//! completes it, so that no request is lost and none is completed twice.
//!
//! The layout and the order of the steps are those of "Inflight I/O tracking" for split virtqueues in the vhost-user specification:
//!
//! - taken: its number is written, then the mark that it is under way;
//! - given back: it is put in front of the list of the last batch; the used index of the ring is written; the marks of the batch are
//!   taken away; the used index is noted.
//!
//! So a mark that is there although the driver has got the chain back is one of the last batch, and the used index that was noted is
//! behind that of the ring by the length of that batch.
//!
//! The memory may be shared with a front end, so nothing in it is trusted.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::memory::mapping::{Mapping, Words};

/// `struct QueueRegionSplit`: u64 features, u16 version, u16 number of descriptors, u16 head of the last batch, u16 used index.
const VERSION: usize = 8;
const COUNT: usize = 10;
const LAST_BATCH: usize = 12;
const USED_INDEX: usize = 14;
const HEADER: usize = 16;
/// `struct DescStateSplit`: u8 mark, 5 bytes of padding, u16 next of the last batch, u64 number.
const NEXT: usize = 6;
const NUMBER: usize = 8;
const ENTRY: usize = 16;
/// The version of the layout, which is also the mark that somebody has used it.
const CURRENT: u16 = 1;
/// Queues' records are so far apart, or multiples of it.
const ALIGNMENT: usize = 64;

/// The record of one queue.
#[derive(Clone, Debug)]
pub(crate) struct InFlight {
    mapping: Arc<Mapping>,
    offset: usize,
    entries: u16,
}

impl InFlight {
    /// Bytes of the record of a queue of so many descriptors, a multiple of 64.
    pub(crate) fn size(entries: u16) -> usize {
        (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGNMENT)
    }

    /// The record at `offset` bytes of a mapping, for queues of at most so many descriptors; `None` where it is not inside, or at an odd
    /// place. All zeroes are an empty record.
    pub(crate) fn new(mapping: Arc<Mapping>, offset: usize, entries: u16) -> Option<Self> {
        let end = offset.checked_add(Self::size(entries))?;
        let is_fit = end <= mapping.len() && offset.is_multiple_of(ENTRY);
        is_fit.then_some(Self {
            mapping,
            offset,
            entries,
        })
    }

    /// Forgets everything, when the driver has reset the device: what was under way does not concern it any more. No queue may be using
    /// the record.
    pub(crate) fn clear(&self) {
        let memory = self.mapping.buffer();
        memory
            .slice(self.offset..self.offset + Self::size(self.entries))
            .fill(0);
    }

    /// The record for the calling thread; `None` where it has no room for a queue of `size` descriptors.
    pub(super) fn open(&self, size: u16) -> Option<Record> {
        let memory = self.mapping.buffer();
        let memory = memory.slice(self.offset..self.offset + Self::size(self.entries));
        let words = Words::new(memory, 8)?;
        (size <= self.entries).then_some(Record {
            words,
            size,
            number: 0,
        })
    }
}

/// The record of a queue that is being served.
#[derive(Debug)]
pub(super) struct Record {
    words: Words,
    size: u16,
    /// The number of the chain that is taken next.
    number: u64,
}

impl Record {
    /// Looks what was under way when the queue was left, given the used index of its ring. These chains are to be served again, in this
    /// order, before others. `None` when the record has never been used.
    pub(super) fn recover(&mut self, used_index: u16) -> Option<Vec<u16>> {
        let version = self.words.load_u16(VERSION, Ordering::Acquire);
        if version != CURRENT {
            for index in 0..self.size {
                self.set_mark(index, false);
            }
            self.words.store_u16(LAST_BATCH, 0, Ordering::Relaxed);
            self.words
                .store_u16(USED_INDEX, used_index, Ordering::Relaxed);
            self.words.store_u16(COUNT, self.size, Ordering::Relaxed);
            self.words.store_u16(VERSION, CURRENT, Ordering::Release);
            return None;
        }
        let noted = self.words.load_u16(USED_INDEX, Ordering::Acquire);
        let batch = used_index.wrapping_sub(noted).min(self.size);
        let mut index = self.words.load_u16(LAST_BATCH, Ordering::Relaxed);
        for _ in 0..batch {
            if index >= self.size {
                break;
            }
            self.set_mark(index, false);
            index = self.words.load_u16(at(index) + NEXT, Ordering::Relaxed);
        }
        self.words
            .store_u16(USED_INDEX, used_index, Ordering::Release);
        let mut left: Vec<(u64, u16)> = (0..self.size)
            .filter(|index| self.words.load_u8(at(*index), Ordering::Relaxed) != 0)
            .map(|index| {
                let number = self.words.load_u64(at(index) + NUMBER, Ordering::Relaxed);
                (number, index)
            })
            .collect();
        left.sort_unstable();
        // The numbers of what is left stay, so that their order does.
        self.number = left.last().map_or(0, |(number, _)| number.wrapping_add(1));
        Some(left.into_iter().map(|(_, index)| index).collect())
    }

    /// Notes that a chain was taken. Its first descriptor is one of the queue's.
    #[inline]
    pub(super) fn take(&mut self, head: u16) {
        self.words
            .store_u64(at(head) + NUMBER, self.number, Ordering::Relaxed);
        self.number = self.number.wrapping_add(1);
        self.set_mark(head, true);
    }

    /// Notes that a chain is about to be given back, before the ring says so.
    #[inline]
    pub(super) fn give_back(&self, head: u16) {
        let last = self.words.load_u16(LAST_BATCH, Ordering::Relaxed);
        self.words
            .store_u16(at(head) + NEXT, last, Ordering::Relaxed);
        self.words.store_u16(LAST_BATCH, head, Ordering::Release);
    }

    /// Takes away the mark of a chain that the ring has given back.
    #[inline]
    pub(super) fn forget(&self, head: u16) {
        self.set_mark(head, false);
    }

    /// Notes how far the ring has given chains back, after [`forget`](Self::forget) of all of them.
    #[inline]
    pub(super) fn note_used(&self, used_index: u16) {
        self.words
            .store_u16(USED_INDEX, used_index, Ordering::Release);
    }

    fn set_mark(&self, index: u16, is_under_way: bool) {
        self.words
            .store_u8(at(index), is_under_way.into(), Ordering::Release);
    }
}

/// Where the entry of a descriptor is.
fn at(index: u16) -> usize {
    HEADER + ENTRY * usize::from(index)
}
