//! The device that writes to a file, and reads from another if one is given. The files may be
//! FIFOs and terminals: reading and writing happens on threads that may block.

use stord_qmp::Error;
use stord_qmp::schema::chardev::ChardevFile;
use tokio::fs::{File, OpenOptions};
use tokio::io::AsyncRead;

use super::{Connection, null};
use crate::report::reason;

/// Opens both files.
///
/// # Errors
/// One of them cannot be opened.
pub async fn open(options: &ChardevFile) -> Result<Connection, Error> {
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
    Ok(Connection {
        reader,
        writer: Box::new(writer),
    })
}

async fn open_file(mode: &OpenOptions, path: &str) -> Result<File, Error> {
    mode.open(path).await.map_err(|error| {
        let reason = reason(&error);
        Error::generic(format!("Could not open '{path}': {reason}")).with_source(error)
    })
}
