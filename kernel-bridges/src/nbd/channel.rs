//! A client's stream during the handshake, on the control thread: plain, or TLS once that is agreed on.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use socket2::Socket;
use stord_credentials::tls::{Handshake, Plaintext, TlsSession};
use stord_sockets::Descriptor;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Bytes of ciphertext read at a time.
const CIPHERTEXT: usize = 4096;
/// Bytes skipped at a time.
const SKIPPED: usize = 4096;

/// A connection that is being negotiated.
pub(super) struct Channel {
    stream: Descriptor,
    tls: Option<TlsSession>,
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
            tls: None,
        })
    }

    /// Goes on over TLS from here, once the two have agreed on keys.
    ///
    /// # Errors
    /// The client broke off, or it does not show what is asked for.
    pub(super) async fn start_tls(&mut self, mut session: TlsSession) -> io::Result<()> {
        loop {
            let state = session.handshake();
            // Alerts of a failed handshake are sent too.
            self.send(&mut session).await?;
            match state {
                Ok(Handshake::Complete) => break,
                Ok(Handshake::NeedsInput) => self.receive(&mut session).await?,
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        tracing::debug!(session = session.description(), "TLS with an NBD client");
        self.tls = Some(session);
        Ok(())
    }

    /// The TLS session, if there is one.
    pub(super) fn tls(&self) -> Option<&TlsSession> {
        self.tls.as_ref()
    }

    async fn send(&mut self, session: &mut TlsSession) -> io::Result<()> {
        let length = session.output().len();
        self.stream.write_all(session.output()).await?;
        session.consume_output(length);
        Ok(())
    }

    async fn receive(&mut self, session: &mut TlsSession) -> io::Result<()> {
        // Not within the future, of which there is one for each client that waits.
        let mut bytes = vec![0; CIPHERTEXT];
        match self.stream.read(&mut bytes).await? {
            0 => session.end_of_input(),
            count => session.feed(&bytes[..count]),
        }
        Ok(())
    }

    /// Fills `bytes`.
    pub(super) async fn read(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let Some(mut session) = self.tls.take() else {
            return self.stream.read_exact(bytes).await.map(drop);
        };
        let result = self.read_over(&mut session, bytes).await;
        self.tls = Some(session);
        result
    }

    async fn read_over(&mut self, session: &mut TlsSession, bytes: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let plaintext = session.read(&mut bytes[done..]);
            self.send(session).await?;
            match plaintext? {
                Plaintext::Bytes(count) => done += count,
                Plaintext::Closed => return Err(io::ErrorKind::UnexpectedEof.into()),
                Plaintext::NeedsInput => self.receive(session).await?,
            }
        }
        Ok(())
    }

    /// Reads `count` bytes and forgets them.
    pub(super) async fn skip(&mut self, mut count: u64) -> io::Result<()> {
        let mut bytes = vec![0; SKIPPED];
        while count > 0 {
            let part = usize::try_from(count).map_or(bytes.len(), |count| count.min(bytes.len()));
            self.read(&mut bytes[..part]).await?;
            count -= part as u64;
        }
        Ok(())
    }

    /// Sends all of `bytes`.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(mut session) = self.tls.take() else {
            return self.stream.write_all(bytes).await;
        };
        let mut result = session.write(bytes);
        if result.is_ok() {
            result = self.send(&mut session).await;
        }
        self.tls = Some(session);
        result
    }

    /// What the context that serves the client from now on needs.
    pub(super) fn into_parts(self) -> (OwnedFd, Option<TlsSession>) {
        (self.stream.into_inner(), self.tls)
    }

    /// A second descriptor of the same socket, by which the connection can be ended from elsewhere.
    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }
}
