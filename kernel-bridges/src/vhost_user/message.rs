//! The messages of vhost-user, both ways: what arrives becomes a [`Request`] whose every field has been checked for its shape, with
//! the descriptors that belong to it; nothing else of a message gets further.
//!
//! The protocol is QEMU's document "Vhost-user Protocol". Numbers are in the byte order of the machine.

use std::os::fd::OwnedFd;

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The longest payload that any message of a disk has is below this.
pub(super) const MAX_PAYLOAD: usize = 4096;

/// A memory table set at once has at most so many regions.
pub(super) const MAX_TABLE: usize = 8;

/// The configuration space of a device has at most so many bytes.
const MAX_CONFIG: usize = 256;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const IS_REPLY: u32 = 1 << 2;
const NEEDS_REPLY: u32 = 1 << 3;

/// A descriptor was left out of a message that could have one.
const NO_DESCRIPTOR: u64 = 1 << 8;
const RING_MASK: u64 = 0xff;

bitflags! {
    /// What front end and back end can agree on beside the device's own features.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct ProtocolFeatures: u64 {
        const MQ = 1 << 0;
        const LOG_SHMFD = 1 << 1;
        const REPLY_ACK = 1 << 3;
        const BACKEND_REQ = 1 << 5;
        const CONFIG = 1 << 9;
        const INFLIGHT_SHMFD = 1 << 12;
        const RESET_DEVICE = 1 << 13;
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        const STATUS = 1 << 16;
    }
}

/// What every message begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) request: u32,
    flags: u32,
    size: u32,
}

impl Header {
    /// The header of an answer.
    pub(super) fn reply(request: u32, size: usize) -> Self {
        Self {
            request,
            flags: VERSION | IS_REPLY,
            size: u32::try_from(size).expect("answers are small"),
        }
    }

    /// The header of a message of ours, which asks for no answer.
    pub(super) fn notice(request: u32) -> Self {
        Self {
            request,
            flags: VERSION,
            size: 0,
        }
    }

    /// The length of the payload; `None` where this is no message of a front end.
    pub(super) fn payload(&self) -> Option<usize> {
        let size = usize::try_from(self.size).ok()?;
        let is_fit = self.flags & VERSION_MASK == VERSION && self.flags & IS_REPLY == 0;
        (is_fit && size <= MAX_PAYLOAD).then_some(size)
    }

    /// Whether the sender waits for a sign that the message was carried out.
    pub(super) fn wants_ack(&self) -> bool {
        self.flags & NEEDS_REPLY != 0
    }
}

/// A message as it came.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// A piece of the front end's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct MemoryRegion {
    /// Where the guest has it.
    pub(super) guest: u64,
    /// Bytes.
    pub(super) size: u64,
    /// Where the front end has it, by which it calls the parts of rings.
    pub(super) user: u64,
    /// Where it begins in its file, in bytes.
    pub(super) offset: u64,
}

/// A number that concerns a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RingState {
    pub(super) ring: u32,
    pub(super) number: u32,
}

/// Where the parts of a ring are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RingAddresses {
    pub(super) ring: u32,
    /// Whether changes of the used ring are to be logged. They are whenever anything is.
    pub(super) flags: u32,
    /// In the front end's memory, like the next two.
    pub(super) descriptors: u64,
    pub(super) used: u64,
    pub(super) available: u64,
    /// Where the guest has the used ring, for the log.
    pub(super) log: u64,
}

/// A piece of a file: of the log, or of what is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct FilePart {
    pub(super) size: u64,
    pub(super) offset: u64,
}

/// What is recorded of requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct InFlightShape {
    pub(super) part: FilePart,
    pub(super) rings: u16,
    pub(super) ring_size: u16,
    padding: u32,
}

impl InFlightShape {
    pub(super) fn new(part: FilePart, rings: u16, ring_size: u16) -> Self {
        Self {
            part,
            rings,
            ring_size,
            padding: 0,
        }
    }
}

/// Which bytes of the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct ConfigRange {
    pub(super) offset: u32,
    pub(super) size: u32,
    pub(super) flags: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SingleRegion {
    padding: u64,
    region: MemoryRegion,
}

/// The descriptors of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RingEvent {
    /// The front end has put something into the ring.
    Kick,
    /// The back end has.
    Call,
    /// The ring is broken.
    Error,
}

/// What a front end asks for.
#[derive(Debug)]
pub(super) enum Request {
    GetFeatures,
    SetFeatures(u64),
    /// Ours to be, or not any more: neither means anything.
    Owner,
    SetMemoryTable(Vec<(MemoryRegion, OwnedFd)>),
    SetLogBase(FilePart, OwnedFd),
    /// Who wants to hear of the log; nobody needs to.
    SetLogFd,
    SetRingSize(RingState),
    SetRingAddresses(RingAddresses),
    SetRingBase(RingState),
    GetRingBase(RingState),
    SetRingEvent(RingEvent, u32, Option<OwnedFd>),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNumber,
    EnableRing(RingState),
    SetBackendChannel(OwnedFd),
    GetConfig(ConfigRange),
    SetConfig(ConfigRange, Vec<u8>),
    ResetDevice,
    GetInFlight(InFlightShape),
    SetInFlight(InFlightShape, OwnedFd),
    GetMemorySlots,
    AddMemory(MemoryRegion, OwnedFd),
    RemoveMemory(MemoryRegion),
    SetStatus(u64),
    GetStatus,
}

/// The back end's side of the channel that it may ask things by.
pub(super) const CONFIG_CHANGED: u32 = 2;

