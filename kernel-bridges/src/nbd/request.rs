//! Requests as the wire has them.

use stord_block::drivers::protocol::nbd::wire::{
    Command, CommandFlags, CompactRequest, EXTENDED_REQUEST_MAGIC, ExtendedRequest, REQUEST_MAGIC,
};
use zerocopy::FromBytes as _;

use super::reply::Style;

/// The longest header of a request, in bytes.
pub(super) const MAX_HEADER: usize = size_of::<ExtendedRequest>();

/// A request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// [`Command`], if it is known.
    pub(super) kind: u16,
    pub(super) flags: CommandFlags,
    /// The client's mark, which the reply repeats.
    pub(super) cookie: u64,
    /// Where, in bytes.
    pub(super) offset: u64,
    /// How many bytes.
    pub(super) length: u64,
}

/// The bytes are no request: client and server have lost each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoRequest;

impl Request {
    /// Bytes that a header takes.
    pub(super) fn header_size(style: Style) -> usize {
        match style {
            Style::Simple | Style::Structured => size_of::<CompactRequest>(),
            Style::Extended => size_of::<ExtendedRequest>(),
        }
    }

    /// Reads the header at the start of `bytes`.
    pub(super) fn parse(style: Style, bytes: &[u8; MAX_HEADER]) -> Result<Self, NoRequest> {
        if style == Style::Extended {
            let Ok((header, _)) = ExtendedRequest::read_from_prefix(bytes) else {
                return Err(NoRequest);
            };
            if header.magic.get() != EXTENDED_REQUEST_MAGIC {
                return Err(NoRequest);
            }
            return Ok(Self {
                kind: header.kind.get(),
                flags: CommandFlags::from_bits_retain(header.flags.get()),
                cookie: header.cookie.get(),
                offset: header.offset.get(),
                length: header.length.get(),
            });
        }
        let Ok((header, _)) = CompactRequest::read_from_prefix(bytes) else {
            return Err(NoRequest);
        };
        if header.magic.get() != REQUEST_MAGIC {
            return Err(NoRequest);
        }
        Ok(Self {
            kind: header.kind.get(),
            flags: CommandFlags::from_bits_retain(header.flags.get()),
            cookie: header.cookie.get(),
            offset: header.offset.get(),
            length: header.length.get().into(),
        })
    }

    /// What it asks for, if that is known.
    pub(super) fn command(&self) -> Option<Command> {
        Command::from_number(self.kind)
    }

    /// Bytes of payload that follow the header.
    pub(super) fn payload(&self, style: Style) -> u64 {
        let has_payload = self.kind == Command::Write.number()
            || (style == Style::Extended && self.flags.contains(CommandFlags::PAYLOAD_LEN));
        if has_payload { self.length } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes as _;

    #[test]
    fn headers_are_told_by_their_magic() {
        let header = CompactRequest {
            magic: REQUEST_MAGIC.into(),
            flags: 1.into(),
            kind: 1.into(),
            cookie: 7.into(),
            offset: 4096.into(),
            length: 512.into(),
        };
        let mut bytes = [0; MAX_HEADER];
        bytes[..28].copy_from_slice(header.as_bytes());
        let request = Request::parse(Style::Structured, &bytes).expect("a request");
        assert_eq!(request.command(), Some(Command::Write));
        assert_eq!(
            (request.cookie, request.offset, request.length),
            (7, 4096, 512)
        );
        assert_eq!(request.payload(Style::Structured), 512);
        assert_eq!(Request::parse(Style::Extended, &bytes), Err(NoRequest));
        bytes[0] ^= 1;
        assert_eq!(Request::parse(Style::Simple, &bytes), Err(NoRequest));
    }
}
