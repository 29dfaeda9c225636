//! TLS over a stream. Nothing of the stream is handed on before the peer has proven who it is, and
//! its end counts as one only if the peer has said so: what comes of a connection that was cut short
//! ends with an error.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use stord_credentials::tls::{Handshake, Plaintext};
use stord_credentials::{Credentials, TlsCredentials, TlsSession};
use stord_qmp::Error;
use stord_qmp::schema::chardev::ChardevSocket;
use stord_qmp::schema::object::QCryptoTLSCredsEndpoint as Endpoint;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::Stream;

/// How much is read and encrypted at once: a record of TLS.
const RECORD: usize = 16 << 10;

/// How much may wait to be sent before writers wait too.
const WAITING_MAX: usize = 64 << 10;

/// How TLS is to be spoken on a device's connections.
pub struct Settings {
    own: Arc<TlsCredentials>,
    endpoint: Endpoint,
    rule: Option<String>,
    /// Where the rule is found whenever a client comes: it may come and go like any object.
    credentials: Arc<Credentials>,
}

impl Settings {
    /// What the options ask for, if anything.
    ///
    /// # Errors
    /// There are no such credentials, or they are for the other side.
    pub fn of(
        options: &ChardevSocket,
        credentials: &Arc<Credentials>,
    ) -> Result<Option<Self>, Error> {
        let Some(id) = &options.tls_creds else {
            return Ok(None);
        };
        let endpoint = match options.server.unwrap_or(true) {
            true => Endpoint::Server,
            false => Endpoint::Client,
        };
        Ok(Some(Self {
            own: credentials.tls(id, endpoint)?,
            endpoint,
            rule: options.tls_authz.clone(),
            credentials: Arc::clone(credentials),
        }))
    }

    /// Shakes hands with the peer, which must be that host if it is a server.
    ///
    /// # Errors
    /// The peer speaks no TLS, is not who it should be, or may not come in.
    pub async fn start(
        &self,
        mut stream: Box<dyn Stream>,
        hostname: Option<&str>,
    ) -> Result<Tls, Error> {
        let mut session = match self.endpoint {
            Endpoint::Server => self.own.server_session()?,
            Endpoint::Client => self.own.client_session(hostname)?,
        };
        shake(&mut *stream, &mut session).await?;
        let tls = Tls { stream, session };
        if let Some(rule) = &self.rule {
            tls.session.authorize(rule, &self.credentials)?;
        }
        Ok(tls)
    }
}

async fn shake(stream: &mut dyn Stream, session: &mut TlsSession) -> Result<(), Error> {
    let mut received = vec![0; RECORD];
    loop {
        let progress = session.handshake();
        // An alert too, if it comes to that.
        let sent = stream.write_all(session.output()).await;
        session.consume_output(session.output().len());
        let progress = progress?;
        sent.map_err(cut_short)?;
        stream.flush().await.map_err(cut_short)?;
        if progress == Handshake::Complete {
            return Ok(());
        }
        let count = stream.read(&mut received).await.map_err(cut_short)?;
        match received.get(..count) {
            None | Some([]) => session.end_of_input(),
            Some(received) => session.feed(received),
        }
    }
}

fn cut_short(error: io::Error) -> Error {
    let reason = Error::reason(&error);
    Error::generic(format!("TLS handshake failed: {reason}")).with_source(error)
}

/// A stream over which TLS is spoken.
pub struct Tls {
    stream: Box<dyn Stream>,
    session: TlsSession,
}

impl Tls {
    /// Sends what waits, until no more than that many bytes wait.
    fn poll_send(&mut self, cx: &mut Context<'_>, rest: usize) -> Poll<io::Result<()>> {
        while self.session.output().len() > rest {
            let output = self.session.output();
            let sent = ready!(Pin::new(&mut self.stream).poll_write(cx, output))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.session.consume_output(sent);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Tls {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            match this.session.read(buf.initialize_unfilled())? {
                Plaintext::Bytes(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Plaintext::Closed => return Poll::Ready(Ok(())),
                Plaintext::NeedsInput => {}
            }
            // TLS may have something to say for itself. Whether it can be sent now is of no
            // importance for reading.
            if let Poll::Ready(sent) = this.poll_send(cx, 0) {
                sent?;
            }
            let mut received = [0; RECORD];
            let mut received = ReadBuf::new(&mut received);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut received))?;
            match received.filled() {
                [] => this.session.end_of_input(),
                received => this.session.feed(received),
            }
        }
    }
}

impl AsyncWrite for Tls {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_send(cx, WAITING_MAX))?;
        let bytes = bytes.get(..RECORD).unwrap_or(bytes);
        self.session.write(bytes)?;
        // The bytes are taken in, whether or not they can be sent now.
        if let Poll::Ready(sent) = self.poll_send(cx, 0) {
            sent?;
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx, 0))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.session.close();
        ready!(self.poll_send(cx, 0))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        // A goodbye, if there is room for it at once.
        let mut cx = Context::from_waker(Waker::noop());
        let _ = Pin::new(self).poll_shutdown(&mut cx);
    }
}
