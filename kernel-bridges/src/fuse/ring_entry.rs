//! One entry of a FUSE-over-io_uring queue: memory shared with the kernel, in which a request arrives and its reply goes back.
//!
//! ```text
//!   0          header, 288 bytes: in/out header [128] | arguments of the operation [128] | flags, commit id, payload size
//!   4096       payload
//! ```
//!
//! The kernel writes to the memory from the submission of a command until its completion, and reads a reply from it during the
//! submission of the next; the rest of the time it is ours. An entry belongs to the context whose ring sent its last command. Between
//! two commands it can change to another ([`EntryParts`]): the kernel knows it by the request that is in it. An entry that was never
//! used takes no memory.

// UNSAFETY: the commands make the kernel use memory whose address only the command knows.
#![expect(unsafe_code, reason = "io_uring commands name memory by its address")]

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use stord_aio::{IoBuffer, SharedMemory, UringCmd, uring_cmd};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::abi::{
    CommandIn, InHeader, MAX_ARGUMENTS, OutHeader, RingEntryInOut, opcode, ring_command,
};
use super::buffers::MAX_PAYLOAD;
use super::entries::Then;
use super::held::Held;

const HEADER_LEN: usize = 288;
const ARGUMENTS_AT: usize = 128;
const IN_OUT_AT: usize = ARGUMENTS_AT + MAX_ARGUMENTS;
const PAYLOAD_AT: usize = 4096;

/// An entry on its context.
pub(super) struct RingEntry {
    parts: EntryParts,
    device: Rc<OwnedFd>,
    /// All of the memory, and its payload.
    memory: Rc<IoBuffer>,
    payload: IoBuffer,
}

/// An entry on its way between contexts, and what it is made of.
pub(super) struct EntryParts {
    /// The number of the kernel's queue.
    pub(super) queue: u16,
    memory: Arc<SharedMemory>,
    /// What the kernel calls the request that is in the memory.
    commit_id: u64,
}

/// Where the kernel finds the entry's memory; it reads this when the entry is registered.
struct Segments {
    list: [[u64; 2]; 2],
    #[expect(dead_code, reason = "it is kept, not used")]
    memory: Rc<IoBuffer>,
}

impl EntryParts {
    /// An entry of the kernel's queue number `queue`. `None` when there is no memory for it.
    pub(super) fn new(queue: u16) -> Option<Self> {
        Some(Self {
            queue,
            memory: SharedMemory::zeroed_apart(PAYLOAD_AT + MAX_PAYLOAD)?,
            commit_id: 0,
        })
    }
}

impl EntryParts {
    /// What another process needs besides the number of the queue: the address, and what the kernel calls the request.
    pub(super) fn address(&self) -> usize {
        self.memory.addr()
    }

    pub(super) fn commit_id(&self) -> u64 {
        self.commit_id
    }

    /// The header, and so much of the payload as it says that there is.
    pub(super) fn content(&self) -> Vec<u8> {
        let memory = self.memory.buffer();
        let mut content = vec![0; HEADER_LEN];
        memory.read_at(0, &mut content);
        let about = RingEntryInOut::read_from_prefix(&content[IN_OUT_AT..]);
        let payload = about.map_or(0, |(about, _)| about.payload_sz as usize);
        content.resize(HEADER_LEN + payload.min(memory.len() - PAYLOAD_AT), 0);
        memory.read_at(PAYLOAD_AT, &mut content[HEADER_LEN..]);
        content
    }

    /// An entry of another process, with memory at the same address and this in it. `None` where that is not to be had.
    pub(super) fn restore(
        queue: u16,
        address: usize,
        commit_id: u64,
        content: &[u8],
    ) -> Option<Self> {
        let (header, payload) = content.split_at_checked(HEADER_LEN)?;
        if payload.len() > MAX_PAYLOAD {
            return None;
        }
        let memory = SharedMemory::zeroed_at(address, PAYLOAD_AT + MAX_PAYLOAD)?;
        let buffer = memory.buffer();
        buffer.write_at(0, header);
        buffer.write_at(PAYLOAD_AT, payload);
        Some(Self {
            queue,
            memory,
            commit_id,
        })
    }
}

