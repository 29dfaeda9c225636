//! A split virtqueue (section 2.7 of the virtio specification), as the driver of a disk sees it.
//!
//! What the device writes is read once and never trusted: which requests it has, and where their parts are, is known here without a
//! look at the memory that it can change. It may complete what it was given, once; anything else breaks the queue.
//!
//! Requests have fixed places. Each is a chain of three descriptors that are written once: the header, the data, the status byte; with
//! indirect descriptors they are a table of the request's own, and the ring holds one descriptor for it.
//!
//! ```text
//! descriptors | available ring | used ring | places: table, header, segment, status | (page) data
//! ```

use std::sync::atomic::{Ordering, fence};

use stord_aio::IoBuffer;

/// The number of descriptors: every back end takes so many.
pub(super) const SIZE: u16 = 128;
/// The bytes of a queue's memory that are no data.
pub(super) const HEAD: usize = 32 << 10;

/// Descriptors of one request.
const CHAIN: u16 = 3;
const DESCRIPTOR: usize = 16;
const AVAILABLE: usize = DESCRIPTOR * SIZE as usize;
const USED: usize = (AVAILABLE + 6 + 2 * SIZE as usize).next_multiple_of(64);
const PLACES: usize = (USED + 6 + 8 * SIZE as usize).next_multiple_of(64);
const PLACE: usize = 128;
const _: () = assert!(PLACES + PLACE * SIZE as usize <= HEAD);

/// 2.7.6 and 2.7.8: flags, index, entries, and the event index behind them.
const INDEX: usize = 2;
const ENTRIES: usize = 4;
const USED_EVENT: usize = AVAILABLE + ENTRIES + 2 * SIZE as usize;
const AVAILABLE_EVENT: usize = USED + ENTRIES + 8 * SIZE as usize;
/// 2.7.8, `VIRTQ_USED_F_NO_NOTIFY`.
const NO_NOTIFY: u16 = 1;

/// In a place.
const HEADER: usize = 48;
const HEADER_LEN: u32 = 16;
const SEGMENT: usize = 64;
const SEGMENT_LEN: u32 = 16;
const STATUS: usize = 80;
/// No device says this.
const NO_STATUS: u8 = 0xff;

/// 2.7.5: flags of descriptors.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What was agreed on for every queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) indirect: bool,
    pub(super) event_index: bool,
}

impl Shape {
    /// How many requests fit.
    pub(super) fn places(self) -> u16 {
        if self.indirect { SIZE } else { SIZE / CHAIN }
    }
}

/// Where the parts of a ring are, in bytes from the beginning of the queue's memory.
pub(super) struct Parts {
    pub(super) descriptors: usize,
    pub(super) available: usize,
    pub(super) used: usize,
}

pub(super) const PARTS: Parts = Parts {
    descriptors: 0,
    available: AVAILABLE,
    used: USED,
};

/// What comes with a request beside its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payload {
    None,
    /// A range, for requests that move no data: sectors and flags.
    Segment {
        sector: u64,
        sectors: u32,
        flags: u32,
    },
    /// Data for the device, by offset in the queue's memory and length.
    ToDevice(usize, u32),
    /// Data from the device.
    FromDevice(usize, u32),
}

/// The device did what no device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("it completed {0} requests, which are more than it has")]
    TooMany(u16),
    #[error("it completed request {0}, which it does not have")]
    Unknown(u32),
}

/// The driver's side of a queue.
pub(super) struct Ring {
    memory: IoBuffer,
    /// What the device calls the first byte.
    base: u64,
    shape: Shape,
    /// Which places the device has.
    busy: Vec<bool>,
    in_flight: u16,
    /// The next entry of the available ring, and how far the device knows.
    next_available: u16,
    published: u16,
    /// The next entry of the used ring.
    next_used: u16,
}

impl Ring {
    /// Makes the ring in `memory`. `position` is how many requests the device has had before, none of which it has still.
    pub(super) fn new(memory: IoBuffer, base: u64, shape: Shape, position: u16) -> Self {
        let ring = Self {
            memory,
            base,
            shape,
            busy: vec![false; shape.places().into()],
            in_flight: 0,
            next_available: position,
            published: position,
            next_used: position,
        };
        for place in 0..shape.places() {
            let header = ring.place(place) + HEADER;
            let status = ring.place(place) + STATUS;
            let (table, first) = ring.chain(place);
            ring.describe(table, 0, header, HEADER_LEN, NEXT, first + 1);
            ring.describe(table, 2, status, 1, WRITE, 0);
            if shape.indirect {
                let at = usize::from(place) * DESCRIPTOR;
                let len = u32::from(CHAIN) * 16;
                ring.describe(at, 0, table, len, INDIRECT, 0);
            }
        }
        ring
    }

    fn place(&self, place: u16) -> usize {
        PLACES + usize::from(place) * PLACE
    }

    /// Where a request's descriptors are, and the number of the first of them in their table.
    fn chain(&self, place: u16) -> (usize, u16) {
        if self.shape.indirect {
            (self.place(place), 0)
        } else {
            let first = place * CHAIN;
            (usize::from(first) * DESCRIPTOR, first)
        }
    }

