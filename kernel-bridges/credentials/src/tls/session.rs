//! One TLS connection without its transport: ciphertext goes in and comes out as bytes, so that the
//! same code serves sockets of the control thread and of I/O contexts.
//!
//! What there is to send may grow with every call, failures included (an alert), so whoever owns the
//! transport sends [`output`](TlsSession::output) before it waits for more to [`feed`](TlsSession::feed).
//! Nothing here blocks. A session that failed stays failed.

use std::io::{self, Read, Write};

use openssl::ssl::{ErrorCode, ShutdownState, Ssl, SslStream};
use openssl::x509::X509VerifyResult;
use stord_qmp::Error;

use super::name;
use crate::Credentials;

/// Records read are taken in at once, so this is what a session keeps of an idle connection.
const KEPT_CAPACITY: usize = 72 << 10;

/// One TLS connection.
pub struct TlsSession {
    stream: SslStream<Pipe>,
    role: Role,
    /// The name that the peer's certificate must be for.
    hostname: Option<String>,
    /// Whether the peer has a certificate that was verified.
    has_verified_peer: bool,
    is_established: bool,
}

/// The side of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The one that connects.
    Client,
    /// The one that is connected to.
    Server,
}

/// How far a handshake is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// Plaintext can be read and written.
    Complete,
    /// The peer has to say something first.
    NeedsInput,
}

/// What a read has given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plaintext {
    /// That many bytes, not 0.
    Bytes(usize),
    /// Nothing before more ciphertext is fed.
    NeedsInput,
    /// The peer has closed its side properly, nothing will come any more.
    Closed,
}

impl TlsSession {
    pub(super) fn new(
        ssl: Ssl,
        role: Role,
        hostname: Option<String>,
        has_verified_peer: bool,
    ) -> Result<Self, Error> {
        let stream = SslStream::new(ssl, Pipe::default()).map_err(|error| {
            Error::generic(format!("Failed to create TLS session: {error}")).with_source(error)
        })?;
        Ok(Self {
            stream,
            role,
            hostname,
            has_verified_peer,
            is_established: false,
        })
    }

    /// Takes in what the peer has sent.
    pub fn feed(&mut self, ciphertext: &[u8]) {
        self.stream.get_mut().incoming.push(ciphertext);
    }

    /// Notes that the peer has closed the connection, so that no more ciphertext will come: without
    /// a proper end before it, reading fails from now on, because it may have been cut short.
    pub fn end_of_input(&mut self) {
        self.stream.get_mut().is_at_end = true;
    }

    /// What is to be sent to the peer, from its first byte on.
    pub fn output(&self) -> &[u8] {
        self.stream.get_ref().outgoing.bytes()
    }

    /// Forgets the first bytes of what is to be sent, because they are sent.
    pub fn consume_output(&mut self, sent: usize) {
        self.stream.get_mut().outgoing.consume(sent);
    }

    /// Goes on with the handshake as far as it can. The credentials of the peer are verified when it
    /// is complete; whether it may come in is for [`authorize`](Self::authorize) to say.
    ///
    /// # Errors
    /// The peer does not speak TLS, agrees to nothing that the credentials allow, or its own
    /// credentials are no good. There may be an alert to send.
    pub fn handshake(&mut self) -> Result<Handshake, Error> {
        if self.is_established {
            return Ok(Handshake::Complete);
        }
        match self.stream.do_handshake() {
            Ok(()) => {
                self.is_established = true;
                Ok(Handshake::Complete)
            }
            Err(error) if error.code() == ErrorCode::WANT_READ => Ok(Handshake::NeedsInput),
            Err(error) => Err(self.handshake_failure(&error)),
        }
    }

    /// Whether the handshake is complete.
    pub fn is_established(&self) -> bool {
        self.is_established
    }