impl RingEntry {
    /// Brings an entry to the calling context, whose commands go to `device`.
    pub(super) fn new(parts: EntryParts, device: &Rc<OwnedFd>) -> Self {
        let memory = parts.memory.buffer();
        Self {
            parts,
            device: Rc::clone(device),
            payload: memory.slice(PAYLOAD_AT..memory.len()),
            memory: Rc::new(memory),
        }
    }

    /// Takes the entry from its context, and says what is to be done with it next. No command of it may be under way.
    pub(super) fn held(self, then: Then) -> Held {
        let parts = self.parts;
        Held { parts, then }
    }

    /// The number of the kernel's queue.
    pub(super) fn queue(&self) -> u16 {
        self.parts.queue
    }

    /// Where payloads are.
    pub(super) fn payload(&self) -> &IoBuffer {
        &self.payload
    }

    /// Makes the entry known to the kernel and waits for its first request. `None` without a ring.
    pub(super) fn register(&self) -> Option<UringCmd> {
        let segments = Rc::new(Segments {
            list: [
                [self.memory.addr() as u64, HEADER_LEN as u64],
                [self.payload.addr() as u64, self.payload.len() as u64],
            ],
            memory: Rc::clone(&self.memory),
        });
        let (addr, len) = ((&raw const segments.list).addr(), segments.list.len());
        // SAFETY: the segments, header and payload lie in `memory`, which the command keeps, as it keeps the list; the kernel writes
        // to the memory, which is only ever reached by copying, and not to the list.
        unsafe {
            uring_cmd(
                &self.device,
                ring_command::REGISTER,
                self.command(),
                addr as u64,
                u32::try_from(len).expect("two"),
                segments,
            )
        }
    }

    /// Sends the reply that was written with [`reply`](Self::reply), and waits for the next request.
    pub(super) fn commit(&self) -> Option<UringCmd> {
        // SAFETY: header and payload, known to the kernel since the entry was registered, lie in `memory`, which the command keeps; it
        // is only ever reached by copying.
        unsafe {
            uring_cmd(
                &self.device,
                ring_command::COMMIT_AND_FETCH,
                self.command(),
                0,
                0,
                Rc::clone(&self.memory) as _,
            )
        }
    }

    fn command(&self) -> [u8; 80] {
        let command = CommandIn {
            commit_id: self.parts.commit_id,
            qid: self.parts.queue,
            ..CommandIn::default()
        };
        let mut bytes = [0; 80];
        bytes[..size_of::<CommandIn>()].copy_from_slice(command.as_bytes());
        bytes
    }

    /// The request that has arrived: its header, the arguments of its operation, and the bytes of its payload.
    pub(super) fn request(&mut self) -> (InHeader, [u8; MAX_ARGUMENTS], u32) {
        let mut bytes = [0; HEADER_LEN];
        self.memory.read_at(0, &mut bytes);
        let Ok((header, _)) = InHeader::read_from_prefix(&bytes) else {
            unreachable!("the array is longer than the header");
        };
        let Ok((about, _)) = RingEntryInOut::read_from_prefix(&bytes[IN_OUT_AT..]) else {
            unreachable!("the array holds all three parts");
        };
        let mut arguments = [0; MAX_ARGUMENTS];
        if header.opcode == opcode::LOOKUP && about.payload_sz > 0 {
            // The name is no structure, and comes as payload.
            let len = arguments.len().min(about.payload_sz as usize);
            self.payload().read_at(0, &mut arguments[..len]);
        } else {
            arguments.copy_from_slice(&bytes[ARGUMENTS_AT..IN_OUT_AT]);
        }
        self.parts.commit_id = about.commit_id;
        (header, arguments, about.payload_sz)
    }

    /// Writes a reply's header; its other `length` bytes are at the start of the payload already.
    pub(super) fn reply(&self, header: &OutHeader, length: u32) {
        self.memory.write_at(0, header.as_bytes());
        let about = RingEntryInOut {
            commit_id: self.parts.commit_id,
            payload_sz: length,
            ..RingEntryInOut::default()
        };
        self.memory.write_at(IN_OUT_AT, about.as_bytes());
    }
}