    fn describe(&self, table: usize, entry: usize, at: usize, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; DESCRIPTOR];
        bytes[..8].copy_from_slice(&(self.base + at as u64).to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_at(table + entry * DESCRIPTOR, &bytes);
    }

    /// Puts a request into a place that the device does not have. It learns of it from `publish`.
    pub(super) fn offer(&mut self, place: u16, kind: u32, sector: u64, payload: Payload) {
        let at = self.place(place);
        let mut header = [0; HEADER_LEN as usize];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_at(at + HEADER, &header);
        self.memory.write_at(at + STATUS, &[NO_STATUS]);
        let (table, first) = self.chain(place);
        let (status, data) = (first + 2, first + 1);
        let next = match payload {
            Payload::None => status,
            Payload::Segment {
                sector,
                sectors,
                flags,
            } => {
                let mut segment = [0; SEGMENT_LEN as usize];
                segment[..8].copy_from_slice(&sector.to_le_bytes());
                segment[8..12].copy_from_slice(&sectors.to_le_bytes());
                segment[12..].copy_from_slice(&flags.to_le_bytes());
                self.memory.write_at(at + SEGMENT, &segment);
                self.describe(table, 1, at + SEGMENT, SEGMENT_LEN, NEXT, status);
                data
            }
            Payload::ToDevice(from, len) => {
                self.describe(table, 1, from, len, NEXT, status);
                data
            }
            Payload::FromDevice(to, len) => {
                self.describe(table, 1, to, len, NEXT | WRITE, status);
                data
            }
        };
        self.describe(table, 0, at + HEADER, HEADER_LEN, NEXT, next);
        let head = if self.shape.indirect { place } else { first };
        let entry = AVAILABLE + ENTRIES + 2 * usize::from(self.next_available % SIZE);
        self.memory.store_u16(entry, head, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        self.busy[usize::from(place)] = true;
        self.in_flight += 1;
    }

    /// Shows the device what was offered. True if it wants to be told.
    pub(super) fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_available);
        if old == new {
            return false;
        }
        self.published = new;
        self.memory
            .store_u16(AVAILABLE + INDEX, new, Ordering::Release);
        // The index before the look at what the device wants, as the device has it the other way round.
        fence(Ordering::SeqCst);
        if self.shape.event_index {
            let event = self.memory.load_u16(AVAILABLE_EVENT, Ordering::Relaxed);
            // 2.7.10: the device wants to hear when the index passes this.
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.memory.load_u16(USED, Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    /// Whether the device has completed something that was not taken yet.
    pub(super) fn has_completions(&self) -> bool {
        self.memory.load_u16(USED + INDEX, Ordering::Acquire) != self.next_used
    }

    /// Takes what the device has completed next: the place, and the status byte.
    ///
    /// # Errors
    /// It completed what it does not have.
    pub(super) fn take(&mut self) -> Result<Option<(u16, u8)>, Broken> {
        let index = self.memory.load_u16(USED + INDEX, Ordering::Acquire);
        let count = index.wrapping_sub(self.next_used);
        if count == 0 {
            return Ok(None);
        }
        if count > self.in_flight {
            return Err(Broken::TooMany(count));
        }
        let entry = USED + ENTRIES + 8 * usize::from(self.next_used % SIZE);
        let head = self.memory.load_u32(entry, Ordering::Relaxed);
        // The length behind it says how much the device wrote. Nothing depends on it: the status says whether it was all.
        let place = self.place_of(head).ok_or(Broken::Unknown(head))?;
        let busy = self.busy.get_mut(usize::from(place));
        match busy {
            Some(busy) if *busy => *busy = false,
            _ => return Err(Broken::Unknown(head)),
        }
        self.in_flight -= 1;
        self.next_used = self.next_used.wrapping_add(1);
        let mut status = [NO_STATUS];
        self.memory.read_at(self.place(place) + STATUS, &mut status);
        Ok(Some((place, status[0])))
    }

    fn place_of(&self, head: u32) -> Option<u16> {
        let head = u16::try_from(head).ok()?;
        if self.shape.indirect {
            return Some(head);
        }
        head.is_multiple_of(CHAIN).then_some(head / CHAIN)
    }

    /// Asks the device to tell of the next completion. True if one has come meanwhile, of which it may not tell.
    pub(super) fn listen(&self) -> bool {
        if self.shape.event_index {
            self.memory
                .store_u16(USED_EVENT, self.next_used, Ordering::Relaxed);
            // The wish before the look at the index, as the device has it the other way round.
            fence(Ordering::SeqCst);
        }
        self.has_completions()
    }

    /// The numbers of the places that the device has.
    pub(super) fn busy(&self) -> impl Iterator<Item = u16> {
        (0u16..)
            .zip(&self.busy)
            .filter(|(_, busy)| **busy)
            .map(|(place, _)| place)
    }

    /// How many requests the device has had, if it has none any more.
    pub(super) fn position(&self) -> Option<u16> {
        (self.in_flight == 0 && self.next_used == self.next_available).then_some(self.next_used)
    }
}

#[cfg(test)]
mod tests;
