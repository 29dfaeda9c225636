//! The device that is a serial port, at 115200 baud, eight data bits, no parity, one stop bit, and
//! without any processing of what passes.

use std::cell::Cell;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;
use nix::sys::termios::{
    BaudRate, ControlFlags, SetArg, cfmakeraw, cfsetspeed, tcgetattr, tcsendbreak, tcsetattr,
};
use stord_qmp::Error;

use super::backend::Connecting;
use super::file::{could_not_open, once};
use super::{Backend, Connection};
use stord_sockets::{Descriptor, fdset};

/// A serial port.
pub struct Serial {
    port: OwnedFd,
    connection: Cell<Option<Connection>>,
}

impl Serial {
    /// Opens the port.
    ///
    /// # Errors
    /// There is no such device.
    pub fn open(path: &str) -> Result<Self, Error> {
        let failed = |error| could_not_open(path, error);
        fdset::refuse(path).map_err(failed)?;
        let port = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(failed)?;
        let port = OwnedFd::from(port);
        set_line(&port);
        let duplicate = || port.try_clone().map_err(failed);
        let connection = match (Descriptor::new(duplicate()?), Descriptor::new(duplicate()?)) {
            (Ok(reader), Ok(writer)) => Connection {
                reader: Box::new(reader),
                writer: Box::new(writer),
            },
            // What cannot be waited for is no port but a regular file.
            _ => Connection {
                reader: Box::new(tokio::fs::File::from_std(duplicate()?.into())),
                writer: Box::new(tokio::fs::File::from_std(duplicate()?.into())),
            },
        };
        Ok(Self {
            port,
            connection: Cell::new(Some(connection)),
        })
    }
}

impl Backend for Serial {
    fn kind(&self) -> &'static str {
        "serial"
    }

    fn connect(&self, _: usize) -> Connecting<'_> {
        Box::pin(once(&self.connection))
    }

    fn send_break(&self) {
        if let Err(errno) = tcsendbreak(&self.port, 0) {
            tracing::warn!("cannot send a break: {errno}");
        }
    }
}

/// Sets the line, if it is one.
fn set_line(port: &OwnedFd) {
    let Ok(mut line) = tcgetattr(port) else {
        return;
    };
    cfmakeraw(&mut line);
    line.control_flags -= ControlFlags::PARENB | ControlFlags::CSTOPB | ControlFlags::CRTSCTS;
    line.control_flags |= ControlFlags::CS8 | ControlFlags::CREAD | ControlFlags::CLOCAL;
    let set = cfsetspeed(&mut line, BaudRate::B115200)
        .and_then(|()| tcsetattr(port, SetArg::TCSANOW, &line));
    if let Err(errno) = set {
        tracing::warn!("cannot set a serial line: {errno}");
    }
}
