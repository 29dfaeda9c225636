//! The other side of a queue: a driver with memory of its own, which keeps to the rules or breaks them as the test wants.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use stord_aio::IoBuffer;

use super::super::memory::mapping::{Mapping, Words};
use super::super::memory::{Access, GuestMap, Region};
use super::super::ring::split::Place;
use super::super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use crate::virtio::blk::config::F_FLUSH;
use crate::virtio::blk::queue::Notify;

/// The guest address of the first byte of memory.
pub(super) const BASE: u64 = 0x1_0000_0000;
pub(super) const RAM: usize = 16 << 20;
/// Where the parts of the ring are, from the beginning of the memory.
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x8000;
const USED: u64 = 0xa000;
/// Memory of requests: a piece for each.
const SLOTS: u64 = 0x10_0000;
const SLOT: u64 = 0x2000;
/// In a piece: the header, the status, and the data.
const STATUS_AT: u64 = 0x100;
const DATA_AT: u64 = 0x1000;
/// Nothing takes longer.
const PATIENCE: u16 = 20_000;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

pub(super) const FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_FLUSH;

/// A driver.
pub(super) struct Guest {
    pub(super) map: Arc<GuestMap>,
    pub(super) place: Place,
    pub(super) features: u64,
    pub(super) memory: IoBuffer,
    words: Words,
    /// The next entries of the rings.
    pub(super) available: u16,
    pub(super) used: u16,
    kick: EventFd,
    call: Arc<EventFd>,
    /// How often the driver was notified.
    notified: u64,
}

/// What a queue tells the driver with.
struct Call(Arc<EventFd>);

impl Notify for Call {
    fn notify(&self) {
        self.0.write(1).expect("it does not overflow");
    }
}

/// Makes shared memory, and maps it as a process does that serves it.
pub(super) fn shared(len: usize) -> (OwnedFd, Arc<Mapping>) {
    let file = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).expect("memory");
    ftruncate(&file, i64::try_from(len).expect("small")).expect("memory");
    let mapping = Mapping::new(file.as_fd(), 0, len, Access::Write).expect("it is mapped");
    (file, mapping)
}

impl Guest {
    /// A driver with an empty queue.
    pub(super) fn new(size: u16, features: u64) -> Self {
        Self::starting_at(size, features, 0)
    }

    /// The same with indexes that begin somewhere.
    pub(super) fn starting_at(size: u16, features: u64, index: u16) -> Self {
        let (_, mapping) = shared(RAM);
        let map = GuestMap::new();
        let region = Region {
            addr: BASE,
            len: RAM as u64,
            writable: true,
            mapping: Arc::clone(&mapping),
            offset: 0,
        };
        map.change(|regions| regions.insert(region)).expect("room");
        let memory = mapping.buffer();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let eventfd = || EventFd::from_flags(flags).expect("an eventfd");
        let guest = Self {
            map,
            place: Place {
                descriptors: BASE + DESCRIPTORS,
                available: BASE + AVAILABLE,
                used: BASE + USED,
                size,
            },
            features,
            words: Words::new(memory.clone(), 16).expect("pages"),
            memory,
            available: index,
            used: index,
            kick: eventfd(),
            call: Arc::new(eventfd()),
            notified: 0,
        };
        guest.put(AVAILABLE + 2, &index.to_le_bytes());
        guest.put(USED + 2, &index.to_le_bytes());
        guest
    }

    /// Goes on in other memory.
    pub(super) fn move_to(&mut self, memory: IoBuffer) {
        self.words = Words::new(memory.clone(), 16).expect("pages");
        self.memory = memory;
    }

    /// The descriptor that the queue waits for.
    pub(super) fn kick_fd(&self) -> OwnedFd {
        self.kick
            .as_fd()
            .try_clone_to_owned()
            .expect("a descriptor")
    }

    /// What notifies the driver.
    pub(super) fn call(&self) -> Box<dyn Notify + Send> {
        Box::new(Call(Arc::clone(&self.call)))
    }

    fn at(offset: u64) -> usize {
        usize::try_from(offset).expect("small")
    }

    /// Writes memory at an offset.
    pub(super) fn put(&self, offset: u64, bytes: &[u8]) {
        self.memory.write_at(Self::at(offset), bytes);
    }

    pub(super) fn get(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_at(Self::at(offset), &mut bytes);
        bytes
    }

    /// Where the data of a request is, from the beginning of the memory.
    pub(super) fn data_at(slot: u16) -> u64 {
        SLOTS + SLOT * u64::from(slot) + DATA_AT
    }

    fn slot_at(slot: u16) -> u64 {
        SLOTS + SLOT * u64::from(slot)
    }

    /// The guest address of a request's header, status byte and data.
    pub(super) fn addresses(slot: u16) -> (u64, u64, u64) {
        let at = BASE + Self::slot_at(slot);
        (at, at + STATUS_AT, at + DATA_AT)
    }

    /// Writes a descriptor of the table.
    pub(super) fn describe(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = DESCRIPTORS + 16 * u64::from(index);
        self.describe_at(at, addr, len, flags, next);
    }

