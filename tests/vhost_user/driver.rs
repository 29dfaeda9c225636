//! A guest without a processor: its memory is a file, and its driver keeps virtqueues in it by reading and writing the file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::front_end::*;

/// Where the guest's memory begins for the guest, and for the front end.
pub const GUEST: u64 = 0x1_0000_0000;
pub const USER: u64 = 0x7f00_0000_0000;
/// Bytes of it.
pub const MEMORY: u64 = 64 << 20;

/// Every queue has so many entries.
pub const ENTRIES: u16 = 128;
/// A queue has so many bytes of the memory: its rings first, then its buffers.
const SHARE: u64 = 8 << 20;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Headers and status bytes of the requests.
const HEADERS: u64 = 0x10000;
const HEADER: u64 = 32;
const BUFFERS: u64 = 0x2_0000;
/// Every request has room for so many bytes.
pub const BUFFER: u64 = 48 << 10;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// A request that is under way uses the descriptors from three times its slot on.
const DESCRIPTORS: u16 = 3;
/// So many requests may be under way in a queue.
pub const SLOTS: u16 = ENTRIES / DESCRIPTORS;

/// The guest's memory.
pub struct Machine {
    pub memory: File,
}

impl Machine {
    pub fn new() -> Self {
        let memory = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).expect("memory");
        let memory = File::from(memory);
        memory.set_len(MEMORY).unwrap();
        Self { memory }
    }

    /// The payload of a message that gives the memory away.
    pub fn table(&self) -> Vec<u8> {
        let mut payload = words(&[1, 0]);
        payload.extend(longs(&[GUEST, MEMORY, USER, 0]));
        payload
    }

    /// Gives the memory to the other end.
    #[track_caller]
    pub fn share(&self, front: &mut FrontEnd) {
        front.order(SET_MEM_TABLE, &self.table(), &one(&self.memory));
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    pub fn read_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at, 2).try_into().unwrap())
    }
}

/// A virtqueue and its driver.
pub struct Queue {
    pub index: u32,
    /// Where its share of the memory begins.
    pub base: u64,
    pub kick: EventFd,
    pub call: EventFd,
    pub available: u16,
    pub used: u16,
}

impl Queue {
    /// A queue, empty. Nobody knows of it yet.
    pub fn new(machine: &Machine, index: u32) -> Self {
        let base = u64::from(index) * SHARE;
        machine.write(base, &[0; HEADERS as usize]);
        Self {
            index,
            base,
            kick: EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap(),
            call: EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap(),
            available: 0,
            used: 0,
        }
    }

    pub fn addresses(&self) -> Vec<u8> {
        self.addresses_with(0)
    }

    pub fn addresses_with(&self, flags: u32) -> Vec<u8> {
        let mut payload = words(&[self.index, flags]);
        let at = USER + self.base;
        let log = GUEST + self.base + USED;
        payload.extend(longs(&[at, at + USED, at + AVAILABLE, log]));
        payload
    }

    /// Sets the queue up at the other end, from entry `base` on, and starts it.
    #[track_caller]
    pub fn start(&self, front: &mut FrontEnd, base: u16) {
        let index = self.index;
        front.order(SET_VRING_NUM, &words(&[index, ENTRIES.into()]), &[]);
        front.order(SET_VRING_BASE, &words(&[index, base.into()]), &[]);
        front.order(SET_VRING_ADDR, &self.addresses(), &[]);
        let number = u64::from(index).to_ne_bytes();
        front.order(SET_VRING_CALL, &number, &one(&self.call));
        front.order(SET_VRING_KICK, &number, &one(&self.kick));
        front.order(SET_VRING_ENABLE, &words(&[index, 1]), &[]);
    }

    /// Stops the queue and gives the entry that it would have gone on with.
    #[track_caller]
    pub fn stop(&self, front: &mut FrontEnd) -> u32 {
        let reply = front.ask(GET_VRING_BASE, &words(&[self.index, 0]));
        u32::from_ne_bytes(reply.payload[4..8].try_into().unwrap())
    }

    pub fn buffer_at(&self, slot: u16) -> u64 {
        self.base + BUFFERS + u64::from(slot) * BUFFER
    }

    fn header_at(&self, slot: u16) -> u64 {
        self.base + HEADERS + u64::from(slot) * HEADER
    }

