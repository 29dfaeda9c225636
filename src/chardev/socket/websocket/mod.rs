//! WebSocket (RFC 6455) as a server speaks it: one handshake at the start, then what is written
//! goes out as binary messages, and what comes in is the content of messages without their bounds.

mod frame;
mod handshake;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::Stream;
use frame::{Decoder, Opcode, close_code};
use handshake::Request;

/// How much is read at once, and the most that one message carries of what is written.
const PIECE: usize = 16 << 10;

/// How much may wait to be sent before writers wait too.
const WAITING_MAX: usize = 64 << 10;

/// A stream in messages.
pub struct Websocket {
    stream: Box<dyn Stream>,
    decoder: Decoder,
    /// What came in and was not read yet.
    received: Vec<u8>,
    read: usize,
    waiting: Vec<u8>,
    sent: usize,
    has_said_goodbye: bool,
    is_at_end: bool,
}

impl Websocket {
    /// Answers the client's request.
    ///
    /// # Errors
    /// The client is gone, or asks for something else; it has been told so.
    pub async fn accept(mut stream: Box<dyn Stream>) -> io::Result<Self> {
        let mut text = Vec::new();
        let (answer, rest) = loop {
            let mut piece = [0; 1024];
            let count = stream.read(&mut piece).await?;
            text.extend_from_slice(piece.get(..count).unwrap_or_default());
            match Request::parse(&text) {
                Ok(Some((request, length))) => {
                    break (request.answer(), text.split_off(length.min(text.len())));
                }
                Ok(None) if count == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(None) => {}
                Err(refusal) => break (Err(refusal), Vec::new()),
            }
        };
        match answer {
            Ok(answer) => stream.write_all(answer.as_bytes()).await?,
            Err(refusal) => {
                stream.write_all(refusal.answer().as_bytes()).await?;
                stream.shutdown().await?;
                return Err(io::Error::new(io::ErrorKind::InvalidData, refusal.reason));
            }
        }
        stream.flush().await?;
        let mut websocket = Self {
            stream,
            decoder: Decoder::default(),
            received: Vec::new(),
            read: 0,
            waiting: Vec::new(),
            sent: 0,
            has_said_goodbye: false,
            is_at_end: false,
        };
        websocket.take_in(&rest)?;
        Ok(websocket)
    }

    /// Takes in what has come, and answers what the protocol wants answered.
    fn take_in(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Self {
            decoder,
            received,
            waiting,
            ..
        } = self;
        let mut control = Vec::new();
        let decoded = decoder.decode(bytes, received, &mut control);
        for (opcode, content) in control {
            match opcode {
                Opcode::Ping => frame::encode(Opcode::Pong, &content, waiting),
                Opcode::Close => {
                    self.is_at_end = true;
                    if !self.has_said_goodbye {
                        self.has_said_goodbye = true;
                        frame::encode(Opcode::Close, &content, waiting);
                    }
                }
                _ => {}
            }
        }
        decoded.map_err(|violation| {
            if !self.has_said_goodbye {
                self.has_said_goodbye = true;
                let content = violation.code.to_be_bytes();
                frame::encode(Opcode::Close, &content, &mut self.waiting);
            }
            io::Error::new(io::ErrorKind::InvalidData, violation.reason)
        })
    }

    /// Sends what waits, until no more than that many bytes wait.
    fn poll_send(&mut self, cx: &mut Context<'_>, rest: usize) -> Poll<io::Result<()>> {
        while self.waiting.len().saturating_sub(self.sent) > rest {
            let waiting = self.waiting.get(self.sent..).unwrap_or_default();
            let sent = ready!(Pin::new(&mut self.stream).poll_write(cx, waiting))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += sent;
        }
        if self.sent == self.waiting.len() {
            self.waiting.clear();
            self.sent = 0;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Websocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            let received = this.received.get(this.read..).unwrap_or_default();
            if !received.is_empty() {
                let count = received.len().min(buf.remaining());
                buf.put_slice(received.get(..count).unwrap_or_default());
                this.read += count;
                return Poll::Ready(Ok(()));
            }
            this.received.clear();
            this.read = 0;
            // Answers of the protocol; whether they can be sent now is of no importance for reading.
            // A client that pings without reading the answers is not read from.
            match this.poll_send(cx, 0) {
                Poll::Ready(sent) => {
                    sent?;
                    ready!(Pin::new(&mut this.stream).poll_flush(cx))?;
                }
                Poll::Pending => ready!(this.poll_send(cx, WAITING_MAX))?,
            }
            if this.is_at_end {
                return Poll::Ready(Ok(()));
            }
            let mut piece = [0; PIECE];
            let mut piece = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut piece))?;
            match piece.filled() {
                [] => this.is_at_end = true,
                bytes => this.take_in(bytes)?,
            }
        }
    }
}

impl AsyncWrite for Websocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.has_said_goodbye {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(self.poll_send(cx, WAITING_MAX))?;
        let bytes = bytes.get(..PIECE).unwrap_or(bytes);
        frame::encode(Opcode::Binary, bytes, &mut self.waiting);
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
        if !self.has_said_goodbye {
            self.has_said_goodbye = true;
            let code = close_code::NORMAL.to_be_bytes();
            frame::encode(Opcode::Close, &code, &mut self.waiting);
        }
        ready!(self.poll_send(cx, 0))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Drop for Websocket {
    fn drop(&mut self) {
        // A goodbye, if there is room for it at once.
        let mut cx = Context::from_waker(Waker::noop());
        let _ = Pin::new(self).poll_shutdown(&mut cx);
    }
}