    /// Reads plaintext. Call it until it needs input: a read may leave some behind.
    ///
    /// # Errors
    /// What came was not from the peer or not what TLS allows, or the connection was cut short.
    pub fn read(&mut self, into: &mut [u8]) -> io::Result<Plaintext> {
        match self.stream.ssl_read(into) {
            Ok(length) => Ok(Plaintext::Bytes(length)),
            Err(error) => match error.code() {
                ErrorCode::WANT_READ => Ok(Plaintext::NeedsInput),
                ErrorCode::ZERO_RETURN => Ok(Plaintext::Closed),
                _ => Err(broken(error)),
            },
        }
    }

    /// Encrypts all of the bytes; they are added to what is to be sent.
    ///
    /// # Errors
    /// The handshake is not complete, or the session has failed or was closed.
    pub fn write(&mut self, mut plaintext: &[u8]) -> io::Result<()> {
        while !plaintext.is_empty() {
            let written = self.stream.ssl_write(plaintext).map_err(broken)?;
            plaintext = plaintext.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// Says a proper goodbye, which is added to what is to be sent. Nothing can be written after it;
    /// what the peer still sends can be read.
    pub fn close(&mut self) {
        if self.is_established && !self.stream.get_shutdown().contains(ShutdownState::SENT) {
            // A session that has failed has nothing more to say.
            let _ = self.stream.shutdown();
        }
    }

    /// The distinguished name in the peer's certificate, as authorization rules have it:
    /// `CN=laptop.example.org,O=Example,C=GB`, in the order of the certificate. None before the
    /// handshake is complete, and for a peer whose certificate was not asked for.
    pub fn peer_name(&self) -> Option<String> {
        if !self.is_established || !self.has_verified_peer {
            return None;
        }
        let certificate = self.stream.ssl().peer_certificate()?;
        let encoded = certificate.subject_name().to_der().ok()?;
        name::describe(&encoded)
    }

    /// Asks the rule of that id whether the peer may come in. Rules are about the names in
    /// certificates: where none was asked for, there is nothing to ask, as in the reference.
    ///
    /// # Errors
    /// The rule says no, or there is none of that id. The handshake must be complete.
    pub fn authorize(&self, rule: &str, credentials: &Credentials) -> Result<(), Error> {
        if !self.is_established {
            return Err(Error::generic("TLS handshake is not complete"));
        }
        if !self.has_verified_peer {
            return Ok(());
        }
        let name = self.peer_name().ok_or_else(|| {
            Error::generic("Failed to get the distinguished name of the peer's certificate")
        })?;
        if credentials.authorization(rule)?.is_allowed(&name) {
            return Ok(());
        }
        Err(Error::generic(format!(
            "TLS x509 authz check for {name} is denied"
        )))
    }

    /// The version and the suite agreed on, for diagnostics, such as
    /// `TLSv1.3 TLS_AES_256_GCM_SHA384`.
    pub fn description(&self) -> String {
        let ssl = self.stream.ssl();
        let suite = ssl.current_cipher().map_or("", |suite| suite.name());
        format!("{} {suite}", ssl.version_str())
    }

    fn handshake_failure(&self, error: &openssl::ssl::Error) -> Error {
        let result = self.stream.ssl().verify_result();
        if result != X509VerifyResult::OK && self.has_verified_peer {
            let reason = match (result.as_raw(), &self.hostname) {
                (HOSTNAME_MISMATCH | IP_ADDRESS_MISMATCH, Some(hostname)) => {
                    format!("Certificate does not match the hostname {hostname}")
                }
                _ => verification_failure(result),
            };
            return Error::generic(reason);
        }
        let reason = match (error.ssl_error(), error.io_error()) {
            (Some(stack), _) => {
                let mut errors = stack.errors().iter();
                let reason = errors.find_map(openssl::error::Error::reason);
                reason.unwrap_or("protocol error").to_owned()
            }
            (None, Some(error)) => Error::reason(error),
            (None, None) => CUT_SHORT.to_owned(),
        };
        let peer = match self.role {
            Role::Client => "server",
            Role::Server => "client",
        };
        tracing::debug!("TLS handshake with a {peer} failed: {reason}");
        Error::generic(format!("TLS handshake failed: {reason}"))
    }
}

const CUT_SHORT: &str = "The TLS connection was non-properly terminated.";

// Values of X509_V_ERR_*, for which the openssl crate has no names.
const HOSTNAME_MISMATCH: i32 = 62;
const IP_ADDRESS_MISMATCH: i32 = 64;
/// The last is a bad signature: the issuer is another one of the same name.
const UNABLE_TO_GET_ISSUER: [i32; 6] = [2, 18, 19, 20, 21, 7];
const WEAK: [i32; 5] = [66, 67, 68, 5, 6];
const REVOKED: i32 = 23;
const NOT_YET_VALID: i32 = 9;
const EXPIRED: i32 = 10;

/// Why a certificate was found to be no good.
pub(super) fn verification_failure(result: X509VerifyResult) -> String {
    match result.as_raw() {
        code if UNABLE_TO_GET_ISSUER.contains(&code) => {
            "The certificate hasn't got a known issuer".to_owned()
        }
        code if WEAK.contains(&code) => "The certificate uses an insecure algorithm".to_owned(),
        REVOKED => "The certificate has been revoked".to_owned(),
        EXPIRED => "The certificate has expired".to_owned(),
        NOT_YET_VALID => "The certificate is not yet active".to_owned(),
        _ => format!("The certificate is not trusted ({})", result.error_string()),
    }
}

fn broken(error: openssl::ssl::Error) -> io::Error {
    match error.into_io_error() {
        Ok(error) => error,
        Err(error) => {
            let reason = match error.ssl_error() {
                Some(stack) => stack
                    .errors()
                    .iter()
                    .find_map(openssl::error::Error::reason),
                None => None,
            };
            io::Error::new(io::ErrorKind::InvalidData, reason.unwrap_or(CUT_SHORT))
        }
    }
}

/// The transport as OpenSSL sees it: memory.
#[derive(Default)]
struct Pipe {
    incoming: Queue,
    outgoing: Queue,
    is_at_end: bool,
}

/// Bytes in order. What is taken is given up when the queue is empty.
#[derive(Default)]
struct Queue {
    stored: Vec<u8>,
    taken: usize,
}

impl Queue {
    fn bytes(&self) -> &[u8] {
        self.stored.get(self.taken..).unwrap_or_default()
    }

    fn push(&mut self, bytes: &[u8]) {
        // Half of it taken: moving the rest down is cheaper than growing for ever.
        if self.taken > 0 && self.taken >= self.stored.len() / 2 {
            self.stored.drain(..self.taken);
            self.taken = 0;
        }
        self.stored.extend_from_slice(bytes);
    }

    fn consume(&mut self, count: usize) {
        self.taken = self.taken.saturating_add(count).min(self.stored.len());
        if self.taken == self.stored.len() {
            self.stored.clear();
            self.stored.shrink_to(KEPT_CAPACITY);
            self.taken = 0;
        }
    }
}

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let available = self.incoming.bytes();
        if available.is_empty() && !into.is_empty() {
            return match self.is_at_end {
                true => Ok(0),
                false => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
        let count = available.len().min(into.len());
        if let (Some(into), Some(from)) = (into.get_mut(..count), available.get(..count)) {
            into.copy_from_slice(from);
        }
        self.incoming.consume(count);
        Ok(count)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.outgoing.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_keeps_order_and_gives_up_what_is_taken() {
        let mut queue = Queue::default();
        queue.push(b"abc");
        queue.consume(2);
        queue.push(b"def");
        assert_eq!(queue.bytes(), b"cdef");
        queue.consume(100);
        assert_eq!(queue.bytes(), b"");
        queue.push(&vec![7; 1 << 20]);
        queue.consume(1 << 20);
        assert!(queue.stored.capacity() <= KEPT_CAPACITY);
    }
}
