//! Memory for requests: one buffer for each request in flight, made when needed and used again.
//!
//! A buffer holds a request and then its reply, so that both are one contiguous piece of memory, and so that the payload of a WRITE
//! and of a READ's reply begins at a page boundary, as direct I/O on the storage needs it:
//!
//! ```text
//!        4016        4056       4080      4096                    4096 + MAX_PAYLOAD
//!  unused | in header | arguments of WRITE | payload of WRITE ...
//!  unused                         | out header | payload of READ ...
//! ```
//!
//! Untouched pages take no memory, so that a small request costs two pages; pages that a large one touched are given back when the
//! queue has been idle for a while ([`Buffers::trim`]).

use std::cell::RefCell;

use stord_aio::{IoBuffer, IoVec};
use zerocopy::IntoBytes as _;

use super::abi::{InHeader, OutHeader, WriteIn};

/// The most bytes that one READ or WRITE moves.
pub(super) const MAX_PAYLOAD: usize = 1 << 20;
/// Where the payload begins.
const PAYLOAD_AT: usize = 4096;
/// Header and arguments of a WRITE are in front of its payload.
const REQUEST_AT: usize = PAYLOAD_AT - size_of::<InHeader>() - size_of::<WriteIn>();
const REPLY_AT: usize = PAYLOAD_AT - size_of::<OutHeader>();
/// Bytes in front of a WRITE's payload.
pub(super) const BEFORE_PAYLOAD: usize = PAYLOAD_AT - REQUEST_AT;
/// Buffers that stay when the queue is idle, and what each of them may have touched, in bytes.
const KEPT_IDLE: usize = 4;
const KEPT_TOUCHED: usize = 16 << 10;
/// More buffers than this are never kept.
const KEPT: usize = 64;

/// Memory for one request and its reply.
pub(super) struct RequestBuffer(Box<Parts>);

struct Parts {
    memory: IoBuffer,
    request: IoVec,
    payload: IoBuffer,
    /// Bytes of payload that have been used.
    touched: usize,
}

impl RequestBuffer {
    fn new() -> Self {
        let memory = IoBuffer::zeroed(PAYLOAD_AT + MAX_PAYLOAD);
        Self(Box::new(Parts {
            request: memory.slice(REQUEST_AT..memory.len()).into(),
            payload: memory.slice(PAYLOAD_AT..memory.len()),
            memory,
            touched: 0,
        }))
    }

    /// Where the device's next request goes.
    pub(super) fn request(&self) -> &IoVec {
        &self.0.request
    }

    /// Copies the beginning of the request.
    pub(super) fn read_request(&self, at: usize, out: &mut [u8]) {
        self.0.memory.read_at(REQUEST_AT + at, out);
    }

    /// Where payloads are.
    pub(super) fn payload(&self) -> &IoBuffer {
        &self.0.payload
    }

    /// Notes that so many bytes of payload have been used.
    pub(super) fn touch(&mut self, bytes: usize) {
        self.0.touched = self.0.touched.max(bytes);
    }

    /// Puts a header in front of the payload, of which `len` bytes belong to the reply. Gives the whole reply.
    pub(super) fn reply(&self, header: &OutHeader, len: usize) -> IoVec {
        self.0.memory.write_at(REPLY_AT, header.as_bytes());
        self.0.memory.slice(REPLY_AT..PAYLOAD_AT + len).into()
    }
}

/// The buffers of one queue that are not in use.
#[derive(Default)]
pub(super) struct Buffers {
    free: RefCell<Vec<RequestBuffer>>,
}

impl Buffers {
    /// Takes the buffer used last, whose memory is most likely in the processor's cache.
    pub(super) fn take(&self) -> RequestBuffer {
        let free = self.free.borrow_mut().pop();
        free.unwrap_or_else(RequestBuffer::new)
    }

    /// Gives a buffer back.
    pub(super) fn put(&self, buffer: RequestBuffer) {
        let mut free = self.free.borrow_mut();
        if free.len() < KEPT {
            free.push(buffer);
        }
    }

    /// Whether an idle queue would give memory back.
    pub(super) fn is_excessive(&self) -> bool {
        let free = self.free.borrow();
        free.len() > KEPT_IDLE || free.iter().any(|buffer| buffer.0.touched > KEPT_TOUCHED)
    }

    /// Gives back the memory that an idle queue does not need.
    pub(super) fn trim(&self) {
        let mut free = self.free.borrow_mut();
        free.retain(|buffer| buffer.0.touched <= KEPT_TOUCHED);
        free.truncate(KEPT_IDLE);
        free.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_aligned_and_follow_their_headers() {
        let buffer = RequestBuffer::new();
        assert_eq!(buffer.payload().addr() % 4096, 0);
        assert_eq!(buffer.payload().len(), MAX_PAYLOAD);
        assert_eq!(
            buffer.request().len(),
            (BEFORE_PAYLOAD + MAX_PAYLOAD) as u64
        );
        buffer.payload().write_at(0, b"data");
        let header = OutHeader {
            len: 20,
            error: -5,
            unique: 7,
        };
        let reply = buffer.reply(&header, 4).to_vec();
        assert_eq!(reply, [header.as_bytes(), b"data"].concat());
    }

    #[test]
    fn an_idle_queue_gives_large_buffers_back() {
        let buffers = Buffers::default();
        let mut large = buffers.take();
        large.touch(MAX_PAYLOAD);
        let small = buffers.take();
        buffers.put(large);
        buffers.put(small);
        assert!(buffers.is_excessive());
        buffers.trim();
        assert!(!buffers.is_excessive());
        assert_eq!(buffers.free.borrow().len(), 1);
    }

    #[test]
    fn the_buffer_used_last_is_used_next() {
        let buffers = Buffers::default();
        let (one, two) = (buffers.take(), buffers.take());
        let address = two.payload().addr();
        buffers.put(one);
        buffers.put(two);
        assert_eq!(buffers.take().payload().addr(), address);
    }
}
