//! The split virtqueue (section 2.7), as the device sees it.
//!
//! What the driver writes is read once, as whole words, and checked; the index of an entry is read before the entry, and the index of
//! the used ring is written after what it counts. A full fence separates what one side announces from its look at what the other side
//! wants, so that of two sides that are about to sleep one always sees the other.

use std::sync::atomic::{Ordering, fence};

use super::super::memory::mapping::Words;
use super::super::memory::{Access, GuestMemory};
use super::super::{F_EVENT_IDX, F_INDIRECT_DESC};
use super::Broken;

/// 2.7: the longest queue.
const MOST: u16 = 32768;
/// 2.7.6: `struct virtq_avail` and `virtq_used` begin with flags and the index.
const INDEX: usize = 2;
const ENTRIES: usize = 4;
/// 2.7.6, `VIRTQ_AVAIL_F_NO_INTERRUPT`; 2.7.8, `VIRTQ_USED_F_NO_NOTIFY`.
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
/// Bytes of a descriptor, an available entry and a used one.
pub(super) const DESCRIPTOR: usize = 16;
const AVAILABLE: usize = 2;
const USED: usize = 8;

/// Where a queue is, in guest addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// The table of descriptors.
    pub(crate) descriptors: u64,
    /// The available ring, the driver's area.
    pub(crate) available: u64,
    /// The used ring, the device's area.
    pub(crate) used: u64,
    /// The number of descriptors.
    pub(crate) size: u16,
}

