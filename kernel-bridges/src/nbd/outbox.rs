//! Replies on their way to a client.
//!
//! Short ones are put together in one piece of memory, the arena, and long ones stay where their data was read; all that is there
//! leaves with one system call. When the client does not take it all, what is left waits, and with it the arena.

use std::collections::VecDeque;
use std::ops::Range;

use stord_aio::{IoBuffer, IoVec};

/// The arena, in bytes.
const ARENA: usize = 128 << 10;
/// The most pieces that leave with one system call.
const PIECES: usize = 64;

/// A reply or a part of one.
enum Piece {
    /// Bytes of the arena.
    Arena(Range<usize>),
    /// Memory of its own. The whole of it can be used again when the piece has left.
    Payload {
        whole: IoBuffer,
        range: Range<usize>,
    },
    /// Memory of its own.
    Bytes(IoBuffer),
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Self::Arena(range) | Self::Payload { range, .. } => range.len(),
            Self::Bytes(bytes) => bytes.len(),
        }
    }
}

/// Replies in the order in which they leave.
pub(super) struct Outbox {
    arena: IoBuffer,
    /// Bytes of the arena that are in use.
    used: usize,
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that have left.
    sent: usize,
    /// Bytes that wait.
    bytes: usize,
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self {
            arena: IoBuffer::zeroed(ARENA),
            used: 0,
            pieces: VecDeque::new(),
            sent: 0,
            bytes: 0,
        }
    }

    /// Bytes that wait to be sent.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Free memory of the arena for a reply of `length` bytes, if there is so much.
    pub(super) fn reserve(&self, length: usize) -> Option<IoBuffer> {
        let end = self.used + length;
        (end <= ARENA).then(|| self.arena.slice(self.used..end))
    }

    /// Adds the bytes last reserved.
    pub(super) fn commit(&mut self, length: usize) {
        let range = self.used..self.used + length;
        self.used = range.end;
        self.bytes += length;
        match self.pieces.back_mut() {
            Some(Piece::Arena(last)) if last.end == range.start => last.end = range.end,
            _ => self.pieces.push_back(Piece::Arena(range)),
        }
    }

    /// Adds a short reply.
    pub(super) fn push(&mut self, reply: Vec<u8>) {
        match self.reserve(reply.len()) {
            Some(memory) => {
                memory.write_at(0, &reply);
                self.commit(reply.len());
            }
            None => {
                self.bytes += reply.len();
                self.pieces
                    .push_back(Piece::Bytes(IoBuffer::from_vec(reply)));
            }
        }
    }

    /// Adds a part of memory that is given back, by [`sent`](Self::sent), when it has left.
    pub(super) fn push_payload(&mut self, whole: IoBuffer, range: Range<usize>) {
        self.bytes += range.len();
        self.pieces.push_back(Piece::Payload { whole, range });
    }

    /// What leaves next.
    pub(super) fn front(&self) -> IoVec {
        let mut vector = IoVec::new();
        let mut skip = self.sent;
        for piece in self.pieces.iter().take(PIECES) {
            let memory = match piece {
                Piece::Arena(range) => self.arena.slice(range.start + skip..range.end),
                Piece::Payload { whole, range } => whole.slice(range.start + skip..range.end),
                Piece::Bytes(bytes) => bytes.slice(skip..bytes.len()),
            };
            skip = 0;
            vector.push(memory);
        }
        vector
    }

    /// Notes that `count` bytes have left. Memory that is free now goes to `free`.
    pub(super) fn sent(&mut self, count: usize, mut free: impl FnMut(IoBuffer)) {
        self.bytes -= count;
        self.sent += count;
        while let Some(piece) = self.pieces.front()
            && self.sent >= piece.len()
        {
            self.sent -= piece.len();
            if let Some(Piece::Payload { whole, .. }) = self.pieces.pop_front() {
                free(whole);
            }
        }
        if self.pieces.is_empty() {
            self.used = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_leave_in_their_order_however_little_is_taken() {
        let mut outbox = Outbox::new();
        let mut expected = Vec::new();
        for round in 0..40u8 {
            let reply = vec![round; 1000 + usize::from(round)];
            expected.extend_from_slice(&reply);
            outbox.push(reply);
            let whole = IoBuffer::zeroed(8192);
            whole.fill(200);
            expected.extend_from_slice(&[200; 5000]);
            outbox.push_payload(whole, 100..5100);
        }
        let mut taken = Vec::new();
        let mut given_back = 0;
        for step in 1.. {
            let front = outbox.front().to_vec();
            if front.is_empty() {
                break;
            }
            let count = (step * 911 % 7001 + 1).min(front.len());
            taken.extend_from_slice(&front[..count]);
            outbox.sent(count, |_| given_back += 1);
        }
        assert!(taken == expected);
        assert_eq!(given_back, 40);
        assert_eq!((outbox.bytes(), outbox.used), (0, 0));
    }

    #[test]
    fn full_arena_refuses() {
        let mut outbox = Outbox::new();
        assert!(outbox.reserve(ARENA).is_some());
        outbox.commit(ARENA);
        assert!(outbox.reserve(1).is_none());
        outbox.push(vec![1, 2, 3]);
        assert_eq!(outbox.bytes(), ARENA + 3);
        outbox.sent(ARENA + 3, drop);
        assert!(outbox.reserve(ARENA).is_some());
    }
}
