//! One entry of a FUSE-over-io_uring queue: memory shared with the kernel, in which a request arrives and its reply goes back.
//!
//! ```text
//!   0          two segments that tell the kernel where header and payload are
//!   64         header, 288 bytes: in/out header [128] | arguments of the operation [128] | flags, commit id, payload size
//!   4096       payload
//! ```
//!
//! The kernel writes to the memory from the submission of a command until its completion, and reads a reply from it during the
//! submission of the next; the rest of the time it is ours.

// UNSAFETY: the commands make the kernel use memory whose address only the command knows.
#![expect(unsafe_code, reason = "io_uring commands name memory by its address")]

use std::os::fd::OwnedFd;
use std::rc::Rc;

use stord_aio::{IoBuffer, UringCmd, uring_cmd};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::abi::{CommandIn, InHeader, MAX_ARGUMENTS, OutHeader, RingEntryInOut, ring_command};

const HEADER_AT: usize = 64;
const ARGUMENTS_AT: usize = HEADER_AT + 128;
const IN_OUT_AT: usize = ARGUMENTS_AT + 128;
const HEADER_LEN: usize = 288;
const PAYLOAD_AT: usize = 4096;
/// Header and payload.
const SEGMENTS: u32 = 2;

/// Memory and identity of one entry.
pub(super) struct RingEntry {
    device: Rc<OwnedFd>,
    queue: u16,
    memory: Rc<IoBuffer>,
    payload: IoBuffer,
    /// What the kernel calls the request that is in the memory.
    commit_id: u64,
}

impl RingEntry {
    /// An entry of the kernel's queue number `queue`.
    pub(super) fn new(device: &Rc<OwnedFd>, queue: u16, payload: usize) -> Self {
        let memory = IoBuffer::zeroed(PAYLOAD_AT + payload);
        Self {
            device: Rc::clone(device),
            queue,
            payload: memory.slice(PAYLOAD_AT..memory.len()),
            memory: Rc::new(memory),
            commit_id: 0,
        }
    }

    /// Where payloads are.
    pub(super) fn payload(&self) -> &IoBuffer {
        &self.payload
    }

    /// Makes the entry known to the kernel and waits for its first request. `None` without a ring.
    pub(super) fn register(&self) -> Option<UringCmd> {
        let segment = |at: usize, len: usize| [(self.memory.addr() + at) as u64, len as u64];
        let segments = [
            segment(HEADER_AT, HEADER_LEN),
            segment(PAYLOAD_AT, self.payload.len()),
        ];
        self.memory.write_at(0, segments.as_bytes());
        self.submit(ring_command::REGISTER, 0, SEGMENTS)
    }

    /// Sends the reply that was written with [`reply`](Self::reply), and waits for the next request.
    pub(super) fn commit(&self) -> Option<UringCmd> {
        self.submit(ring_command::COMMIT_AND_FETCH, self.commit_id, 0)
    }

    fn submit(&self, operation: u32, commit_id: u64, len: u32) -> Option<UringCmd> {
        let command = CommandIn {
            commit_id,
            qid: self.queue,
            ..CommandIn::default()
        };
        let mut bytes = [0; 80];
        bytes[..size_of::<CommandIn>()].copy_from_slice(command.as_bytes());
        let addr = if len == 0 {
            0
        } else {
            self.memory.addr() as u64
        };
        // SAFETY: the segments, header and payload lie in `memory`, which the command keeps; it is only ever reached by copying.
        unsafe {
            uring_cmd(
                &self.device,
                operation,
                bytes,
                addr,
                len,
                Rc::clone(&self.memory) as _,
            )
        }
    }

    /// The request that has arrived: its header, the arguments of its operation, and the bytes of its payload.
    pub(super) fn request(&mut self) -> (InHeader, [u8; MAX_ARGUMENTS], u32) {
        let mut bytes = [0; HEADER_LEN];
        self.memory.read_at(HEADER_AT, &mut bytes);
        let Ok((header, _)) = InHeader::read_from_prefix(&bytes) else {
            unreachable!("the array is longer than the header");
        };
        let Ok((about, _)) = RingEntryInOut::read_from_prefix(&bytes[IN_OUT_AT - HEADER_AT..])
        else {
            unreachable!("the array holds all three parts");
        };
        let mut arguments = [0; MAX_ARGUMENTS];
        arguments.copy_from_slice(&bytes[ARGUMENTS_AT - HEADER_AT..IN_OUT_AT - HEADER_AT]);
        self.commit_id = about.commit_id;
        (header, arguments, about.payload_sz)
    }

    /// Writes a reply's header; its other `length` bytes are at the start of the payload already.
    pub(super) fn reply(&self, header: &OutHeader, length: u32) {
        self.memory.write_at(HEADER_AT, header.as_bytes());
        let about = RingEntryInOut {
            commit_id: self.commit_id,
            payload_sz: length,
            ..RingEntryInOut::default()
        };
        self.memory.write_at(IN_OUT_AT, about.as_bytes());
    }
}
