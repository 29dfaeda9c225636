//! Telnet (RFC 854) as a server speaks it: options are offered once, at the start, and whatever the
//! client says about options is taken out of what it sends. Output passes as it is.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use stord_qmp::schema::chardev::ChardevSocket;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::Stream;

const SE: u8 = 240;
const SB: u8 = 250;
const WILL: u8 = 251;
const DO: u8 = 253;
const DONT: u8 = 254;
const IAC: u8 = 255;

const BINARY: u8 = 0;
const ECHO: u8 = 1;
const SUPPRESS_GO_AHEAD: u8 = 3;
const TERMINAL_TYPE: u8 = 24;
const END_OF_RECORD: u8 = 25;

/// What clients are offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Characters, one by one.
    Plain,
    /// The records of a 3270 terminal.
    Tn3270,
}

impl Kind {
    /// The kind that the options ask for, if any.
    pub fn of(options: &ChardevSocket) -> Option<Self> {
        if options.tn3270.unwrap_or(false) {
            Some(Self::Tn3270)
        } else {
            options.telnet.unwrap_or(false).then_some(Self::Plain)
        }
    }

    fn greeting(self) -> &'static [u8] {
        match self {
            Self::Plain => &[
                IAC,
                WILL,
                ECHO,
                IAC,
                WILL,
                SUPPRESS_GO_AHEAD,
                IAC,
                WILL,
                BINARY,
                IAC,
                DO,
                BINARY,
            ],
            Self::Tn3270 => &[
                IAC,
                DO,
                END_OF_RECORD,
                IAC,
                WILL,
                END_OF_RECORD,
                IAC,
                DO,
                BINARY,
                IAC,
                WILL,
                BINARY,
                IAC,
                DO,
                TERMINAL_TYPE,
                IAC,
                SB,
                TERMINAL_TYPE,
                1,
                IAC,
                SE,
            ],
        }
    }
}

/// A stream without what belongs to telnet.
pub struct Telnet {
    stream: Box<dyn Stream>,
    state: State,
}

/// What has been read of a sequence that belongs to telnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Data,
    Command,
    Option,
    Subnegotiation,
    SubnegotiationCommand,
}

impl State {
    /// The state after a byte, and whether the byte is data.
    fn after(self, byte: u8) -> (Self, bool) {
        match (self, byte) {
            (Self::Data, IAC) => (Self::Command, false),
            (Self::Data, _) | (Self::Command, IAC) => (Self::Data, true),
            (Self::Command, WILL..=DONT) => (Self::Option, false),
            (Self::Command, SB) => (Self::Subnegotiation, false),
            (Self::Subnegotiation, IAC) => (Self::SubnegotiationCommand, false),
            (Self::SubnegotiationCommand, SE) | (Self::Command | Self::Option, _) => {
                (Self::Data, false)
            }
            (Self::Subnegotiation | Self::SubnegotiationCommand, _) => {
                (Self::Subnegotiation, false)
            }
        }
    }
}

impl Telnet {
    /// Offers the options.
    ///
    /// # Errors
    /// The client is gone.
    pub async fn greet(mut stream: Box<dyn Stream>, kind: Kind) -> io::Result<Self> {
        stream.write_all(kind.greeting()).await?;
        Ok(Self {
            stream,
            state: State::Data,
        })
    }
}

impl AsyncRead for Telnet {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut bytes = vec![0; buf.remaining()];
        loop {
            let mut received = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut received))?;
            let received = received.filled();
            for byte in received {
                let (state, is_data) = self.state.after(*byte);
                self.state = state;
                if is_data {
                    buf.put_slice(&[*byte]);
                }
            }
            // Nothing left of what came does not mean that nothing comes any more.
            if received.is_empty() || !buf.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Telnet {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(bytes: &[u8]) -> Vec<u8> {
        let mut state = State::Data;
        let mut data = Vec::new();
        for byte in bytes {
            let (next, is_data) = state.after(*byte);
            state = next;
            data.extend(is_data.then_some(*byte));
        }
        data
    }

    #[test]
    fn only_data_is_left() {
        assert_eq!(data(b"plain\r\0"), b"plain\r\0");
        assert_eq!(
            data(&[b'a', IAC, DO, ECHO, b'b', IAC, IAC, b'c']),
            b"ab\xffc"
        );
        assert_eq!(data(&[IAC, 241, b'a', IAC, 243, b'b']), b"ab");
        let terminal = [IAC, SB, TERMINAL_TYPE, 0, b'X', IAC, IAC, IAC, SE, b'a'];
        assert_eq!(data(&terminal), b"a");
        assert_eq!(data(&[IAC, 239, b'a', IAC, SB, 1]), b"a");
    }
}
