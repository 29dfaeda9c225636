//! The device that writes to a file, and reads from another if one is given. The files may be
//! FIFOs and terminals: reading and writing happens on threads that may block.

use std::cell::Cell;

use stord_qmp::Error;
use stord_qmp::schema::chardev::ChardevFile;
use stord_sockets::fdset;
use tokio::fs::OpenOptions;
use tokio::io::AsyncRead;

use super::backend::Connecting;
use super::{Backend, Connection, null};
use crate::report::reason;

/// One or two files.
pub struct File(Cell<Option<Connection>>);

impl File {
    /// Opens both files.
    ///
    /// # Errors
    /// One of them cannot be opened.
    pub async fn open(options: &ChardevFile) -> Result<Self, Error> {
        let append = options.append.unwrap_or(false);
        let mut mode = OpenOptions::new();
        mode.write(true)
            .create(true)
            .append(append)
            .truncate(!append);
        let writer = open_file(&mode, &options.out).await?;
        let reader: Box<dyn AsyncRead + Unpin> = match &options.r#in {
            None => Box::new(null::Silence),
            Some(path) => Box::new(open_file(OpenOptions::new().read(true), path).await?),
        };
        Ok(Self(Cell::new(Some(Connection {
            reader,
            writer: Box::new(writer),
        }))))
    }
}

impl Backend for File {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn connect(&self, _: usize) -> Connecting<'_> {
        Box::pin(once(&self.0))
    }
}

/// The connection, the first time; then none ever.
pub async fn once(connection: &Cell<Option<Connection>>) -> Connection {
    match connection.take() {
        Some(connection) => connection,
        None => std::future::pending().await,
    }
}

async fn open_file(mode: &OpenOptions, path: &str) -> Result<tokio::fs::File, Error> {
    let failed = |error| could_not_open(path, error);
    fdset::refuse(path).map_err(failed)?;
    mode.open(path).await.map_err(failed)
}

/// The error of a file that cannot be opened.
pub fn could_not_open(path: &str, error: std::io::Error) -> Error {
    let reason = reason(&error);
    Error::generic(format!("Could not open '{path}': {reason}")).with_source(error)
}
