//! A split virtqueue, for devices that have no better: one chain of buffers at a time, copied from and to.
//!
//! Everything in the rings is the driver's to write. What does not fit (a descriptor that does not exist, a chain without end, an
//! address where nothing is) is an error, and the queue is not to be used any more then. See 2.7 of the virtio specification, version
//! 1.2. Not for [`FEATURE_RING_PACKED`](crate::FEATURE_RING_PACKED), nor for `VIRTIO_RING_F_EVENT_IDX`.

use std::io;
use std::sync::atomic::{Ordering, fence};

use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U32, U64};

use crate::device::{Device, QueueInfo};
use crate::memory::Memory;
use crate::message::QueueState;

const DESCRIPTOR: u64 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;

/// A descriptor, as it stands in memory.
#[derive(Clone, Copy, FromBytes)]
#[repr(C)]
struct Descriptor {
    address: U64,
    length: U32,
    flags: U16,
    next: U16,
}

/// A split virtqueue of a device.
#[derive(Debug)]
pub struct SplitQueue {
    index: u32,
    info: QueueInfo,
    size: u16,
    next_available: u16,
    next_used: u16,
}

/// A chain of buffers: a request of the driver and room for its answer.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: Vec<(u64, u32)>,
    writable: Vec<(u64, u32)>,
}

impl Chain {
    /// The buffers that the device reads, as addresses and lengths.
    pub fn readable(&self) -> &[(u64, u32)] {
        &self.readable
    }

    /// The buffers that the device writes, likewise.
    pub fn writable(&self) -> &[(u64, u32)] {
        &self.writable
    }
}

impl SplitQueue {
    /// The queue with that number, as the driver has set it up. What stands in the used ring is taken as done.
    ///
    /// # Errors
    /// It is not set up, or not so that it could work.
    pub fn new(device: &Device, memory: &mut Memory, index: u32) -> io::Result<Self> {
        let info = device.queue_info(index)?;
        let size = u16::try_from(info.size).unwrap_or(0);
        let QueueState::Split { next_available } = info.state else {
            return Err(invalid("the queue is a packed one"));
        };
        if !info.ready || !size.is_power_of_two() {
            return Err(invalid("the queue is not set up"));
        }
        let used = memory.find(device, info.device_area + 2, 2)?;
        let next_used = used.load_u16(info.device_area + 2);
        Ok(Self {
            index,
            info,
            size,
            next_available,
            next_used: next_used.ok_or_else(|| invalid("the used ring is not aligned"))?,
        })
    }

    /// How far it is, for [`Response::QueueState`](crate::Response::QueueState).
    pub fn state(&self) -> QueueState {
        QueueState::Split {
            next_available: self.next_available,
        }
    }

    /// Takes the next chain that the driver has made available.
    ///
    /// # Errors
    /// The driver has written what makes no sense.
    pub fn pop(&mut self, device: &Device, memory: &mut Memory) -> io::Result<Option<Chain>> {
        let ring = self.info.driver_area;
        let index = memory.find(device, ring + 2, 2)?.load_u16(ring + 2);
        let index = index.ok_or_else(|| invalid("the available ring is not aligned"))?;
        let waiting = index.wrapping_sub(self.next_available);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.size {
            return Err(invalid("more is available than the ring holds"));
        }
        let slot = u64::from(self.next_available % self.size);
        let mut head = U16::ZERO;
        memory.read(
            device,
            ring + 4 + 2 * slot,
            zerocopy::IntoBytes::as_mut_bytes(&mut head),
        )?;
        let chain = self.walk(device, memory, head.get())?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    fn walk(&self, device: &Device, memory: &mut Memory, head: u16) -> io::Result<Chain> {
        let mut chain = Chain {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let (mut table, mut entries) = (self.info.descriptors, u32::from(self.size));
        let (mut next, mut seen) = (u32::from(head), 0);
        loop {
            if next >= entries || seen >= entries {
                return Err(invalid("a chain leaves its table or has no end"));
            }
            let at = table.checked_add(DESCRIPTOR * u64::from(next));
            let at = at.ok_or_else(|| invalid("a table at the end of all addresses"))?;
            let mut bytes = [0; 16];
            memory.read(device, at, &mut bytes)?;
            let descriptor = Descriptor::read_from_bytes(&bytes).expect("as long");
            let flags = descriptor.flags.get();
            if flags & INDIRECT != 0 {
                if flags & NEXT != 0 || table != self.info.descriptors {
                    return Err(invalid("an indirect descriptor that may not be one"));
                }
                table = descriptor.address.get();
                entries = descriptor.length.get() / 16;
                (next, seen) = (0, 0);
                continue;
            }
            let piece = (descriptor.address.get(), descriptor.length.get());
            if flags & WRITE != 0 {
                chain.writable.push(piece);
            } else if chain.writable.is_empty() {
                chain.readable.push(piece);
            } else {
                return Err(invalid("something to read behind something to write"));
            }
            seen += 1;
            if flags & NEXT == 0 {
                return Ok(chain);
            }
            next = u32::from(descriptor.next.get());
        }
    }

    /// Gives a chain back, `written` bytes of which the device has written.
    ///
    /// # Errors
    /// The used ring is not where the driver said.
    pub fn push(
        &mut self,
        device: &Device,
        memory: &mut Memory,
        chain: &Chain,
        written: u32,
    ) -> io::Result<()> {
        let ring = self.info.device_area;
        let slot = u64::from(self.next_used % self.size);
        let entry = [u32::from(chain.head).to_le_bytes(), written.to_le_bytes()].concat();
        memory.write(device, ring + 4 + 8 * slot, &entry)?;
        self.next_used = self.next_used.wrapping_add(1);
        let mapping = memory.find(device, ring + 2, 2)?;
        if !mapping.store_u16(ring + 2, self.next_used) {
            return Err(invalid("the used ring cannot be written"));
        }
        Ok(())
    }

    /// Tells the driver what was pushed, unless it does not want to be told.
    ///
    /// # Errors
    /// There is no driver any more.
    pub fn notify(&self, device: &Device, memory: &mut Memory) -> io::Result<()> {
        // The driver first looks into the used ring after it has said that it wants to be told.
        fence(Ordering::SeqCst);
        let ring = self.info.driver_area;
        let flags = memory.find(device, ring, 2)?.load_u16(ring);
        if flags.is_some_and(|flags| flags & NO_INTERRUPT == 0) {
            device.inject_interrupt(self.index)?;
        }
        Ok(())
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