    /// Writes a descriptor somewhere.
    pub(super) fn describe_at(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(at, &bytes);
    }

    /// Writes the header of a request, and a status that no device gives.
    pub(super) fn head(&self, slot: u16, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(Self::slot_at(slot), &header);
        self.put(Self::slot_at(slot) + STATUS_AT, &[0xaa]);
    }

    pub(super) fn status(&self, slot: u16) -> u8 {
        self.get(Self::slot_at(slot) + STATUS_AT, 1)[0]
    }

    /// Builds a request in descriptors 3 × slot and those after it, and gives the first. The data is there already, or comes there.
    pub(super) fn build(&self, slot: u16, kind: u32, sector: u64, len: u32) -> u16 {
        let first = 3 * slot;
        let (header, status, data) = Self::addresses(slot);
        self.head(slot, kind, sector);
        let is_read = matches!(kind, IN | GET_ID);
        self.describe(first, header, 16, NEXT, first + 1);
        if len > 0 {
            let flags = if is_read { NEXT | WRITE } else { NEXT };
            self.describe(first + 1, data, len, flags, first + 2);
            self.describe(first + 2, status, 1, WRITE, 0);
        } else {
            self.describe(first + 1, status, 1, WRITE, 0);
        }
        first
    }

    /// Makes a chain available, without a kick.
    pub(super) fn offer(&mut self, head: u16) {
        let entry = u64::from(self.available & (self.place.size - 1));
        self.put(AVAILABLE + 4 + 2 * entry, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    /// Writes the index of the available ring.
    pub(super) fn set_available(&self, index: u16) {
        let at = Self::at(AVAILABLE + 2);
        self.words.store_u16(at, index, Ordering::Release);
    }

    /// Kicks, whether or not the device wants it.
    pub(super) fn kick(&self) {
        self.kick.write(1).expect("it does not overflow");
    }

    /// Kicks if the device asks for it, given how many chains were offered since this was last called.
    pub(super) fn kick_if_wanted(&self, offered: u16) -> bool {
        fence(Ordering::SeqCst);
        let wanted = if self.features & F_EVENT_IDX != 0 {
            let at = Self::at(USED + 4 + 8 * u64::from(self.place.size));
            let event = self.words.load_u16(at, Ordering::Relaxed);
            self.available.wrapping_sub(event).wrapping_sub(1) < offered
        } else {
            self.words.load_u16(Self::at(USED), Ordering::Relaxed) & 1 == 0
        };
        if wanted {
            self.kick();
        }
        wanted
    }

    /// What came back since this was last called: first descriptors and lengths.
    pub(super) fn returned(&mut self) -> Vec<(u16, u32)> {
        let index = self.words.load_u16(Self::at(USED + 2), Ordering::Acquire);
        let mut returned = Vec::new();
        while self.used != index {
            let entry = u64::from(self.used & (self.place.size - 1));
            let at = Self::at(USED + 4 + 8 * entry);
            let id = self.words.load_u32(at, Ordering::Relaxed);
            let len = self.words.load_u32(at + 4, Ordering::Relaxed);
            returned.push((u16::try_from(id).expect("a descriptor"), len));
            self.used = self.used.wrapping_add(1);
        }
        returned
    }

    /// Waits until that many chains have come back, asleep between notifications.
    pub(super) fn wait(&mut self, count: usize) -> Vec<(u16, u32)> {
        let mut returned = self.returned();
        while returned.len() < count {
            if self.features & F_EVENT_IDX != 0 {
                let at = Self::at(AVAILABLE + 4 + 2 * u64::from(self.place.size));
                self.words.store_u16(at, self.used, Ordering::Relaxed);
                fence(Ordering::SeqCst);
            }
            let more = self.returned();
            if more.is_empty() {
                let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
                let ready = poll(&mut fds, PollTimeout::from(PATIENCE)).expect("poll");
                assert_eq!(ready, 1, "no notification: a chain or a wake-up got lost");
                self.notified += self.call.read().expect("it is ready");
            }
            returned.extend(more);
        }
        returned
    }

    /// How often the driver was notified so far.
    pub(super) fn notifications(&mut self) -> u64 {
        self.notified += self.call.read().unwrap_or(0);
        self.notified
    }

    /// Waits until the device has taken all that was offered and asks for a kick with the next.
    pub(super) fn until_asked(&self) {
        let at = Self::at(USED + 4 + 8 * u64::from(self.place.size));
        while self.words.load_u16(at, Ordering::Acquire) != self.available {
            std::thread::yield_now();
        }
    }

    /// Does one request by itself: its status, and the length that came back.
    pub(super) fn perform(&mut self, kind: u32, sector: u64, len: u32) -> (u8, u32) {
        let head = self.build(0, kind, sector, len);
        self.offer(head);
        self.kick();
        let returned = self.wait(1);
        assert_eq!(returned.len(), 1);
        assert_eq!(returned[0].0, head);
        (self.status(0), returned[0].1)
    }
}
