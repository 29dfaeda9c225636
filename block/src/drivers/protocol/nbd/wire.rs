//! The NBD protocol on the wire: what client and server both know of it.
//!
//! From the protocol's specification (doc/proto.md of the NBD project), its section names in parentheses. All numbers are big-endian.

use bitflags::bitflags;
use stord_aio::Errno;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// "NBDMAGIC", the first bytes of a server.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT", in front of every option, and second in the newstyle greeting.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// In front of the reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// In front of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// In front of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// In front of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// In front of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// In front of a chunk of an extended reply.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The most bytes that one request should carry or ask for, unless the other side says otherwise ("Block size constraints").
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// The longest string: the name or description of an export, the name of a metadata context ("String").
pub const MAX_STRING: usize = 4096;

/// Handshake flags of the server: it speaks the fixed newstyle handshake.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flags: the zeroes after the answer to `EXPORT_NAME` can be left out.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

bitflags! {
    /// What an export can do ("Transmission flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const HAS_FLAGS = 1 << 0;
        /// Writes are refused.
        const READ_ONLY = 1 << 1;
        /// `FLUSH` is known.
        const SEND_FLUSH = 1 << 2;
        /// The flag `FUA` is known.
        const SEND_FUA = 1 << 3;
        /// The medium turns.
        const ROTATIONAL = 1 << 4;
        /// `TRIM` is known.
        const SEND_TRIM = 1 << 5;
        /// `WRITE_ZEROES` is known.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// The flag `DF` is known.
        const SEND_DF = 1 << 7;
        /// Several connections see one coherent disk, and a flush of one covers the others.
        const CAN_MULTI_CONN = 1 << 8;
        /// `RESIZE` is known.
        const SEND_RESIZE = 1 << 9;
        /// `CACHE` is known.
        const SEND_CACHE = 1 << 10;
        /// The flag `FAST_ZERO` is known.
        const SEND_FAST_ZERO = 1 << 11;
        /// `BLOCK_STATUS` takes a payload.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }
}

bitflags! {
    /// Flags of a request ("Command flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Durable when the reply comes.
        const FUA = 1 << 0;
        /// Zeroes must take up space.
        const NO_HOLE = 1 << 1;
        /// The data must come in one chunk.
        const DF = 1 << 2;
        /// One extent is enough.
        const REQ_ONE = 1 << 3;
        /// Fail at once rather than write zeroes slowly.
        const FAST_ZERO = 1 << 4;
        /// The length is that of a payload (extended requests).
        const PAYLOAD_LEN = 1 << 5;
    }
}

bitflags! {
    /// Flags of a chunk of a reply.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ChunkFlags: u16 {
        /// The last chunk of its reply.
        const DONE = 1 << 0;
    }
}

