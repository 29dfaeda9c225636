//! The device that drops its output and never has input.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};

use super::backend::Connecting;
use super::{Backend, Connection};

/// Nothing.
#[derive(Default)]
pub struct Null {
    was_connected: Cell<bool>,
}

impl Backend for Null {
    fn kind(&self) -> &'static str {
        "null"
    }

    fn connect(&self, _: usize) -> Connecting<'_> {
        Box::pin(async {
            if self.was_connected.replace(true) {
                std::future::pending::<()>().await;
            }
            Connection {
                reader: Box::new(Silence),
                writer: Box::new(tokio::io::sink()),
            }
        })
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
