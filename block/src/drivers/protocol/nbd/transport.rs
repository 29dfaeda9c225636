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
/// Plaintext encrypted at a time, in bytes: three whole records, whose ciphertext is no longer than what a session keeps of its memory.
const STEP: usize = 48 << 10;
/// What encrypting so much adds at most, in bytes.
const OVERHEAD: usize = 1024;
/// The most ciphertext on its way, in bytes.
const OUTGOING: usize = 6 * (STEP + OVERHEAD);

/// The stream of a connection.
pub struct Transport {
    socket: PolledFd,
    tls: Option<RefCell<Tls>>,
}

struct Tls {
    session: TlsSession,
    incoming: IoBuffer,
    /// Ciphertext on its way.
    outgoing: Outgoing,
    /// Plaintext on its way up or down.
    plaintext: Vec<u8>,
    /// The peer has closed its side, or the session has broken, after the plaintext that was read last.
    end: Option<Result<usize, Errno>>,
}

/// Ciphertext in its order, in memory that is used again and again.
struct Outgoing {
    memory: IoBuffer,
    start: usize,
    end: usize,
}

impl Outgoing {
    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn has_room(&self) -> bool {
        self.end + STEP + OVERHEAD <= self.memory.len()
    }

    fn push(&mut self, ciphertext: &[u8]) {
        self.memory.write_at(self.end, ciphertext);
        self.end += ciphertext.len();
    }

    fn bytes(&self) -> IoVec {
        self.memory.slice(self.start..self.end).into()
    }

    fn sent(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }
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
                    outgoing: Outgoing {
                        memory: IoBuffer::zeroed(OUTGOING),
                        start: 0,
                        end: 0,
                    },
                    plaintext: vec![0; CIPHERTEXT],
                    end: None,
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
            match self.socket.try_write(&tls.outgoing.bytes()) {
                Ok(count) => tls.outgoing.sent(count),
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
        let outgoing = tls.borrow().outgoing.bytes();
        if outgoing.is_empty() {
            return tls.borrow_mut().encrypt(&front);
        }
        let count = self.socket.write_when_ready(outgoing).await?;
        tls.borrow_mut().outgoing.sent(count);
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
    /// Plaintext that needs no more ciphertext, of as many records as there are: its length, 0 at the end of the stream.
    fn decrypt(&mut self, room: &IoVec) -> Result<Option<usize>, Errno> {
        let mut done = 0;
        while done < room.len() && self.end.is_none() {
            let left =
                usize::try_from(room.len() - done).map_or(CIPHERTEXT, |left| left.min(CIPHERTEXT));
            match self.session.read(&mut self.plaintext[..left]) {
                Ok(Plaintext::Bytes(count)) => {
                    room.write_at(done, &self.plaintext[..count]);
                    done += count as u64;
                }
                Ok(Plaintext::NeedsInput) => break,
                Ok(Plaintext::Closed) => self.end = Some(Ok(0)),
                Err(error) => {
                    tracing::debug!(%error, "a TLS session has broken");
                    self.end = Some(Err(Errno::EPROTO));
                }
            }
        }
        match (done, self.end) {
            (0, None) => Ok(None),
            (0, Some(end)) => end.map(Some),
            (done, _) => Ok(usize::try_from(done).ok()),
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

    /// Encrypts the beginning of `front`, and gives its length. Nothing may be on its way.
    fn encrypt(&mut self, front: &IoVec) -> Result<usize, Errno> {
        // Where the session has something to say of its own, that comes first.
        self.take_output();
        let mut taken = 0;
        while taken < front.len() && self.outgoing.has_room() {
            let step = usize::try_from(front.len() - taken).map_or(STEP, |left| left.min(STEP));
            let plaintext = &mut self.plaintext[..step];
            front.read_at(taken, plaintext);
            self.session.write(plaintext).map_err(|_| Errno::EPROTO)?;
            taken += step as u64;
            self.take_output();
        }
        usize::try_from(taken).map_err(|_| Errno::EOVERFLOW)
    }

    /// Takes what the session has for the peer, as far as there is room.
    fn take_output(&mut self) {
        let output = self.session.output();
        let room = self.outgoing.memory.len() - self.outgoing.end;
        let count = output.len().min(room);
        self.outgoing.push(&output[..count]);
        self.session.consume_output(count);
    }
}
