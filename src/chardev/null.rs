//! The device that drops its output and never has input.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};

use super::Connection;

/// A connection to nothing.
pub fn open() -> Connection {
    Connection {
        reader: Box::new(Silence),
        writer: Box::new(tokio::io::sink()),
    }
}

/// Input that neither comes nor ends.
pub struct Silence;

impl AsyncRead for Silence {
    fn poll_read(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        _buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}
