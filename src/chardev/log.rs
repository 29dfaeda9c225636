//! `logfile`: everything written to a device is copied to a file, as far as the device has taken it.

use std::io::{self, Write};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use stord_qmp::Error;
use stord_qmp::schema::chardev::ChardevCommon;
use stord_sockets::fdset;
use tokio::io::AsyncWrite;

use super::Connection;
use crate::report::reason;

/// A log.
#[derive(Clone)]
pub struct Log(Rc<std::fs::File>);

impl Log {
    /// Opens the log, if there is to be one.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub async fn open(common: &ChardevCommon) -> Result<Option<Self>, Error> {
        let Some(path) = &common.logfile else {
            return Ok(None);
        };
        let append = common.logappend.unwrap_or(false);
        let mut mode = tokio::fs::OpenOptions::new();
        mode.write(true)
            .create(true)
            .append(append)
            .truncate(!append);
        let opened = match fdset::refuse(path) {
            Ok(()) => mode.open(path).await,
            Err(error) => Err(error),
        };
        let file = opened.map_err(|error| {
            let reason = reason(&error);
            Error::generic(format!("Could not create '{path}': {reason}")).with_source(error)
        })?;
        Ok(Some(Self(Rc::new(file.into_std().await))))
    }

    /// Copies what is written to the connection.
    pub fn watch(&self, connection: Connection) -> Connection {
        let Connection { reader, writer } = connection;
        let log = self.clone();
        Connection {
            reader,
            writer: Box::new(Logged { writer, log }),
        }
    }
}

struct Logged {
    writer: Box<dyn AsyncWrite + Unpin>,
    log: Log,
}

impl AsyncWrite for Logged {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.writer).poll_write(cx, bytes))?;
        let taken = bytes.get(..count).unwrap_or_default();
        if let Err(error) = (&*self.log.0).write_all(taken) {
            tracing::warn!("cannot write to a log file: {}", reason(&error));
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}