/// Declares numbers of the wire with names.
macro_rules! numbers {
    ($(#[$doc:meta])* $name:ident: $raw:ty { $($(#[$member_doc:meta])* $member:ident = $value:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$member_doc])* $member,)* }

        impl $name {
            /// The number on the wire.
            pub const fn number(self) -> $raw {
                match self { $(Self::$member => $value,)* }
            }

            /// What a number of the wire stands for, if it is known.
            pub fn from_number(number: $raw) -> Option<Self> {
                [$(Self::$member),*].into_iter().find(|known| known.number() == number)
            }
        }
    };
}

numbers! {
    /// Options of the handshake ("Option types").
    OptionKind: u32 {
        /// Begin the transmission, in the old way that cannot fail nicely.
        ExportName = 1,
        /// End the connection.
        Abort = 2,
        /// List the exports.
        List = 3,
        /// Go on over TLS.
        StartTls = 5,
        /// Describe an export.
        Info = 6,
        /// Describe an export and begin the transmission.
        Go = 7,
        /// Use structured replies.
        StructuredReply = 8,
        /// List metadata contexts.
        ListMetaContext = 9,
        /// Choose metadata contexts.
        SetMetaContext = 10,
        /// Use extended requests and replies.
        ExtendedHeaders = 11,
    }
}

/// The bit that makes a reply to an option an error.
const ERROR_BIT: u32 = 1 << 31;

numbers! {
    /// Replies to an option ("Option reply types").
    OptionReply: u32 {
        /// Done.
        Ack = 1,
        /// One export of the list.
        Server = 2,
        /// One piece of the description.
        Info = 3,
        /// One metadata context.
        MetaContext = 4,
        /// The option is not known.
        Unsupported = ERROR_BIT | 1,
        /// Policy forbids it.
        Policy = ERROR_BIT | 2,
        /// The option is malformed.
        Invalid = ERROR_BIT | 3,
        /// The platform cannot.
        Platform = ERROR_BIT | 4,
        /// Not without TLS.
        TlsRequired = ERROR_BIT | 5,
        /// There is no such export.
        Unknown = ERROR_BIT | 6,
        /// The server is going down.
        Shutdown = ERROR_BIT | 7,
        /// Not without keeping to the block size.
        BlockSizeRequired = ERROR_BIT | 8,
        /// The option is too long.
        TooBig = ERROR_BIT | 9,
        /// Not without extended headers.
        ExtendedHeadersRequired = ERROR_BIT | 10,
    }
}

numbers! {
    /// Pieces of an export's description.
    InfoKind: u16 {
        /// Length and flags.
        Export = 0,
        /// The canonical name.
        Name = 1,
        /// The description for people.
        Description = 2,
        /// The block sizes.
        BlockSize = 3,
    }
}

numbers! {
    /// What a request asks for ("Request types").
    Command: u16 {
        /// Data.
        Read = 0,
        /// To store data.
        Write = 1,
        /// To end.
        Disconnect = 2,
        /// Durability of what was written.
        Flush = 3,
        /// To give space back.
        Trim = 4,
        /// To have data ready.
        Cache = 5,
        /// Zeroes.
        WriteZeroes = 6,
        /// What is where.
        BlockStatus = 7,
        /// Another length.
        Resize = 8,
    }
}

/// The bit that makes a chunk an error.
const CHUNK_ERROR_BIT: u16 = 1 << 15;

numbers! {
    /// Chunks of a reply ("Structured reply types").
    ChunkKind: u16 {
        /// Nothing but its flags.
        None = 0,
        /// Data at an offset.
        OffsetData = 1,
        /// Zeroes at an offset.
        OffsetHole = 2,
        /// Extents with lengths of 32 bits.
        BlockStatus = 5,
        /// Extents with lengths of 64 bits.
        BlockStatusExtended = 6,
        /// A failure.
        Error = CHUNK_ERROR_BIT | 1,
        /// A failure at an offset.
        ErrorOffset = CHUNK_ERROR_BIT | 2,
    }
}

impl ChunkKind {
    /// Whether a number stands for an error, known or not.
    pub const fn is_error(number: u16) -> bool {
        number & CHUNK_ERROR_BIT != 0
    }
}

/// The server's greeting ("Newstyle negotiation").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`INIT_MAGIC`].
    pub init: U64,
    /// [`OPTION_MAGIC`].
    pub option: U64,
    /// Handshake flags.
    pub flags: U16,
}

/// In front of an option.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// [`OptionKind`].
    pub kind: U32,
    /// Bytes that follow.
    pub length: U32,
}

/// In front of a reply to an option.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionReplyHeader {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The [`OptionKind`] replied to.
    pub option: U32,
    /// [`OptionReply`].
    pub reply: U32,
    /// Bytes that follow.
    pub length: U32,
}

/// Length and flags of an export, without the kind in front.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExportInfo {
    /// Bytes.
    pub size: U64,
    /// [`TransmissionFlags`].
    pub flags: U16,
}

/// The block sizes of an export in bytes, without the kind in front.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlockSizeInfo {
    /// Requests are multiples of this.
    pub minimum: U32,
    /// Requests of multiples of this are fast.
    pub preferred: U32,
    /// Requests carry no more.
    pub maximum: U32,
}

/// A request with a length of 32 bits.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CompactRequest {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// [`CommandFlags`].
    pub flags: U16,
    /// [`Command`].
    pub kind: U16,
    /// The client's mark, which the reply repeats.
    pub cookie: U64,
    /// Where, in bytes.
    pub offset: U64,
    /// How many bytes.
    pub length: U32,
}

/// A request with a length of 64 bits.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedRequest {
    /// [`EXTENDED_REQUEST_MAGIC`].
    pub magic: U32,
    /// [`CommandFlags`].
    pub flags: U16,
    /// [`Command`].
    pub kind: U16,
    /// The client's mark, which the reply repeats.
    pub cookie: U64,
    /// Where, in bytes.
    pub offset: U64,
    /// How many bytes, of the payload or of the effect.
    pub length: U64,
}

