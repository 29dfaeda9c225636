//! The protocol as a front end speaks it, good or bad: messages out, messages in, with descriptors.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_LOG_BASE: u32 = 6;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const SET_BACKEND_REQ_FD: u32 = 21;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const SET_INFLIGHT_FD: u32 = 32;
pub const RESET_DEVICE: u32 = 34;
pub const GET_MAX_MEM_SLOTS: u32 = 36;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;
pub const SET_STATUS: u32 = 39;
pub const GET_STATUS: u32 = 40;

pub const F_LOG_ALL: u64 = 1 << 26;

const VERSION: u32 = 1;
const NEEDS_REPLY: u32 = 1 << 3;

/// What the other end answers.
pub struct Reply {
    pub request: u32,
    pub payload: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

impl Reply {
    #[track_caller]
    pub fn number(&self) -> u64 {
        u64::from_ne_bytes(self.payload.as_slice().try_into().expect("a number"))
    }
}

/// A connection.
pub struct FrontEnd {
    pub stream: UnixStream,
}

impl FrontEnd {
    /// Connects as soon as somebody listens.
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + Duration::from_secs(30);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        Self { stream }
    }

    /// Sends any bytes with any descriptors.
    pub fn send_raw(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let parts = [IoSlice::new(bytes)];
        let sent = sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)?;
        assert_eq!(sent, bytes.len(), "messages are small");
        Ok(())
    }

    fn send_with(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut bytes = request.to_ne_bytes().to_vec();
        bytes.extend((VERSION | flags).to_ne_bytes());
        bytes.extend(u32::try_from(payload.len()).unwrap().to_ne_bytes());
        bytes.extend(payload);
        self.send_raw(&bytes, descriptors)
    }

    /// Sends a message that has no answer.
    pub fn send(&self, request: u32, payload: &[u8], descriptors: &[BorrowedFd<'_>]) {
        self.send_with(request, 0, payload, descriptors)
            .expect("the other end is there");
    }

    /// The next message, or why there is none.
    pub fn receive(&mut self) -> io::Result<Reply> {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut header)];
        let received = recvmsg(
            &self.stream,
            &mut parts,
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL,
        )?;
        if received.bytes != 12 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                descriptors.extend(passed);
            }
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(8) as usize];
        self.stream.read_exact(&mut payload)?;
        Ok(Reply {
            request: word(0),
            payload,
            descriptors,
        })
    }

    /// Sends a message that has an answer, and gives that.
    #[track_caller]
    pub fn ask(&mut self, request: u32, payload: &[u8]) -> Reply {
        self.send(request, payload, &[]);
        let reply = self.receive().expect("the message is answered");
        assert_eq!(reply.request, request);
        reply
    }

    /// Whether a message is carried out, with an acknowledgement.
    #[track_caller]
    pub fn is_done(
        &mut self,
        request: u32,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> bool {
        self.send_with(request, NEEDS_REPLY, payload, descriptors)
            .expect("the other end is there");
        let reply = self.receive().expect("the message is answered");
        assert_eq!(reply.request, request);
        reply.number() == 0
    }

    /// Has a message carried out.
    #[track_caller]
    pub fn order(&mut self, request: u32, payload: &[u8], descriptors: &[BorrowedFd<'_>]) {
        assert!(self.is_done(request, payload, descriptors), "{request}");
    }

    /// Sends a message and sees that the other end breaks the connection off.
    #[track_caller]
    pub fn is_cut_off_by(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        // It may have gone before all is sent.
        let _ = self.send_raw(bytes, descriptors);
        self.is_cut_off();
    }

    /// Sees that the other end breaks the connection off.
    #[track_caller]
    pub fn is_cut_off(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
    }

    /// Agrees on everything that the other end offers, but for logging.
    #[track_caller]
    pub fn agree(&mut self) {
        let features = self.ask(GET_FEATURES, &[]).number();
        let protocol = self.ask(GET_PROTOCOL_FEATURES, &[]).number();
        self.send(SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[]);
        self.send(SET_OWNER, &[], &[]);
        self.order(SET_FEATURES, &(features & !F_LOG_ALL).to_ne_bytes(), &[]);
    }

    /// Bytes of the configuration space.
    #[track_caller]
    pub fn config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let mut payload = words(&[offset, size, 0]);
        payload.resize(payload.len() + size as usize, 0);
        let reply = self.ask(GET_CONFIG, &payload);
        assert_eq!(reply.payload[..12], payload[..12]);
        reply.payload[12..].to_vec()
    }

    /// The capacity of the disk, in sectors.
    #[track_caller]
    pub fn capacity(&mut self) -> u64 {
        u64::from_le_bytes(self.config(0, 8).try_into().unwrap())
    }
}

/// Numbers as the payload of a message.
pub fn words(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Larger numbers as the payload of a message.
pub fn longs(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A message as bytes, with any header.
pub fn message(request: u32, flags: u32, size: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = words(&[request, flags, size]);
    bytes.extend(payload);
    bytes
}

/// One descriptor, for a call.
pub fn one<F: AsFd>(descriptor: &F) -> [BorrowedFd<'_>; 1] {
    [descriptor.as_fd()]
}
