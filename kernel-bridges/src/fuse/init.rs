//! INIT: the first request of a connection, in which kernel and daemon agree on what they can do.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::unistd::{read, write};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::abi::{self, InHeader, InitFlags, InitIn, InitOut, OutHeader, opcode};

/// So many direct requests may be under way before their senders wait.
const MAX_BACKGROUND: u16 = 256;
/// From so many on, the kernel calls the file system congested.
const CONGESTION_THRESHOLD: u16 = 192;
const PAGE: u32 = 4096;
/// Without these there is no serving: O_TRUNC would empty the disk, and requests would be too small.
const NEEDED: InitFlags = InitFlags::ATOMIC_O_TRUNC.union(InitFlags::MAX_PAGES);

/// What the daemon would agree to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Proposal {
    /// The most bytes that one request reads or writes.
    pub(super) max_transfer: u32,
    /// Requests go through io_uring, if the kernel offers that. Having agreed, it holds all requests back until every queue is there.
    pub(super) io_uring: bool,
    /// The kernel may read image files by itself.
    pub(super) passthrough: bool,
}

/// Reads the INIT request and answers it; gives what both sides can do. Blocks until the request is there.
///
/// # Errors
/// `EPERM` while the device is not mounted; `EPROTO` for a request that is not INIT or a kernel that is too old.
pub(super) fn answer(device: BorrowedFd<'_>, proposal: Proposal) -> Result<InitFlags, Errno> {
    let mut buffer = [0u8; abi::MIN_READ_BUFFER];
    let length = loop {
        match read(device, &mut buffer) {
            Err(Errno::EINTR | Errno::ENOENT) => {}
            result => break result?,
        }
    };
    let request = buffer.get(..length).ok_or(Errno::EPROTO)?;
    let (header, arguments) = InHeader::read_from_prefix(request).map_err(|_| Errno::EPROTO)?;
    if header.opcode != opcode::INIT {
        return Err(Errno::EPROTO);
    }
    // Kernels before 5.17 send a shorter structure; what is missing is zero.
    let mut padded = [0u8; size_of::<InitIn>()];
    let known = arguments.len().min(padded.len());
    padded[..known].copy_from_slice(&arguments[..known]);
    let kernel = InitIn::read_from_bytes(&padded).map_err(|_| Errno::EPROTO)?;
    let (reply, flags) = negotiate(&kernel, proposal).ok_or(Errno::EPROTO)?;
    let length = size_of::<OutHeader>() + size_of::<InitOut>();
    let out = OutHeader {
        len: u32::try_from(length).map_err(|_| Errno::EPROTO)?,
        error: 0,
        unique: header.unique,
    };
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(out.as_bytes());
    message.extend_from_slice(reply.as_bytes());
    write(device, &message)?;
    Ok(flags)
}

/// Works out the reply; `None` for a kernel that cannot be served.
fn negotiate(kernel: &InitIn, proposal: Proposal) -> Option<(InitOut, InitFlags)> {
    if kernel.major != abi::MAJOR || kernel.minor < abi::OLDEST_MINOR {
        return None;
    }
    let offered = u64::from(kernel.flags) | (u64::from(kernel.flags2) << 32);
    let mut wanted = InitFlags::ASYNC_READ
        | InitFlags::ATOMIC_O_TRUNC
        | InitFlags::BIG_WRITES
        | InitFlags::ASYNC_DIO
        | InitFlags::MAX_PAGES
        | InitFlags::INIT_EXT
        | InitFlags::DIRECT_IO_ALLOW_MMAP;
    wanted.set(InitFlags::OVER_IO_URING, proposal.io_uring);
    wanted.set(InitFlags::PASSTHROUGH, proposal.passthrough);
    let max_transfer = proposal.max_transfer;
    let flags = InitFlags::from_bits_truncate(offered) & wanted;
    if !flags.contains(NEEDED) {
        return None;
    }
    let bits = flags.bits();
    #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
    let (low, high) = (bits as u32, (bits >> 32) as u32);
    let reply = InitOut {
        major: abi::MAJOR,
        minor: abi::MINOR,
        max_readahead: kernel.max_readahead,
        flags: low,
        flags2: high,
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write: max_transfer,
        time_gran: 1,
        max_pages: u16::try_from(max_transfer / PAGE).ok()?,
        // Image files lie on file systems that lie on no other.
        max_stack_depth: u32::from(flags.contains(InitFlags::PASSTHROUGH)),
        ..InitOut::default()
    };
    Some((reply, flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLASSIC: Proposal = Proposal {
        max_transfer: 1 << 20,
        io_uring: false,
        passthrough: false,
    };

    fn kernel(minor: u32, flags: InitFlags) -> InitIn {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
        let (low, high) = (flags.bits() as u32, (flags.bits() >> 32) as u32);
        InitIn {
            major: 7,
            minor,
            max_readahead: 131_072,
            flags: low,
            flags2: high,
            ..InitIn::default()
        }
    }

    #[test]
    fn only_what_the_kernel_offers_is_agreed_upon() {
        let offered = NEEDED | InitFlags::ASYNC_DIO | InitFlags::OVER_IO_URING;
        let (reply, flags) = negotiate(&kernel(45, offered), CLASSIC).expect("is new enough");
        assert_eq!(flags, NEEDED | InitFlags::ASYNC_DIO);
        assert_eq!(u64::from(reply.flags), flags.bits());
        assert_eq!((reply.max_write, reply.max_pages), (1 << 20, 256));
    }

    #[test]
    fn io_uring_needs_both_sides() {
        let proposal = Proposal {
            io_uring: true,
            ..CLASSIC
        };
        let offered = NEEDED | InitFlags::OVER_IO_URING;
        let agreed = |offered, proposal| {
            let (_, flags) = negotiate(&kernel(45, offered), proposal).expect("is new enough");
            flags.contains(InitFlags::OVER_IO_URING)
        };
        assert!(agreed(offered, proposal));
        assert!(!agreed(offered, CLASSIC));
        assert!(!agreed(NEEDED, proposal));
    }

    #[test]
    fn high_flags_travel_in_the_second_word() {
        let offered = NEEDED | InitFlags::INIT_EXT | InitFlags::DIRECT_IO_ALLOW_MMAP;
        let (reply, _) = negotiate(&kernel(38, offered), CLASSIC).expect("is new enough");
        assert_eq!(reply.flags & (1 << 30), 1 << 30);
        assert_eq!(reply.flags2, 1 << 4);
    }

    #[test]
    fn kernels_that_lack_what_is_needed_are_refused() {
        assert!(negotiate(&kernel(45, NEEDED), CLASSIC).is_some());
        assert!(negotiate(&kernel(30, NEEDED), CLASSIC).is_none());
        assert!(negotiate(&kernel(45, InitFlags::MAX_PAGES), CLASSIC).is_none());
        let other = InitIn {
            major: 8,
            ..kernel(45, NEEDED)
        };
        assert!(negotiate(&other, CLASSIC).is_none());
    }
}