/// Why a message cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("message {0} is none that a disk knows")]
    Unknown(u32),
    #[error("message {request} has a payload of {size} bytes, which is not its length")]
    Size { request: u32, size: usize },
    #[error("message {request} came with {count} descriptors, which is not its number")]
    Descriptors { request: u32, count: usize },
    #[error("the memory table has {0} regions")]
    Regions(u32),
}

impl Frame {
    /// Whether the sender waits for an answer of its own kind, whatever it says of acknowledgements.
    pub(super) fn has_reply(&self) -> bool {
        matches!(self.header.request, 1 | 11 | 15 | 17 | 24 | 31 | 36 | 40)
    }

    /// What the message says.
    ///
    /// # Errors
    /// No front end of a disk says that.
    pub(super) fn parse(self) -> Result<Request, Malformed> {
        let request = match self.header.request {
            1 => Request::GetFeatures,
            2 => Request::SetFeatures(self.payload()?),
            3 | 4 => Request::Owner,
            5 => return self.memory_table(),
            6 => Request::SetLogBase(self.payload()?, self.descriptor()?),
            7 => Request::SetLogFd,
            8 => Request::SetRingSize(self.payload()?),
            9 => Request::SetRingAddresses(self.payload()?),
            10 => Request::SetRingBase(self.payload()?),
            11 => Request::GetRingBase(self.payload()?),
            12 => return self.ring_event(RingEvent::Kick),
            13 => return self.ring_event(RingEvent::Call),
            14 => return self.ring_event(RingEvent::Error),
            15 => Request::GetProtocolFeatures,
            16 => Request::SetProtocolFeatures(self.payload()?),
            17 => Request::GetQueueNumber,
            18 => Request::EnableRing(self.payload()?),
            21 => Request::SetBackendChannel(self.descriptor()?),
            24 => Request::GetConfig(self.config()?.0),
            25 => {
                let (range, bytes) = self.config()?;
                Request::SetConfig(range, bytes)
            }
            31 => Request::GetInFlight(self.in_flight()?),
            32 => Request::SetInFlight(self.in_flight()?, self.descriptor()?),
            34 => Request::ResetDevice,
            36 => Request::GetMemorySlots,
            37 => {
                let SingleRegion { region, .. } = self.payload()?;
                Request::AddMemory(region, self.descriptor()?)
            }
            38 => {
                let SingleRegion { region, .. } = self.payload()?;
                Request::RemoveMemory(region)
            }
            39 => Request::SetStatus(self.payload()?),
            40 => Request::GetStatus,
            unknown => return Err(Malformed::Unknown(unknown)),
        };
        Ok(request)
    }

    fn bad_size(&self) -> Malformed {
        Malformed::Size {
            request: self.header.request,
            size: self.payload.len(),
        }
    }

    fn bad_descriptors(&self) -> Malformed {
        Malformed::Descriptors {
            request: self.header.request,
            count: self.descriptors.len(),
        }
    }

    fn payload<T: FromBytes>(&self) -> Result<T, Malformed> {
        T::read_from_bytes(&self.payload).map_err(|_| self.bad_size())
    }

    fn in_flight(&self) -> Result<InFlightShape, Malformed> {
        // Some leave the padding out.
        let mut bytes = self.payload.clone();
        if bytes.len() == size_of::<InFlightShape>() - size_of::<u32>() {
            bytes.extend_from_slice(&[0; size_of::<u32>()]);
        }
        InFlightShape::read_from_bytes(&bytes).map_err(|_| self.bad_size())
    }

    fn descriptor(mut self) -> Result<OwnedFd, Malformed> {
        match (self.descriptors.pop(), self.descriptors.is_empty()) {
            (Some(descriptor), true) => Ok(descriptor),
            (descriptor, _) => {
                self.descriptors.extend(descriptor);
                Err(self.bad_descriptors())
            }
        }
    }

    fn memory_table(self) -> Result<Request, Malformed> {
        #[derive(FromBytes, Immutable, KnownLayout)]
        #[repr(C)]
        struct Table {
            count: u32,
            padding: u32,
        }
        let (table, rest) = Table::ref_from_prefix(&self.payload).map_err(|_| self.bad_size())?;
        let count = usize::try_from(table.count).ok();
        let count = count.filter(|count| (1..=MAX_TABLE).contains(count));
        let count = count.ok_or(Malformed::Regions(table.count))?;
        let regions = rest.chunks(size_of::<MemoryRegion>()).take(count);
        let regions: Option<Vec<_>> = regions
            .map(|bytes| MemoryRegion::read_from_bytes(bytes).ok())
            .collect();
        // Some send room for all regions there could be.
        let regions = regions.filter(|regions| regions.len() == count);
        let regions = regions.ok_or_else(|| self.bad_size())?;
        if self.descriptors.len() != count {
            return Err(self.bad_descriptors());
        }
        let regions = regions.into_iter().zip(self.descriptors);
        Ok(Request::SetMemoryTable(regions.collect()))
    }

    fn ring_event(mut self, event: RingEvent) -> Result<Request, Malformed> {
        let word: u64 = self.payload()?;
        let ring = u32::try_from(word & RING_MASK).expect("eight bits");
        let expected = usize::from(word & NO_DESCRIPTOR == 0);
        if self.descriptors.len() != expected {
            return Err(self.bad_descriptors());
        }
        Ok(Request::SetRingEvent(event, ring, self.descriptors.pop()))
    }

    fn config(&self) -> Result<(ConfigRange, Vec<u8>), Malformed> {
        let parts = ConfigRange::read_from_prefix(&self.payload);
        let (range, bytes) = parts.map_err(|_| self.bad_size())?;
        let is_fit = usize::try_from(range.size) == Ok(bytes.len()) && bytes.len() <= MAX_CONFIG;
        if !is_fit {
            return Err(self.bad_size());
        }
        Ok((range, bytes.to_vec()))
    }
}
