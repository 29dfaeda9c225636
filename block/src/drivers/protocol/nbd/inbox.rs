//! What a peer has sent and nobody has looked at yet.
//!
//! Messages come in one after the other, so many of them are received by one system call, and short payloads are used where they
//! were received. A long payload goes straight to memory of its own, but for its beginning.

use stord_aio::{IoBuffer, IoVec};

/// Bytes received at a time.
const SIZE: usize = 64 << 10;
/// With less room than this, what is left is moved to the front before more is received.
const MIN_ROOM: usize = 16 << 10;

/// Received bytes in their order.
pub struct Inbox {
    memory: IoBuffer,
    start: usize,
    end: usize,
}

impl Default for Inbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Inbox {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            memory: IoBuffer::zeroed(SIZE),
            start: 0,
            end: 0,
        }
    }

    /// Bytes that are there.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether so many bytes can ever be there at once.
    pub fn holds(len: usize) -> bool {
        len <= SIZE
    }

    /// Copies the first bytes and leaves them there.
    pub fn peek(&self, out: &mut [u8]) {
        self.memory.read_at(self.start, out);
    }

    /// Forgets the first `count` bytes.
    pub fn consume(&mut self, count: usize) {
        debug_assert!(count <= self.len(), "only what was received is consumed");
        self.start += count;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// The first `count` bytes where they lie, valid until the next call of [`room`](Self::room).
    pub fn front(&self, count: usize) -> IoBuffer {
        self.memory.slice(self.start..self.start + count)
    }

    /// Where the next bytes go. Moves what is there to the front if `wanted` bytes in all would not fit behind it.
    pub fn room(&mut self, wanted: usize) -> IoVec {
        let behind = SIZE - self.start;
        if self.start > 0 && (behind < wanted || SIZE - self.end < MIN_ROOM) {
            let mut kept = vec![0; self.len()];
            self.peek(&mut kept);
            self.memory.write_at(0, &kept);
            self.end = kept.len();
            self.start = 0;
        }
        self.memory.slice(self.end..SIZE).into()
    }

    /// Notes that `count` bytes came where [`room`](Self::room) said.
    pub fn received(&mut self, count: usize) {
        self.end += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in() {
        let mut inbox = Inbox::new();
        let mut sent = 0u8;
        let mut seen = 0u8;
        let mut total = 0;
        for round in 1..2000usize {
            let room = inbox.room(8);
            let count = (round * 7919 % 5000).min(usize::try_from(room.len()).expect("small"));
            let next = || {
                sent = sent.wrapping_add(1);
                sent
            };
            let bytes: Vec<u8> = std::iter::repeat_with(next).take(count).collect();
            room.write_at(0, &bytes);
            inbox.received(count);
            let take = (round * 104_729 % 5001).min(inbox.len());
            let mut out = vec![0; take];
            inbox.front(take).read_at(0, &mut out);
            for byte in out {
                seen = seen.wrapping_add(1);
                assert_eq!(byte, seen);
                total += 1;
            }
            inbox.consume(take);
        }
        assert!(total > 1_000_000);
    }
}