    /// Writes one descriptor.
    pub fn describe(
        &self,
        machine: &Machine,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        machine.write(self.base + u64::from(index) * 16, &bytes);
    }

    /// Makes a chain available that begins with this descriptor.
    pub fn offer(&mut self, machine: &Machine, head: u16) {
        let place = u64::from(self.available % ENTRIES);
        let ring = self.base + AVAILABLE;
        machine.write(ring + 4 + place * 2, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        machine.write(ring + 2, &self.available.to_le_bytes());
    }

    /// Puts a request into the ring: the data of a slot, from or to the disk.
    pub fn submit(&mut self, machine: &Machine, slot: u16, kind: u32, sector: u64, len: u32) {
        let header = self.header_at(slot);
        let mut bytes = words(&[kind, 0]);
        bytes.extend(sector.to_le_bytes());
        // A status that nobody gives.
        bytes.push(0xff);
        machine.write(header, &bytes);
        let first = slot * DESCRIPTORS;
        let is_read = matches!(kind, IN | GET_ID);
        let (data, status) = (first + 1, first + 2);
        let to_data = if len == 0 { status } else { data };
        self.describe(machine, first, GUEST + header, 16, NEXT, to_data);
        let direction = if is_read { WRITE } else { 0 };
        let buffer = GUEST + self.buffer_at(slot);
        self.describe(machine, data, buffer, len, NEXT | direction, status);
        self.describe(machine, status, GUEST + header + 16, 1, WRITE, 0);
        self.offer(machine, first);
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// How far the other end has come.
    pub fn used_index(&self, machine: &Machine) -> u16 {
        machine.read_u16(self.base + USED + 2)
    }

    /// The slots of the requests that have been completed since, with their status, waiting for the first.
    #[track_caller]
    pub fn complete(&mut self, machine: &Machine) -> Vec<(u16, u8)> {
        // A driver that wants to hear of the next one.
        loop {
            machine.write(
                self.base + AVAILABLE + 4 + u64::from(ENTRIES) * 2,
                &self.used.to_le_bytes(),
            );
            if self.used_index(machine) != self.used {
                break;
            }
            assert!(self.is_called(Duration::from_secs(30)), "a request is lost");
        }
        self.take_used(machine)
    }

    /// The same without waiting.
    pub fn take_used(&mut self, machine: &Machine) -> Vec<(u16, u8)> {
        let mut done = Vec::new();
        while self.used != self.used_index(machine) {
            let place = u64::from(self.used % ENTRIES);
            let entry = self.base + USED + 4 + place * 8;
            let head = u32::from_le_bytes(machine.read(entry, 4).try_into().unwrap());
            let slot = u16::try_from(head).unwrap() / DESCRIPTORS;
            let status = machine.read(self.header_at(slot) + 16, 1)[0];
            done.push((slot, status));
            self.used = self.used.wrapping_add(1);
        }
        done
    }

    /// Whether the other end calls within that time.
    pub fn is_called(&self, patience: Duration) -> bool {
        let timeout = PollTimeout::try_from(patience).unwrap();
        let mut polled = [PollFd::new(
            std::os::fd::AsFd::as_fd(&self.call),
            PollFlags::POLLIN,
        )];
        let is_called = poll(&mut polled, timeout).unwrap() == 1;
        if is_called {
            self.call.read().unwrap();
        }
        is_called
    }

    /// Carries one request out and gives its status.
    #[track_caller]
    pub fn carry_out(&mut self, machine: &Machine, kind: u32, sector: u64, len: u32) -> u8 {
        self.submit(machine, 0, kind, sector, len);
        self.kick();
        let done = self.complete(machine);
        assert_eq!(done.len(), 1);
        assert_eq!(done[0].0, 0);
        done[0].1
    }

    #[track_caller]
    pub fn write(&mut self, machine: &Machine, sector: u64, data: &[u8]) {
        machine.write(self.buffer_at(0), data);
        let len = u32::try_from(data.len()).unwrap();
        assert_eq!(self.carry_out(machine, OUT, sector, len), 0);
    }

    #[track_caller]
    pub fn read(&mut self, machine: &Machine, sector: u64, len: usize) -> Vec<u8> {
        machine.write(self.buffer_at(0), &vec![0xa5; len]);
        let bytes = u32::try_from(len).unwrap();
        assert_eq!(self.carry_out(machine, IN, sector, bytes), 0);
        machine.read(self.buffer_at(0), len)
    }
}
