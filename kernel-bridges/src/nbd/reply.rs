//! Replies as the wire has them, in the three styles that a client can have agreed on.

use stord_aio::Errno;
use stord_block::drivers::protocol::nbd::wire::{
    ChunkFlags, ChunkKind, EXTENDED_REPLY_MAGIC, ExtendedChunk, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, SimpleReply, StructuredChunk, error_number,
};
use zerocopy::IntoBytes as _;

use super::request::Request;

/// How replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// A header, and the data of a read.
    Simple,
    /// Chunks.
    Structured,
    /// Chunks with numbers of 64 bits; requests have them too.
    Extended,
}

/// The most bytes in front of the data of a read.
pub(super) const MAX_READ_HEADER: usize = size_of::<ExtendedChunk>() + size_of::<u64>();

/// Some bytes of a reply without payload.
pub(super) struct Head {
    bytes: [u8; MAX_READ_HEADER],
    length: usize,
}

impl Head {
    fn new() -> Self {
        Self {
            bytes: [0; MAX_READ_HEADER],
            length: 0,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }

    /// The bytes.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl Style {
    /// Bytes in front of the data of a read.
    pub(super) fn read_header_size(self) -> usize {
        match self {
            Self::Simple => size_of::<SimpleReply>(),
            Self::Structured => size_of::<StructuredChunk>() + size_of::<u64>(),
            Self::Extended => size_of::<ExtendedChunk>() + size_of::<u64>(),
        }
    }

    /// What comes in front of `length` bytes of data from `offset` on, which are all of the reply if `is_last`.
    pub(super) fn read_header(
        self,
        request: &Request,
        offset: u64,
        length: u32,
        is_last: bool,
    ) -> Head {
        if self == Self::Simple {
            return simple(request, None);
        }
        let flags = if is_last {
            ChunkFlags::DONE
        } else {
            ChunkFlags::empty()
        };
        let mut head = self.chunk(request, flags, ChunkKind::OffsetData, u64::from(length) + 8);
        head.push(&offset.to_be_bytes());
        head
    }

    /// A chunk that says `length` bytes from `offset` on are zeroes. Not for simple replies.
    pub(super) fn hole(
        self,
        request: &Request,
        offset: u64,
        length: u32,
        is_last: bool,
    ) -> Vec<u8> {
        let flags = if is_last {
            ChunkFlags::DONE
        } else {
            ChunkFlags::empty()
        };
        let mut head = self.chunk(request, flags, ChunkKind::OffsetHole, 12);
        head.push(&offset.to_be_bytes());
        let mut bytes = head.as_bytes().to_vec();
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes
    }

    /// A chunk with extents: their context, and then they. Not for simple replies.
    pub(super) fn status(self, request: &Request, data: &[u8], is_last: bool) -> Vec<u8> {
        let flags = if is_last {
            ChunkFlags::DONE
        } else {
            ChunkFlags::empty()
        };
        let kind = match self {
            Self::Simple | Self::Structured => ChunkKind::BlockStatus,
            Self::Extended => ChunkKind::BlockStatusExtended,
        };
        let head = self.chunk(request, flags, kind, data.len() as u64);
        [head.as_bytes(), data].concat()
    }

    /// The whole reply to a request that asked for no data, or failed.
    pub(super) fn result(self, request: &Request, result: Result<(), Errno>) -> Vec<u8> {
        if self == Self::Simple {
            return simple(request, result.err()).as_bytes().to_vec();
        }
        match result {
            Ok(()) => {
                let head = self.chunk(request, ChunkFlags::DONE, ChunkKind::None, 0);
                head.as_bytes().to_vec()
            }
            Err(errno) => {
                let text = errno.desc().as_bytes();
                let length = u16::try_from(text.len()).unwrap_or(0);
                let text = &text[..usize::from(length)];
                let size = 6 + u64::from(length);
                let head = self.chunk(request, ChunkFlags::DONE, ChunkKind::Error, size);
                let mut bytes = head.as_bytes().to_vec();
                bytes.extend_from_slice(&error_number(errno).to_be_bytes());
                bytes.extend_from_slice(&length.to_be_bytes());
                bytes.extend_from_slice(text);
                bytes
            }
        }
    }

    fn chunk(self, request: &Request, flags: ChunkFlags, kind: ChunkKind, length: u64) -> Head {
        let mut head = Head::new();
        if self == Self::Extended {
            let chunk = ExtendedChunk {
                magic: EXTENDED_REPLY_MAGIC.into(),
                flags: flags.bits().into(),
                kind: kind.number().into(),
                cookie: request.cookie.into(),
                offset: request.offset.into(),
                length: length.into(),
            };
            head.push(chunk.as_bytes());
        } else {
            let chunk = StructuredChunk {
                magic: STRUCTURED_REPLY_MAGIC.into(),
                flags: flags.bits().into(),
                kind: kind.number().into(),
                cookie: request.cookie.into(),
                length: u32::try_from(length)
                    .expect("a reply is at most the longest request and a header")
                    .into(),
            };
            head.push(chunk.as_bytes());
        }
        head
    }
}

fn simple(request: &Request, error: Option<Errno>) -> Head {
    let reply = SimpleReply {
        magic: SIMPLE_REPLY_MAGIC.into(),
        error: error.map_or(0, error_number).into(),
        cookie: request.cookie.into(),
    };
    let mut head = Head::new();
    head.push(reply.as_bytes());
    head
}

#[cfg(test)]
mod tests {
    use super::*;
    use stord_block::drivers::protocol::nbd::wire::CommandFlags;

    #[test]
    fn sizes_are_those_of_the_specification() {
        let request = Request {
            kind: 0,
            flags: CommandFlags::empty(),
            cookie: 7,
            offset: 512,
            length: 4096,
        };
        for (style, size) in [
            (Style::Simple, 16),
            (Style::Structured, 28),
            (Style::Extended, 40),
        ] {
            assert_eq!(style.read_header_size(), size);
            let head = style.read_header(&request, 512, 4096, true);
            assert_eq!(head.as_bytes().len(), size);
        }
        assert_eq!(Style::Structured.hole(&request, 512, 4096, true).len(), 32);
        let error = Style::Structured.result(&request, Err(Errno::EIO));
        // flags DONE, kind ERROR, then length of what follows.
        assert_eq!(error[4..8], [0, 1, 0x80, 1]);
        let length = u32::from_be_bytes([error[16], error[17], error[18], error[19]]);
        assert_eq!(error.len(), 20 + length as usize);
        assert_eq!(error[20..24], 5u32.to_be_bytes());
    }
}
