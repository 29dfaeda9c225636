//! Requests and replies, without their transport: what the kernel asks, in types, and what it is told.
//!
//! The payload of a READ or WRITE is not in here. It stays in memory that the transport owns, and both sides get the same view of it.

use stord_aio::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{
    FallocateIn, LseekIn, MAX_ARGUMENTS, ReadIn, SetattrIn, SetattrValid, WriteIn, opcode,
};

/// A request, with its numbers as the kernel sent them: nothing here has been checked.
#[derive(Clone, Copy, Debug)]
pub(super) enum Request {
    Read {
        offset: u64,
        /// Bytes wanted.
        size: u32,
    },
    Write {
        offset: u64,
        /// Bytes in the payload.
        size: u32,
    },
    Getattr,
    Setattr(Setattr),
    Open,
    /// Nothing to do, and success is the reply.
    Release,
    /// A descriptor of the file was closed.
    Flush,
    Fsync,
    Fallocate {
        offset: u64,
        length: u64,
        /// As in fallocate(2).
        mode: u32,
    },
    Lseek {
        offset: u64,
        /// As in lseek(2).
        whence: u32,
    },
    Statfs,
    Lookup,
    /// Nothing to do, and nobody waits for a reply.
    Forget,
    /// Shorter than it says.
    Malformed,
    /// Anything else, INTERRUPT among it: told that nobody implements it, the kernel asks no more.
    Unknown,
}

/// Attributes to be changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setattr {
    pub(super) valid: SetattrValid,
    /// Bits in `valid` that mean something to newer kernels only.
    pub(super) unknown: u32,
    pub(super) values: SetattrIn,
}

impl Request {
    /// Reads a request from its opcode and the bytes after its header, zero-filled to [`MAX_ARGUMENTS`].
    pub(super) fn parse(code: u32, arguments: &[u8; MAX_ARGUMENTS]) -> Self {
        match code {
            opcode::READ => {
                let read: ReadIn = front(arguments);
                Self::Read {
                    offset: read.offset,
                    size: read.size,
                }
            }
            opcode::WRITE => {
                let write: WriteIn = front(arguments);
                Self::Write {
                    offset: write.offset,
                    size: write.size,
                }
            }
            opcode::GETATTR => Self::Getattr,
            opcode::SETATTR => {
                let values: SetattrIn = front(arguments);
                let valid = SetattrValid::from_bits_truncate(values.valid);
                Self::Setattr(Setattr {
                    valid,
                    unknown: values.valid & !valid.bits(),
                    values,
                })
            }
            opcode::OPEN => Self::Open,
            opcode::RELEASE | opcode::DESTROY => Self::Release,
            opcode::FLUSH => Self::Flush,
            opcode::FSYNC => Self::Fsync,
            opcode::FALLOCATE => {
                let fallocate: FallocateIn = front(arguments);
                Self::Fallocate {
                    offset: fallocate.offset,
                    length: fallocate.length,
                    mode: fallocate.mode,
                }
            }
            opcode::LSEEK => {
                let lseek: LseekIn = front(arguments);
                Self::Lseek {
                    offset: lseek.offset,
                    whence: lseek.whence,
                }
            }
            opcode::STATFS => Self::Statfs,
            opcode::LOOKUP => Self::Lookup,
            opcode::FORGET | opcode::BATCH_FORGET => Self::Forget,
            _ => Self::Unknown,
        }
    }

    /// Bytes of payload that the request keeps in use while it runs.
    pub(super) fn payload(&self) -> u32 {
        match self {
            Self::Read { size, .. } | Self::Write { size, .. } => *size,
            _ => 0,
        }
    }
}

/// The structure at the start of the arguments.
fn front<T: FromBytes + Default>(arguments: &[u8; MAX_ARGUMENTS]) -> T {
    T::read_from_prefix(arguments)
        .map(|(value, _)| value)
        .unwrap_or_default()
}

/// What a request is answered with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reply {
    /// Success without more.
    Done,
    /// So many bytes at the start of the payload.
    Payload(u32),
    /// A structure.
    Bytes(ReplyBytes),
    /// Failure.
    Failed(Errno),
    /// No reply at all.
    Silence,
}

/// A structure of the wire format in a reply.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReplyBytes {
    len: usize,
    bytes: [u8; MAX_ARGUMENTS],
}

impl ReplyBytes {
    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Reply {
    /// A reply that is one structure.
    pub(super) fn of<T: IntoBytes + zerocopy::Immutable>(structure: &T) -> Self {
        const { assert!(size_of::<T>() <= MAX_ARGUMENTS, "larger than any reply") };
        let mut bytes = [0; MAX_ARGUMENTS];
        let len = size_of::<T>();
        bytes[..len].copy_from_slice(structure.as_bytes());
        Self::Bytes(ReplyBytes { len, bytes })
    }
}

impl From<Result<Reply, Errno>> for Reply {
    fn from(result: Result<Reply, Errno>) -> Self {
        result.unwrap_or_else(Reply::Failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(bytes: &[u8]) -> [u8; MAX_ARGUMENTS] {
        let mut arguments = [0; MAX_ARGUMENTS];
        arguments[..bytes.len()].copy_from_slice(bytes);
        arguments
    }

    #[test]
    fn a_write_is_read_from_its_arguments() {
        let write = WriteIn {
            offset: 0x1234_5678_9abc,
            size: 77,
            ..WriteIn::default()
        };
        let request = Request::parse(opcode::WRITE, &arguments(write.as_bytes()));
        assert!(
            matches!(
                request,
                Request::Write {
                    offset: 0x1234_5678_9abc,
                    size: 77
                }
            ),
            "{request:?}"
        );
        assert_eq!(request.payload(), 77);
    }

    #[test]
    fn unknown_bits_of_setattr_are_kept_apart() {
        let setattr = SetattrIn {
            valid: 0x8000_0000 | SetattrValid::SIZE.bits(),
            ..SetattrIn::default()
        };
        let Request::Setattr(setattr) =
            Request::parse(opcode::SETATTR, &arguments(setattr.as_bytes()))
        else {
            panic!("not a setattr");
        };
        assert_eq!(setattr.valid, SetattrValid::SIZE);
        assert_eq!(setattr.unknown, 0x8000_0000);
    }

    #[test]
    fn truncated_arguments_read_as_zeroes() {
        let request = Request::parse(opcode::READ, &[0; MAX_ARGUMENTS]);
        assert!(matches!(request, Request::Read { offset: 0, size: 0 }));
    }
}
