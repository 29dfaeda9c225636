//! Lines of text between two processes of the same user, with descriptors beside them, over a socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The longest line, in bytes.
const LONGEST: usize = 1 << 20;

/// The most descriptors that go with one line.
pub const MAX_DESCRIPTORS: usize = 64;

/// One end of the connection. Its calls block.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    /// What has been received of the lines to come.
    received: Vec<u8>,
}

impl Channel {
    /// A channel over a connected socket.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            received: Vec::new(),
        }
    }

    /// The socket.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// The channel at standard input.
    ///
    /// # Errors
    /// No descriptor is to be had.
    pub fn from_standard_input() -> io::Result<Self> {
        let stream = io::stdin().as_fd().try_clone_to_owned()?;
        Ok(Self::new(stream.into()))
    }

    /// Waits no longer than this for a line; `None` waits for ever.
    ///
    /// # Errors
    /// The socket refuses.
    pub fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(patience)?;
        self.stream.set_write_timeout(patience)
    }

    /// Sends a line, and descriptors with it.
    ///
    /// # Errors
    /// The other end is gone or does not read.
    pub fn send(&self, line: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut text = line.as_bytes().to_vec();
        text.push(b'\n');
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut rest = text.as_slice();
        let mut descriptors = descriptors;
        while !rest.is_empty() {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !descriptors.is_empty()
                && !control.push(SendAncillaryMessage::ScmRights(descriptors))
            {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let parts = [IoSlice::new(rest)];
            match sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    // They went with the first byte.
                    descriptors = &[];
                }
            }
        }
        Ok(())
    }

    /// Waits for a line; gives it and the descriptors that came with it.
    ///
    /// # Errors
    /// `UnexpectedEof` when the other end is gone.
    pub fn receive(&mut self) -> io::Result<(String, Vec<OwnedFd>)> {
        let mut descriptors = Vec::new();
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.received.drain(..=end).collect();
                line.pop();
                let line = String::from_utf8(line)
                    .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
                return Ok((line, descriptors));
            }
            if self.received.len() > LONGEST || descriptors.len() > MAX_DESCRIPTORS {
                return Err(io::ErrorKind::InvalidData.into());
            }
            self.receive_some(&mut descriptors)?;
        }
    }

    fn receive_some(&mut self, descriptors: &mut Vec<OwnedFd>) -> io::Result<()> {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let received = loop {
            match recvmsg(
                &self.stream,
                &mut parts,
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(Errno::INTR) => {}
                result => break result?.bytes,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                descriptors.extend(received);
            }
        }
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let received = bytes.get(..received).unwrap_or_default();
        self.received.extend_from_slice(received);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

    fn pair() -> (Channel, Channel) {
        let (one, other) = UnixStream::pair().expect("sockets");
        (Channel::new(one), Channel::new(other))
    }

    #[test]
    fn lines_arrive_one_by_one_with_their_descriptors() {
        let (sender, mut receiver) = pair();
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"content").expect("writable");
        let long = "x".repeat(10_000);
        sender.send(&long, &[file.as_fd()]).expect("sent");
        sender.send("second", &[]).expect("sent");
        let (line, descriptors) = receiver.receive().expect("a line");
        assert_eq!(line, long);
        let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors).expect("one descriptor");
        let mut received = File::from(descriptor);
        let mut content = String::new();
        std::io::Seek::rewind(&mut received).expect("a regular file");
        received.read_to_string(&mut content).expect("readable");
        assert_eq!(content, "content");
        let (line, descriptors) = receiver.receive().expect("a line");
        assert_eq!((line.as_str(), descriptors.len()), ("second", 0));
    }

    #[test]
    fn end_of_the_other_process_is_told() {
        let (sender, mut receiver) = pair();
        sender.send("unfinished", &[]).expect("sent");
        drop(sender);
        receiver.receive().expect("a line");
        let error = receiver.receive().expect_err("nobody is there");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
