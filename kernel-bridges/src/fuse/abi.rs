//! The kernel's FUSE wire format, as far as a file system of one regular file needs it.
//!
//! Layouts and numbers are those of `include/uapi/linux/fuse.h` (protocol 7.31 to 7.45), in native byte order. Every structure is plain
//! bytes: reading one from a request cannot fail but for want of bytes, and whatever the bytes say is checked by who uses them.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol's major version.
pub(super) const MAJOR: u32 = 7;
/// The minor version spoken here.
pub(super) const MINOR: u32 = 45;
/// The oldest minor version that is accepted: Linux 5.4.
pub(super) const OLDEST_MINOR: u32 = 31;
/// The node id of the root, which is the exported file itself.
pub(super) const ROOT_ID: u64 = 1;
/// Reads from the device need room for at least so many bytes.
pub(super) const MIN_READ_BUFFER: usize = 8192;
/// No request has more bytes of arguments than this in front of its payload.
pub(super) const MAX_ARGUMENTS: usize = 128;

/// The operations that the kernel asks for.
pub(super) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const TMPFILE: u32 = 51;
    /// Linux 6.18: the same with room for all of the answer.
    pub(crate) const COPY_FILE_RANGE_64: u32 = 53;
}

/// A message to the kernel that no request asked for; goes into [`OutHeader::error`].
pub(super) const NOTIFY_INVAL_INODE: i32 = 2;
/// The like: what has been fetched and not answered is to be handed out again (Linux 6.9).
pub(super) const NOTIFY_RESEND: i32 = 7;

/// Commands of FUSE over io_uring (Linux 6.14).
pub(super) mod ring_command {
    /// Makes an entry known, and fetches its first request.
    pub(crate) const REGISTER: u32 = 1;
    /// Gives a reply in exchange for the next request.
    pub(crate) const COMMIT_AND_FETCH: u32 = 2;
}

bitflags! {
    /// What kernel and daemon agree upon in INIT; bits from 32 on travel in `flags2`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct InitFlags: u64 {
        const ASYNC_READ = 1;
        /// OPEN carries O_TRUNC, so that a file system can ignore it.
        const ATOMIC_O_TRUNC = 1 << 3;
        const BIG_WRITES = 1 << 5;
        /// Direct I/O requests run in parallel.
        const ASYNC_DIO = 1 << 15;
        const MAX_PAGES = 1 << 22;
        /// `flags2` is there.
        const INIT_EXT = 1 << 30;
        /// Shared mappings of files opened with DIRECT_IO.
        const DIRECT_IO_ALLOW_MMAP = 1 << 36;
        /// The kernel may read and write files of other file systems for us.
        const PASSTHROUGH = 1 << 37;
        const OVER_IO_URING = 1 << 41;
    }
}

bitflags! {
    /// What a SETATTR request changes.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct SetattrValid: u32 {
        const MODE = 1;
        const UID = 1 << 1;
        const GID = 1 << 2;
        const SIZE = 1 << 3;
        const ATIME = 1 << 4;
        const MTIME = 1 << 5;
        const FH = 1 << 6;
        const ATIME_NOW = 1 << 7;
        const MTIME_NOW = 1 << 8;
        const LOCKOWNER = 1 << 9;
        const CTIME = 1 << 10;
    }
}

bitflags! {
    /// How an opened file behaves.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct OpenFlags: u32 {
        /// Past the page cache.
        const DIRECT_IO = 1;
        /// Writes inside the file do not exclude one another.
        const PARALLEL_DIRECT_WRITES = 1 << 6;
        /// The file is a backing file of the connection's: it is mapped from there, and unless [`DIRECT_IO`](Self::DIRECT_IO) is set
        /// read and written there too.
        const PASSTHROUGH = 1 << 7;
    }
}

/// Plain structures of the wire format, with a check of their sizes.
macro_rules! wire {
    ($($(#[$meta:meta])* struct $name:ident [$size:literal] { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub(super) struct $name { $(pub(super) $field: $type,)* }
            const _: () = assert!(size_of::<$name>() == $size, "the size of the kernel's structure");
        )*
    };
}

wire! {
    /// In front of every request.
    struct InHeader[40] {
        len: u32,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        total_extlen: u16,
        padding: u16,
    }

    /// In front of every reply; `error` is 0 or a negated errno.
    struct OutHeader[16] {
        len: u32,
        error: i32,
        unique: u64,
    }

    struct InitIn[64] {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        flags2: u32,
        unused: [u32; 11],
    }

    struct InitOut[64] {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        max_background: u16,
        congestion_threshold: u16,
        max_write: u32,
        time_gran: u32,
        max_pages: u16,
        map_alignment: u16,
        flags2: u32,
        max_stack_depth: u32,
        unused: [u32; 6],
    }

    struct Attr[88] {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32,
    }

    /// `attr_valid` is how long the kernel may keep the attributes.
    struct AttrOut[104] {
        attr_valid: u64,
        attr_valid_nsec: u32,
        dummy: u32,
        attr: Attr,
    }

    /// The reply of LOOKUP.
    struct EntryOut[128] {
        nodeid: u64,
        generation: u64,
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }

    /// In front of each name in the reply of READDIR; `off` is where the next entry is.
    struct Dirent[24] {
        ino: u64,
        off: u64,
        namelen: u32,
        r#type: u32,
    }

    struct SetattrIn[88] {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }

    struct OpenOut[16] {
        fh: u64,
        open_flags: u32,
        backing_id: i32,
    }

    struct OpenIn[8] {
        flags: u32,
        open_flags: u32,
    }

    struct ReleaseIn[24] {
        fh: u64,
        flags: u32,
        release_flags: u32,
        lock_owner: u64,
    }

    struct ReadIn[40] {
        fh: u64,
        offset: u64,
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }

    struct WriteIn[40] {
        fh: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }

    struct WriteOut[8] {
        size: u32,
        padding: u32,
    }

    struct FallocateIn[32] {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
        padding: u32,
    }

    struct LseekIn[24] {
        fh: u64,
        offset: u64,
        whence: u32,
        padding: u32,
    }

    struct LseekOut[8] {
        offset: u64,
    }

    struct CopyFileRangeIn[56] {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    }

    struct CopyFileRangeOut[8] {
        bytes_copied: u64,
    }

    struct IoctlIn[32] {
        fh: u64,
        flags: u32,
        cmd: u32,
        arg: u64,
        in_size: u32,
        out_size: u32,
    }

    struct IoctlOut[16] {
        result: i32,
        flags: u32,
        in_iovs: u32,
        out_iovs: u32,
    }

    /// The reply of an IOCTL that gives a number of 64 bits.
    struct IoctlOutSize[24] {
        out: IoctlOut,
        value: u64,
    }

    /// The reply of an IOCTL that gives a number of 32 bits.
    struct IoctlOutNumber[20] {
        out: IoctlOut,
        value: u32,
    }

    struct StatfsOut[80] {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }

    /// The command area of a submission queue entry.
    struct CommandIn[24] {
        flags: u64,
        commit_id: u64,
        qid: u16,
        padding: [u8; 6],
    }

    /// What accompanies request and reply in a ring entry.
    struct RingEntryInOut[32] {
        flags: u64,
        commit_id: u64,
        payload_sz: u32,
        padding: u32,
        reserved: u64,
    }

    /// A negative `off` leaves cached pages alone and only drops the attributes.
    struct NotifyInvalInodeOut[24] {
        ino: u64,
        off: i64,
        len: i64,
    }
}
