//! Requests and replies, without their transport: what the kernel asks, in types, and what it is told.
//!
//! The payload of a READ or WRITE is not in here. It stays in memory that the transport owns, and both sides get the same view of it.

use stord_aio::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{
    CopyFileRangeIn, FallocateIn, IoctlIn, LseekIn, MAX_ARGUMENTS, OpenIn, ReadIn, ReleaseIn,
    SetattrIn, SetattrValid, WriteIn, opcode,
};

/// No file of ours has a longer name than this many bytes.
pub(super) const MAX_NAME: usize = 63;

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
    Open {
        /// As in open(2).
        flags: u32,
    },
    /// The last descriptor of an open file was closed.
    Close {
        /// What OPEN was answered with.
        handle: u64,
    },
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
    /// Bytes of this file for another, or another place in it.
    CopyFileRange(CopyFileRange),
    Ioctl {
        command: u32,
    },
    Statfs,
    /// `None` for a name that is too long for any file of ours.
    Lookup(Option<Name>),
    Opendir,
    Readdir {
        /// Entries seen already.
        offset: u64,
        /// The longest reply, in bytes.
        size: u32,
    },
    /// An entry of a directory is to be made, removed or renamed.
    ChangeDirectory,
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

/// A range of one file that is to be copied to another.
#[derive(Clone, Copy, Debug)]
pub(super) struct CopyFileRange {
    pub(super) from: u64,
    /// The node of the file to copy to.
    pub(super) target: u64,
    pub(super) to: u64,
    /// In bytes.
    pub(super) length: u64,
    /// The reply has 64 bits.
    pub(super) wide: bool,
}

/// The name of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name {
    len: usize,
    bytes: [u8; MAX_NAME],
}

impl Name {
    /// Reads a name that ends with a zero byte.
    fn parse(arguments: &[u8; MAX_ARGUMENTS]) -> Option<Self> {
        let len = arguments.iter().position(|byte| *byte == 0)?;
        let name = arguments.get(..len)?;
        let mut bytes = [0; MAX_NAME];
        bytes.get_mut(..len)?.copy_from_slice(name);
        Some(Self { len, bytes })
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
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
            opcode::OPEN => {
                let open: OpenIn = front(arguments);
                Self::Open { flags: open.flags }
            }
            opcode::RELEASE => {
                let release: ReleaseIn = front(arguments);
                Self::Close { handle: release.fh }
            }
            opcode::RELEASEDIR | opcode::DESTROY => Self::Release,
            opcode::FLUSH => Self::Flush,
            opcode::FSYNC | opcode::FSYNCDIR => Self::Fsync,
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
            opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64 => {
                let copy: CopyFileRangeIn = front(arguments);
                Self::CopyFileRange(CopyFileRange {
                    from: copy.off_in,
                    target: copy.nodeid_out,
                    to: copy.off_out,
                    length: copy.len,
                    wide: code == opcode::COPY_FILE_RANGE_64,
                })
            }
            opcode::IOCTL => {
                let ioctl: IoctlIn = front(arguments);
                Self::Ioctl { command: ioctl.cmd }
            }
            opcode::LOOKUP => Self::Lookup(Name::parse(arguments)),
            opcode::OPENDIR => Self::Opendir,
            opcode::READDIR => {
                let read: ReadIn = front(arguments);
                Self::Readdir {
                    offset: read.offset,
                    size: read.size,
                }
            }
            opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::CREATE
            | opcode::TMPFILE => Self::ChangeDirectory,
            opcode::FORGET | opcode::BATCH_FORGET => Self::Forget,
            _ => Self::Unknown,
        }
    }

    /// Bytes of payload that the request keeps in use while it runs.
    pub(super) fn payload(&self) -> u32 {
        match self {
            Self::Read { size, .. } | Self::Write { size, .. } | Self::Readdir { size, .. } => {
                *size
            }
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
    fn names_end_with_a_zero_byte() {
        let request = Request::parse(opcode::LOOKUP, &arguments(b"p1\0"));
        assert!(
            matches!(&request, Request::Lookup(Some(name)) if name.as_bytes() == b"p1"),
            "{request:?}"
        );
        let too_long = Request::parse(opcode::LOOKUP, &arguments(&[b'x'; MAX_NAME + 1]));
        assert!(matches!(too_long, Request::Lookup(None)), "{too_long:?}");
        let endless = Request::parse(opcode::LOOKUP, &[b'x'; MAX_ARGUMENTS]);
        assert!(matches!(endless, Request::Lookup(None)), "{endless:?}");
    }

    #[test]
    fn truncated_arguments_read_as_zeroes() {
        let request = Request::parse(opcode::READ, &[0; MAX_ARGUMENTS]);
        assert!(matches!(request, Request::Read { offset: 0, size: 0 }));
    }
}
