//! The messages of vhost-user as a front end sends them, and the answers, each checked against what was asked.
//!
//! The protocol is QEMU's document "Vhost-user Protocol". Numbers are in the byte order of the machine.

use std::io::{self, IoSlice, Read as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;

use bitflags::bitflags;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The longest payload of an answer.
pub(super) const MAX_PAYLOAD: usize = 4096;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const IS_REPLY: u32 = 1 << 2;
const NEEDS_REPLY: u32 = 1 << 3;

bitflags! {
    /// What front end and back end can agree on beside the device's own features.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct ProtocolFeatures: u64 {
        const MQ = 1 << 0;
        const REPLY_ACK = 1 << 3;
        const BACKEND_REQ = 1 << 5;
        const CONFIG = 1 << 9;
    }
}

/// Messages of front ends, those that are sent here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemoryTable = 5,
    SetRingSize = 8,
    SetRingAddresses = 9,
    SetRingBase = 10,
    SetKick = 12,
    SetCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNumber = 17,
    EnableRing = 18,
    SetBackendChannel = 21,
    GetConfig = 24,
}

/// What a back end says by itself when its configuration has changed.
pub(super) const CONFIG_CHANGED: u32 = 2;

/// What every message begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) request: u32,
    flags: u32,
    size: u32,
}

impl Header {
    /// The length of the payload; `None` where this is no answer.
    pub(super) fn answer(&self) -> Option<usize> {
        self.payload(IS_REPLY)
    }

    /// The length of the payload; `None` where this is nothing that a back end says by itself.
    pub(super) fn notice(&self) -> Option<usize> {
        self.payload(0)
    }

    fn payload(&self, kind: u32) -> Option<usize> {
        let size = usize::try_from(self.size).ok()?;
        let is_fit = self.flags & VERSION_MASK == VERSION && self.flags & IS_REPLY == kind;
        (is_fit && size <= MAX_PAYLOAD).then_some(size)
    }

    /// What is to be said to the sender, if it wants to know whether the message was understood.
    pub(super) fn acknowledgement(&self, understood: bool) -> Option<Vec<u8>> {
        let header = Header {
            request: self.request,
            flags: VERSION | IS_REPLY,
            size: 8,
        };
        let mut message = header.as_bytes().to_vec();
        message.extend_from_slice(&u64::from(!understood).to_ne_bytes());
        (self.flags & NEEDS_REPLY != 0).then_some(message)
    }
}

/// A memory table with one region.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct MemoryTable {
    pub(super) count: u32,
    pub(super) padding: u32,
    /// Where the device has it.
    pub(super) guest: u64,
    pub(super) size: u64,
    /// By which addresses the parts of rings are named.
    pub(super) user: u64,
    pub(super) offset: u64,
}

/// A number that concerns a ring.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RingState {
    pub(super) ring: u32,
    pub(super) number: u32,
}

/// Where the parts of a ring are.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RingAddresses {
    pub(super) ring: u32,
    pub(super) flags: u32,
    pub(super) descriptors: u64,
    pub(super) used: u64,
    pub(super) available: u64,
    pub(super) log: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ConfigRange {
    offset: u32,
    size: u32,
    flags: u32,
}

/// The message that asks for the beginning of the configuration space.
pub(super) fn get_config(len: usize) -> Vec<u8> {
    let mut message = encode(Request::GetConfig, 0, config_range(len).as_bytes());
    message.resize(message.len() + len, 0);
    let size = size_of::<ConfigRange>() + len;
    message[8..12].copy_from_slice(&u32::try_from(size).expect("it is short").to_ne_bytes());
    message
}

fn config_range(len: usize) -> ConfigRange {
    ConfigRange {
        offset: 0,
        size: u32::try_from(len).expect("it is short"),
        flags: 0,
    }
}

/// The configuration space in the payload of an answer.
///
/// # Errors
/// That is not what was asked for.
pub(super) fn config_of(payload: &[u8], len: usize) -> io::Result<&[u8]> {
    if payload.is_empty() {
        return Err(unfit("the back end refuses to tell its configuration"));
    }
    match ConfigRange::read_from_prefix(payload) {
        Ok((range, config)) if range == config_range(len) && config.len() == len => Ok(config),
        _ => Err(unfit(
            "the back end told something else than its configuration",
        )),
    }
}

fn encode(request: Request, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        request: request as u32,
        flags: VERSION | flags,
        size: u32::try_from(payload.len()).expect("messages are short"),
    };
    let mut message = header.as_bytes().to_vec();
    message.extend_from_slice(payload);
    message
}

pub(super) fn unfit(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// A connection before it serves requests. Everything here blocks, as long as the socket's timeouts allow.
pub(super) struct Dialogue {
    pub(super) socket: UnixStream,
    /// Every message is answered.
    pub(super) acknowledged: bool,
}

impl Dialogue {
    /// Says something that has no answer of its own.
    pub(super) fn tell(
        &self,
        request: Request,
        payload: &(impl IntoBytes + Immutable),
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let flags = if self.acknowledged { NEEDS_REPLY } else { 0 };
        self.send(&encode(request, flags, payload.as_bytes()), descriptor)?;
        if self.acknowledged && self.receive_word(request)? != 0 {
            return Err(unfit(format!("the back end refuses {request:?}")));
        }
        Ok(())
    }

    /// Asks for a number.
    pub(super) fn ask(&self, request: Request) -> io::Result<u64> {
        self.send(&encode(request, 0, &[]), None)?;
        self.receive_word(request)
    }

    /// Asks for the configuration space.
    pub(super) fn ask_config(&self, len: usize) -> io::Result<Vec<u8>> {
        self.send(&get_config(len), None)?;
        let payload = self.receive(Request::GetConfig)?;
        config_of(&payload, len).map(<[u8]>::to_vec)
    }

    fn send(&self, message: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let descriptors: Vec<RawFd> = descriptor.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let control = if descriptors.is_empty() {
            &[]
        } else {
            &rights[..]
        };
        let sent = sendmsg::<UnixAddr>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(message)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(timed_out)?;
        if sent != message.len() {
            return Err(unfit("the back end does not take messages"));
        }
        Ok(())
    }

    fn receive_word(&self, request: Request) -> io::Result<u64> {
        let payload = self.receive(request)?;
        u64::read_from_bytes(&payload)
            .map_err(|_| unfit(format!("the back end's answer to {request:?} is no number")))
    }

    fn receive(&self, request: Request) -> io::Result<Vec<u8>> {
        let mut bytes = [0; size_of::<Header>()];
        self.read(&mut bytes)?;
        let header = Header::read_from_bytes(&bytes).map_err(|_| io::ErrorKind::InvalidData)?;
        let size = header
            .answer()
            .filter(|_| header.request == request as u32)
            .ok_or_else(|| unfit(format!("the back end does not answer {request:?}")))?;
        let mut payload = vec![0; size];
        self.read(&mut payload)?;
        Ok(payload)
    }

    fn read(&self, bytes: &mut [u8]) -> io::Result<()> {
        (&self.socket)
            .read_exact(bytes)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => io::ErrorKind::ConnectionReset.into(),
                io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
                _ => error,
            })
    }
}

/// What a socket's timeout is called.
fn timed_out(errno: nix::Error) -> io::Error {
    match errno {
        nix::Error::EAGAIN => io::ErrorKind::TimedOut.into(),
        errno => errno.into(),
    }
}
