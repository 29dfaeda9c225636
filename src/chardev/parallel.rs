//! The device that is a parallel port. Nothing passes through it as bytes, in the reference neither:
//! only a guest's device would drive its lines.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use nix::libc;
use nix::sys::stat::major;
use stord_qmp::Error;
use stord_sockets::fdset;

use super::Backend;
use super::backend::Connecting;
use super::file::could_not_open;
use super::null::Null;

/// The major device number of ports that user programs drive.
const PARPORT_MAJOR: u64 = 99;

/// A parallel port.
pub struct Parallel {
    _port: File,
    nothing: Null,
}

impl Parallel {
    /// Opens the port.
    ///
    /// # Errors
    /// There is no such device, or it is no parallel port.
    pub fn open(path: &str) -> Result<Self, Error> {
        fdset::refuse(path).map_err(|error| could_not_open(path, error))?;
        let port = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| could_not_open(path, error))?;
        let is_port = port.metadata().is_ok_and(|found| {
            found.file_type().is_char_device() && major(found.rdev()) == PARPORT_MAJOR
        });
        if !is_port {
            return Err(Error::generic(
                "not a parallel port: Inappropriate ioctl for device",
            ));
        }
        Ok(Self {
            _port: port,
            nothing: Null::default(),
        })
    }
}

impl Backend for Parallel {
    fn kind(&self) -> &'static str {
        "parallel"
    }

    fn connect(&self, user: usize) -> Connecting<'_> {
        self.nothing.connect(user)
    }
}
