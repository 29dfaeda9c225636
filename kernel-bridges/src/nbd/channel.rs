//! A client's stream during the handshake, on the control thread: plain, or TLS once that is agreed on.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use socket2::Socket;
use stord_sockets::Descriptor;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A connection that is being negotiated.
pub(super) struct Channel {
    stream: Descriptor,
}

impl Channel {
    /// Takes a client's socket over.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub(super) fn new(socket: Socket) -> io::Result<Self> {
        if stord_sockets::has_nodelay(&socket) {
            // A connection without it works too.
            let _ = socket.set_tcp_nodelay(true);
        }
        Ok(Self {
            stream: Descriptor::new(socket.into())?,
        })
    }

    /// Fills `bytes`.
    pub(super) async fn read(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(bytes).await.map(drop)
    }

    /// Reads `count` bytes and forgets them.
    pub(super) async fn skip(&mut self, mut count: u64) -> io::Result<()> {
        let mut bytes = [0; 4096];
        while count > 0 {
            let part = usize::try_from(count).map_or(bytes.len(), |count| count.min(bytes.len()));
            self.read(&mut bytes[..part]).await?;
            count -= part as u64;
        }
        Ok(())
    }

    /// Sends all of `bytes`.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// The descriptor, for the context that serves the client from now on.
    pub(super) fn into_fd(self) -> OwnedFd {
        self.stream.into_inner()
    }

    /// A second descriptor of the same socket, by which the connection can be ended from elsewhere.
    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }
}
