//! The stream of a connection in its transmission phase, on its context: plain, or TLS.
//!
//! Under TLS a send takes plaintext as soon as it is encrypted, and keeps the ciphertext until the socket has taken it: `Ok` says that
//! those bytes are in order and need not be offered again, and [`Transport::is_clear`] when nothing is left to send.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{Shutdown, shutdown};
use stord_aio::{Errno, IoBuffer, IoVec, PolledFd};
use stord_credentials::tls::{Plaintext, TlsSession};

/// Bytes of ciphertext read at a time.
const CIPHERTEXT: usize = 64 << 10;
/// The most plaintext encrypted at a time, in bytes.
const PLAINTEXT: u64 = 256 << 10;

/// The stream of a connection.
pub struct Transport {
    socket: PolledFd,
    tls: Option<RefCell<Tls>>,
}

struct Tls {
    session: TlsSession,
    incoming: IoBuffer,
    /// Ciphertext on its way.
    outgoing: IoVec,
    /// Plaintext on its way up.
    plaintext: Vec<u8>,
}

impl Transport {
    /// Takes a socket over, with the session that has begun on it.
    ///
    /// # Errors
    /// The descriptor cannot be made nonblocking.
    pub fn new(socket: OwnedFd, session: Option<TlsSession>) -> io::Result<Self> {
        Ok(Self {
            socket: PolledFd::new(socket)?,
            tls: session.map(|session| {
                RefCell::new(Tls {
                    session,
                    incoming: IoBuffer::zeroed(CIPHERTEXT),
                    outgoing: IoVec::new(),
                    plaintext: vec![0; CIPHERTEXT],
                })
            }),
        })
    }

    /// Receives into `room` what has come; 0 is the end of the stream.
    ///
    /// # Errors
    /// `EAGAIN` when there is nothing, or what the socket says.
    pub fn try_receive(&self, room: &IoVec) -> Result<usize, Errno> {
        let Some(tls) = &self.tls else {
            return self.socket.try_read(room);
        };
        let mut tls = tls.borrow_mut();
        loop {
            if let Some(count) = tls.decrypt(room)? {
                return Ok(count);
            }
            let count = self.socket.try_read(&tls.incoming.clone().into())?;
            tls.feed(count);
        }
    }

    /// Waits until something has come and receives it into `room`; 0 is the end of the stream.
    ///
    /// # Errors
    /// What the socket says; `ECANCELED` when the context stops.
    pub async fn receive(&self, room: IoVec) -> Result<usize, Errno> {
        let Some(tls) = &self.tls else {
            return self.socket.read_when_ready(room).await;
        };
        loop {
            if let Some(count) = tls.borrow_mut().decrypt(&room)? {
                return Ok(count);
            }
            let incoming = tls.borrow().incoming.clone();
            let count = self.socket.read_when_ready(incoming.into()).await?;
            tls.borrow_mut().feed(count);
        }
    }

    /// Sends the beginning of `front`, and gives its length. An empty one sends what was taken before.
    ///
    /// # Errors
    /// `EAGAIN` when the socket takes nothing, or what it says.
    pub fn try_send(&self, front: &IoVec) -> Result<usize, Errno> {
        let Some(tls) = &self.tls else {
            return self.socket.try_write(front);
        };
        let mut tls = tls.borrow_mut();
        let mut taken = 0;
        if tls.outgoing.is_empty() {
            taken = tls.encrypt(front)?;
        }
        while !tls.outgoing.is_empty() {
            match self.socket.try_write(&tls.outgoing) {
                Ok(count) => tls.sent(count),
                // The plaintext is taken all the same.
                Err(Errno::EAGAIN) if taken > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(taken)
    }

    /// Waits until something of `front` can be sent, and sends it.
    ///
    /// # Errors
    /// What the socket says; `ECANCELED` when the context stops.
    pub async fn send(&self, front: IoVec) -> Result<usize, Errno> {
        let Some(tls) = &self.tls else {
            return self.socket.write_when_ready(front).await;
        };
        let outgoing = tls.borrow().outgoing.clone();
        if outgoing.is_empty() {
            return tls.borrow_mut().encrypt(&front);
        }
        let count = self.socket.write_when_ready(outgoing).await?;
        tls.borrow_mut().sent(count);
        Ok(0)
    }

    /// Ends the connection in both directions; whoever receives finds the end of the stream.
    pub fn shut_down(&self) {
        // Fails when the peer has done so already.
        let _ = shutdown(self.socket.fd().as_raw_fd(), Shutdown::Both);
    }

    /// Whether everything that was taken has been sent.
    pub fn is_clear(&self) -> bool {
        self.tls.as_ref().is_none_or(|tls| {
            let tls = tls.borrow();
            tls.outgoing.is_empty() && tls.session.output().is_empty()
        })
    }
}

impl Tls {
    /// Plaintext that needs no more ciphertext: its length, 0 at the end of the stream.
    fn decrypt(&mut self, room: &IoVec) -> Result<Option<usize>, Errno> {
        let most = usize::try_from(room.len()).map_or(CIPHERTEXT, |room| room.min(CIPHERTEXT));
        match self.session.read(&mut self.plaintext[..most]) {
            Ok(Plaintext::Bytes(count)) => {
                room.write_at(0, &self.plaintext[..count]);
                Ok(Some(count))
            }
            Ok(Plaintext::Closed) => Ok(Some(0)),
            Ok(Plaintext::NeedsInput) => Ok(None),
            Err(error) => {
                tracing::debug!(%error, "a TLS session has broken");
                Err(Errno::EPROTO)
            }
        }
    }

    /// Takes what came into `incoming`.
    fn feed(&mut self, count: usize) {
        if count == 0 {
            self.session.end_of_input();
            return;
        }
        self.incoming.read_at(0, &mut self.plaintext[..count]);
        self.session.feed(&self.plaintext[..count]);
    }

    fn encrypt(&mut self, front: &IoVec) -> Result<usize, Errno> {
        let length = front.len().min(PLAINTEXT);
        let plaintext = front.slice(0..length).to_vec();
        self.session.write(&plaintext).map_err(|_| Errno::EPROTO)?;
        let ciphertext = self.session.output().to_vec();
        self.session.consume_output(ciphertext.len());
        self.outgoing.push(IoBuffer::from_vec(ciphertext));
        Ok(plaintext.len())
    }

    fn sent(&mut self, count: usize) {
        self.outgoing = self.outgoing.slice(count as u64..self.outgoing.len());
    }
}
