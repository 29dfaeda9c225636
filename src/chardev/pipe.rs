//! The device that is a pair of FIFOs, `PATH.in` to read from and `PATH.out` to write to, or one
//! FIFO that is both.

use std::cell::Cell;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;
use stord_qmp::Error;

use super::backend::Connecting;
use super::file::{could_not_open, once};
use super::{Backend, Connection};
use stord_sockets::{Descriptor, fdset};

/// FIFOs.
pub struct Pipe(Cell<Option<Connection>>);

impl Pipe {
    /// Opens the FIFOs for reading and writing both, so that neither end waits for a peer and
    /// neither sees its end.
    ///
    /// # Errors
    /// There are none.
    pub fn open(path: &str) -> Result<Self, Error> {
        let pair = (open(&format!("{path}.in")), open(&format!("{path}.out")));
        let (input, output) = match pair {
            (Ok(input), Ok(output)) => (input, output),
            _ => {
                let failed = |error| could_not_open(path, error);
                let both = open(path).map_err(failed)?;
                (both.try_clone().map_err(failed)?, both)
            }
        };
        let prepare = |fd| Descriptor::new(fd).map_err(|error| could_not_open(path, error));
        Ok(Self(Cell::new(Some(Connection {
            reader: Box::new(prepare(input)?),
            writer: Box::new(prepare(output)?),
        }))))
    }
}

impl Backend for Pipe {
    fn kind(&self) -> &'static str {
        "pipe"
    }

    fn connect(&self, _: usize) -> Connecting<'_> {
        Box::pin(once(&self.0))
    }
}

fn open(path: &str) -> std::io::Result<OwnedFd> {
    fdset::refuse(path)?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map(OwnedFd::from)
}
