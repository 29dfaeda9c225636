//! A front end's socket: whole messages with their descriptors, never waiting but where the control thread can do something else.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use socket2::Socket;
use stord_sockets::Polled;
use tokio::io::Interest;
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::message::{Frame, Header, MAX_TABLE};

/// A connected socket.
pub(super) struct Channel {
    socket: Polled<Socket>,
}

impl Channel {
    /// Takes over a socket.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub(super) fn new(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let socket = Polled::new(socket, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { socket })
    }

    /// The next message; `None` when the front end has gone between two messages.
    ///
    /// # Errors
    /// The front end has gone within a message, or what it sends is none. Nothing can be received after that.
    pub(super) async fn receive(&mut self) -> io::Result<Option<Frame>> {
        let mut descriptors = Vec::new();
        let mut header = [0; size_of::<Header>()];
        if !self.fill(&mut header, &mut descriptors).await? {
            return Ok(None);
        }
        let header = Header::read_from_bytes(&header).expect("as many bytes");
        let size = header.payload().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "this is no message of a front end",
            )
        })?;
        let mut payload = vec![0; size];
        if size > 0 && !self.fill(&mut payload, &mut descriptors).await? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Some(Frame {
            header,
            payload,
            descriptors,
        }))
    }

    /// Fills `bytes`, and adds the descriptors that came with them. False at the end of the stream.
    async fn fill(&mut self, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<bool> {
        let mut done = 0;
        while done < bytes.len() {
            let transfer = |socket: &Socket| {
                receive_some(
                    socket,
                    bytes.get_mut(done..).unwrap_or_default(),
                    descriptors,
                )
            };
            match self.socket.transfer(Interest::READABLE, transfer).await? {
                0 if done == 0 => return Ok(false),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => done += count,
            }
            if descriptors.len() > MAX_TABLE {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "too many descriptors",
                ));
            }
        }
        Ok(true)
    }

    /// Sends a message, with a descriptor perhaps.
    ///
    /// # Errors
    /// The front end has gone.
    pub(super) async fn send(
        &self,
        header: Header,
        payload: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(payload);
        let mut rest = bytes.as_slice();
        let mut descriptors = descriptor.as_slice();
        while !rest.is_empty() {
            let transfer = |socket: &Socket| send_some(socket, rest, descriptors);
            let sent = self.socket.transfer(Interest::WRITABLE, transfer).await?;
            rest = rest.get(sent..).unwrap_or_default();
            // They went with the first byte.
            descriptors = &[];
        }
        Ok(())
    }
}

fn receive_some(
    socket: &Socket,
    bytes: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_TABLE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(bytes)];
    let received = loop {
        let flags = RecvFlags::CMSG_CLOEXEC;
        match recvmsg(socket, &mut parts, &mut control, flags) {
            Err(Errno::INTR) => {}
            result => break result?,
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "more descriptors came than there is room for",
        ));
    }
    Ok(received.bytes)
}

fn send_some(socket: &Socket, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        let has_room = control.push(SendAncillaryMessage::ScmRights(descriptors));
        assert!(has_room, "the space is for one descriptor");
    }
    loop {
        let parts = [IoSlice::new(bytes)];
        match sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}
