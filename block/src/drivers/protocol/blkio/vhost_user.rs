//! Connecting to a vhost-user back end: from the path of a socket to queues that can be used.
//!
//! What the back end gets of this process is one piece of memory for rings and data, and two eventfds for each queue. It names
//! addresses from [`BASE`] on, which have nothing to do with ours.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use stord_aio::ExposedMemory;

use super::config::{CONFIG_LEN, Features, Terms};
use super::message::{
    Dialogue, MemoryTable, ProtocolFeatures, Request, RingAddresses, RingState, unfit,
};
use super::ring::{self, Shape};

/// What the device calls the first byte of the memory.
pub(super) const BASE: u64 = 1 << 32;
/// Bytes for data of the requests of a queue; memory is taken up where it was used once.
pub(super) const DATA: usize = 16 << 20;
/// Bytes of a queue, with its data.
pub(super) const QUEUE: usize = ring::HEAD + DATA;
/// The most queues that are used.
const MAX_QUEUES: u16 = 16;
/// The memory's length is a multiple of this, as those back ends want it that hand it on to devices.
const UNIT: usize = 2 << 20;
/// A back end that does not answer for so long is none.
const PATIENCE: Duration = Duration::from_secs(10);

const WANTED: Features = Features::SIZE_MAX
    .union(Features::RO)
    .union(Features::BLK_SIZE)
    .union(Features::FLUSH)
    .union(Features::CONFIG_WCE)
    .union(Features::MQ)
    .union(Features::DISCARD)
    .union(Features::WRITE_ZEROES)
    .union(Features::RING_INDIRECT_DESC)
    .union(Features::RING_EVENT_IDX)
    .union(Features::PROTOCOL)
    .union(Features::VERSION_1);

/// A back end that is ready for requests.
pub(super) struct Connected {
    pub(super) socket: UnixStream,
    /// By which the back end says something by itself.
    pub(super) channel: Option<UnixStream>,
    pub(super) terms: Terms,
    pub(super) shape: Shape,
    pub(super) memory: Arc<ExposedMemory>,
    pub(super) queues: Vec<Vacant>,
}

/// A queue that no context uses.
pub(super) struct Vacant {
    pub(super) index: usize,
    pub(super) kick: OwnedFd,
    pub(super) call: OwnedFd,
    /// How many requests it has had.
    pub(super) position: u16,
}

/// Connects to the back end that listens at `path`. Blocks.
///
/// # Errors
/// Nobody listens there, or not a disk that can be worked with.
pub(super) fn connect(path: &str) -> io::Result<Connected> {
    let socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut dialogue = Dialogue {
        socket,
        acknowledged: false,
    };
    let agreed = agree(&mut dialogue)?;
    let config = dialogue.ask_config(CONFIG_LEN)?;
    let terms = Terms::of(agreed.device, &config).map_err(|why| unfit(why.to_string()))?;
    let limit = if agreed.multiqueue {
        let queues = dialogue.ask(Request::GetQueueNumber)?;
        terms.queues.min(u16::try_from(queues).unwrap_or(u16::MAX))
    } else {
        1
    };
    if limit == 0 {
        return Err(unfit("the back end has no queue"));
    }
    // QEMU's back end ends the connection when its disk changes and there is no such channel.
    let channel = if agreed.channel {
        let (ours, theirs) = UnixStream::pair()?;
        dialogue.tell(Request::SetBackendChannel, &[0_u8; 0], Some(theirs.as_fd()))?;
        Some(ours)
    } else {
        None
    };
    let count = usize::from(limit.min(MAX_QUEUES));
    let memory = share_memory(&dialogue, count)?;
    let queues: io::Result<Vec<_>> = (0..count).map(|index| start(&dialogue, index)).collect();
    let queues = queues?;
    dialogue.socket.set_read_timeout(None)?;
    dialogue.socket.set_write_timeout(None)?;
    Ok(Connected {
        socket: dialogue.socket,
        channel,
        terms,
        shape: Shape {
            indirect: agreed.device.contains(Features::RING_INDIRECT_DESC),
            event_index: agreed.device.contains(Features::RING_EVENT_IDX),
        },
        memory,
        queues,
    })
}

struct Agreed {
    device: Features,
    multiqueue: bool,
    channel: bool,
}

fn agree(dialogue: &mut Dialogue) -> io::Result<Agreed> {
    dialogue.tell(Request::SetOwner, &[0_u8; 0], None)?;
    let offered = Features::from_bits_retain(dialogue.ask(Request::GetFeatures)?);
    if !offered.contains(Features::VERSION_1) {
        return Err(unfit("the back end's device is older than virtio 1.0"));
    }
    if !offered.contains(Features::PROTOCOL) {
        return Err(unfit("Backend doesn't support PROTOCOL_FEATURES"));
    }
    let device = offered & WANTED;
    let offered = ProtocolFeatures::from_bits_retain(dialogue.ask(Request::GetProtocolFeatures)?);
    let protocol = offered & ProtocolFeatures::all();
    if !protocol.contains(ProtocolFeatures::CONFIG) {
        return Err(unfit("Backend doesn't support required protocol features"));
    }
    dialogue.tell(Request::SetProtocolFeatures, &protocol.bits(), None)?;
    dialogue.acknowledged = protocol.contains(ProtocolFeatures::REPLY_ACK);
    dialogue.tell(Request::SetFeatures, &device.bits(), None)?;
    Ok(Agreed {
        device,
        multiqueue: protocol.contains(ProtocolFeatures::MQ),
        channel: protocol.contains(ProtocolFeatures::BACKEND_REQ),
    })
}

fn share_memory(dialogue: &Dialogue, queues: usize) -> io::Result<Arc<ExposedMemory>> {
    let len = (QUEUE * queues).next_multiple_of(UNIT);
    let memory = ExposedMemory::new(c"stord-virtio-blk", len)?;
    let table = MemoryTable {
        count: 1,
        padding: 0,
        guest: BASE,
        size: len as u64,
        user: BASE,
        offset: 0,
    };
    dialogue.tell(Request::SetMemoryTable, &table, Some(memory.file()))?;
    Ok(memory)
}

/// What the device calls the first byte of a queue.
pub(super) fn base_of(index: usize) -> u64 {
    BASE + (index * QUEUE) as u64
}

fn start(dialogue: &Dialogue, index: usize) -> io::Result<Vacant> {
    let ring = u32::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
    let event = || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
    let (kick, call) = (OwnedFd::from(event()?), OwnedFd::from(event()?));
    let state = |number| RingState { ring, number };
    dialogue.tell(Request::SetRingSize, &state(ring::SIZE.into()), None)?;
    dialogue.tell(Request::SetRingBase, &state(0), None)?;
    let base = base_of(index);
    let addresses = RingAddresses {
        ring,
        flags: 0,
        descriptors: base + ring::PARTS.descriptors as u64,
        used: base + ring::PARTS.used as u64,
        available: base + ring::PARTS.available as u64,
        log: 0,
    };
    dialogue.tell(Request::SetRingAddresses, &addresses, None)?;
    let number = u64::from(ring);
    dialogue.tell(Request::SetCall, &number, Some(call.as_fd()))?;
    dialogue.tell(Request::SetKick, &number, Some(kick.as_fd()))?;
    dialogue.tell(Request::EnableRing, &state(1), None)?;
    Ok(Vacant {
        index,
        kick,
        call,
        position: 0,
    })
}