/// A simple reply; data follows a successful read.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// 0, or an error of the wire.
    pub error: U32,
    /// The request's mark.
    pub cookie: U64,
}

/// In front of a chunk of a structured reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct StructuredChunk {
    /// [`STRUCTURED_REPLY_MAGIC`].
    pub magic: U32,
    /// [`ChunkFlags`].
    pub flags: U16,
    /// [`ChunkKind`].
    pub kind: U16,
    /// The request's mark.
    pub cookie: U64,
    /// Bytes that follow.
    pub length: U32,
}

/// In front of a chunk of an extended reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedChunk {
    /// [`EXTENDED_REPLY_MAGIC`].
    pub magic: U32,
    /// [`ChunkFlags`].
    pub flags: U16,
    /// [`ChunkKind`].
    pub kind: U16,
    /// The request's mark.
    pub cookie: U64,
    /// The request's offset.
    pub offset: U64,
    /// Bytes that follow.
    pub length: U64,
}

/// An extent with a length of 32 bits.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Extent32 {
    /// Bytes.
    pub length: U32,
    /// What they are, in the context's terms.
    pub flags: U32,
}

/// An extent with a length of 64 bits.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Extent64 {
    /// Bytes.
    pub length: U64,
    /// What they are, in the context's terms.
    pub flags: U64,
}

/// The metadata context of what is allocated.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// In `base:allocation`: nothing is stored.
pub const STATE_HOLE: u32 = 1 << 0;
/// In `base:allocation`: reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;
/// QEMU's context of how deep in the backing chain data lies.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// QEMU's contexts of dirty bitmaps: this and the bitmap's name.
pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// In `qemu:dirty-bitmap:`: the bytes are dirty.
pub const STATE_DIRTY: u32 = 1 << 0;

/// The errors that the wire knows ("Error values"), each with its number there.
const ERRORS: [(u32, Errno); 9] = [
    (1, Errno::EPERM),
    (5, Errno::EIO),
    (12, Errno::ENOMEM),
    (22, Errno::EINVAL),
    (28, Errno::ENOSPC),
    (75, Errno::EOVERFLOW),
    (95, Errno::ENOTSUP),
    (108, Errno::ESHUTDOWN),
    (1, Errno::EROFS),
];

/// The number of an error on the wire; `EINVAL` for those it does not know.
pub fn error_number(errno: Errno) -> u32 {
    let errno = match errno {
        Errno::EFBIG | Errno::EDQUOT => Errno::ENOSPC,
        other => other,
    };
    let known = ERRORS.iter().find(|(_, known)| *known == errno);
    known.map_or(22, |(number, _)| *number)
}

/// The error of a number on the wire, which is not 0; `EINVAL` for those that are not known.
pub fn error_of(number: u32) -> Errno {
    let known = ERRORS.iter().find(|(known, _)| *known == number);
    known.map_or(Errno::EINVAL, |(_, errno)| *errno)
}

const _: () = {
    assert!(size_of::<Greeting>() == 18);
    assert!(size_of::<OptionHeader>() == 16);
    assert!(size_of::<OptionReplyHeader>() == 20);
    assert!(size_of::<CompactRequest>() == 28);
    assert!(size_of::<ExtendedRequest>() == 32);
    assert!(size_of::<SimpleReply>() == 16);
    assert!(size_of::<StructuredChunk>() == 20);
    assert!(size_of::<ExtendedChunk>() == 32);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_their_numbers() {
        assert_eq!(error_number(Errno::EROFS), 1);
        assert_eq!(error_number(Errno::EFBIG), 28);
        assert_eq!(error_number(Errno::ELOOP), 22);
        assert_eq!(error_of(28), Errno::ENOSPC);
        assert_eq!(error_of(1), Errno::EPERM);
        assert_eq!(error_of(1000), Errno::EINVAL);
    }

    #[test]
    fn numbers_of_the_wire_have_names() {
        assert_eq!(OptionKind::from_number(7), Some(OptionKind::Go));
        assert_eq!(OptionKind::from_number(4), None);
        assert_eq!(OptionReply::Unknown.number(), 0x8000_0006);
        assert!(ChunkKind::is_error(ChunkKind::ErrorOffset.number()));
        assert!(!ChunkKind::is_error(ChunkKind::OffsetHole.number()));
    }
}