/// A descriptor as the driver wrote it (2.7.5).
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl Descriptor {
    /// `VIRTQ_DESC_F_NEXT`: another follows.
    pub(super) const NEXT: u16 = 1;
    /// `VIRTQ_DESC_F_WRITE`: for the device to write to.
    pub(super) const WRITE: u16 = 2;
    /// `VIRTQ_DESC_F_INDIRECT`: a table of descriptors.
    pub(super) const INDIRECT: u16 = 4;

    /// Takes one apart that was read as two words.
    #[expect(clippy::cast_possible_truncation, reason = "fields of a word")]
    pub(super) fn parse(addr: u64, rest: u64) -> Self {
        Self {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    pub(super) fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A queue that is being served.
pub(crate) struct SplitRing {
    place: Place,
    parts: Parts,
    /// The next entry of the available ring.
    next_available: u16,
    /// The next entry of the used ring, and how far the driver has been told.
    next_used: u16,
    published: u16,
    /// How far the driver was notified, or had no need to be; `None` before the first time.
    notified: Option<u16>,
    event_index: bool,
    indirect: bool,
}

/// The memory of a ring.
struct Parts {
    descriptors: Words,
    available: Words,
    used: Words,
}

impl Parts {
    fn new(place: Place, event_index: bool, memory: &impl GuestMemory) -> Result<Self, Broken> {
        let size = usize::from(place.size);
        let part = |addr, len, access, alignment| {
            let memory = memory.contiguous(addr, len, access)?;
            Words::new(memory, alignment).ok_or(Broken::Alignment)
        };
        // Each ring ends with an event index, where that is used (2.7.6, 2.7.8).
        let event = if event_index { 2 } else { 0 };
        let available = ENTRIES + AVAILABLE * size + event;
        let used = ENTRIES + USED * size + event;
        Ok(Self {
            descriptors: part(place.descriptors, DESCRIPTOR * size, Access::Read, 16)?,
            available: part(place.available, available, Access::Read, 2)?,
            used: part(place.used, used, Access::Write, 4)?,
        })
    }
}

impl SplitRing {
    /// A ring that was set up by a driver, with the features it chose, from an entry of the available ring on. The used ring says itself
    /// how far it is.
    ///
    /// # Errors
    /// It cannot be a ring, or its memory is not there.
    pub(crate) fn new(
        place: Place,
        memory: &impl GuestMemory,
        next_available: u16,
        features: u64,
    ) -> Result<Self, Broken> {
        if !place.size.is_power_of_two() || place.size > MOST {
            return Err(Broken::Size(place.size));
        }
        let event_index = features & F_EVENT_IDX != 0;
        let parts = Parts::new(place, event_index, memory)?;
        let used = parts.used.load_u16(INDEX, Ordering::Acquire);
        Ok(Self {
            place,
            parts,
            next_available,
            next_used: used,
            published: used,
            notified: None,
            event_index,
            indirect: features & F_INDIRECT_DESC != 0,
        })
    }

    /// Looks for the ring again after the guest's memory has changed.
    ///
    /// # Errors
    /// It is not there any more.
    pub(crate) fn move_to(&mut self, memory: &impl GuestMemory) -> Result<(), Broken> {
        self.parts = Parts::new(self.place, self.event_index, memory)?;
        Ok(())
    }

    /// The number of descriptors.
    pub(crate) fn size(&self) -> u16 {
        self.place.size
    }

    /// The next entry of the available ring.
    pub(crate) fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Goes on from another entry of the available ring.
    pub(crate) fn set_next_available(&mut self, next: u16) {
        self.next_available = next;
    }

    /// The index of the used ring as the driver sees it.
    pub(crate) fn published(&self) -> u16 {
        self.published
    }

    /// Whether chains may go on in tables of their own.
    pub(super) fn has_indirect(&self) -> bool {
        self.indirect
    }

    /// How many chains the driver has made available that were not taken yet.
    ///
    /// # Errors
    /// More than there are descriptors.
    #[inline]
    pub(crate) fn available(&self) -> Result<u16, Broken> {
        let index = self.parts.available.load_u16(INDEX, Ordering::Acquire);
        let count = index.wrapping_sub(self.next_available);
        if count > self.place.size {
            return Err(Broken::AvailableIndex {
                from: self.next_available,
                to: index,
                size: self.place.size,
            });
        }
        Ok(count)
    }

    /// Takes the next chain, of which there has to be one, and gives its first descriptor.
    ///
    /// # Errors
    /// There is no such descriptor.
    #[inline]
    pub(crate) fn take(&mut self) -> Result<u16, Broken> {
        let entry = usize::from(self.next_available & (self.place.size - 1));
        let at = ENTRIES + AVAILABLE * entry;
        let head = self.parts.available.load_u16(at, Ordering::Relaxed);
        if head >= self.place.size {
            return Err(Broken::Descriptor(head));
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(head)
    }

    /// Reads a descriptor of the table.
    ///
    /// # Errors
    /// There is no such descriptor.
    #[inline]
    pub(super) fn descriptor(&self, index: u16) -> Result<Descriptor, Broken> {
        if index >= self.place.size {
            return Err(Broken::Descriptor(index));
        }
        let at = DESCRIPTOR * usize::from(index);
        let table = &self.parts.descriptors;
        let addr = table.load_u64(at, Ordering::Relaxed);
        let rest = table.load_u64(at + 8, Ordering::Relaxed);
        Ok(Descriptor::parse(addr, rest))
    }

    /// Gives a chain back, with the number of bytes written to it. The driver sees it after [`publish`](Self::publish).
    #[inline]
    pub(crate) fn give_back(&mut self, head: u16, written: u32) {
        let entry = usize::from(self.next_used & (self.place.size - 1));
        let at = ENTRIES + USED * entry;
        self.parts
            .used
            .store_u32(at, head.into(), Ordering::Relaxed);
        self.parts
            .used
            .store_u32(at + 4, written, Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver what was given back, and gives the entry of the used ring from which on that is, and their number.
    #[inline]
    pub(crate) fn publish(&mut self) -> (u16, u16) {
        let from = self.published;
        self.parts
            .used
            .store_u16(INDEX, self.next_used, Ordering::Release);
        self.published = self.next_used;
        (from, self.next_used.wrapping_sub(from))
    }

    /// Whether the driver wants to be notified of what was published since the last time this was asked (2.7.7).
    #[inline]
    pub(crate) fn wants_notification(&mut self) -> bool {
        let now = self.published;
        let before = self.notified.replace(now);
        fence(Ordering::SeqCst);
        if !self.event_index {
            let flags = self.parts.available.load_u16(0, Ordering::Relaxed);
            return flags & NO_INTERRUPT == 0;
        }
        let at = ENTRIES + AVAILABLE * usize::from(self.place.size);
        let event = self.parts.available.load_u16(at, Ordering::Relaxed);
        match before {
            Some(before) => now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before),
            None => true,
        }
    }

    /// Asks the driver to notify us of the next chain it makes available (2.7.10). It may have made one available before it sees this:
    /// [`available`](Self::available) has to be asked afterwards.
    #[inline]
    pub(crate) fn want_kicks(&mut self) {
        if self.event_index {
            let at = ENTRIES + USED * usize::from(self.place.size);
            self.parts
                .used
                .store_u16(at, self.next_available, Ordering::Relaxed);
        } else {
            self.parts.used.store_u16(0, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    /// Tells the driver that we look without being notified.
    #[inline]
    pub(crate) fn refuse_kicks(&mut self) {
        // An event index that stays behind does the same.
        if !self.event_index {
            self.parts.used.store_u16(0, NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Guest addresses and lengths of what `publish` made the device write: entries and index.
    pub(crate) fn written(&self, from: u16, count: u16) -> [(u64, u64); 3] {
        let size = self.place.size;
        let first = from & (size - 1);
        let before_wrap = count.min(size - first);
        let at = |entry: u16| self.place.used + (ENTRIES + USED * usize::from(entry)) as u64;
        let bytes = |count: u16| USED as u64 * u64::from(count);
        [
            (at(first), bytes(before_wrap)),
            (at(0), bytes(count - before_wrap)),
            (self.place.used, ENTRIES as u64),
        ]
    }
}
