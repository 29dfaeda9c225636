//! The device that is the master of a pseudo terminal. It is connected as long as somebody has the
//! terminal open.
//!
//! The kernel tells when the last one has closed the terminal, but not when the first one opens it,
//! so that is looked for every now and then.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use stord_qmp::Error;
use stord_qmp::schema::chardev::ChardevPty;
use tokio::io::{AsyncRead, ReadBuf};

use super::backend::Connecting;
use super::{Backend, Connection};
use crate::report::reason;
use stord_sockets::Descriptor;

/// How often to look whether somebody has opened the terminal.
const INTERVAL: Duration = Duration::from_millis(100);

/// A pseudo terminal.
pub struct Pty {
    master: OwnedFd,
    name: String,
    link: Option<PathBuf>,
}

impl Pty {
    /// Makes a pseudo terminal, and the link to it.
    ///
    /// # Errors
    /// There are no more of them, or the link cannot be made.
    pub fn open(options: &ChardevPty) -> Result<Self, Error> {
        let (master, name) = make().map_err(|errno| {
            let reason = reason(&errno.into());
            Error::generic(format!("Failed to create PTY: {reason}"))
        })?;
        let link = match &options.path {
            None => None,
            Some(path) => Some(link(&name, path).map_err(|error| {
                let reason = reason(&error);
                Error::generic(format!("Failed to create PTY symlink: {reason}")).with_source(error)
            })?),
        };
        Ok(Self { master, name, link })
    }

    fn is_open(&self) -> bool {
        let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLOUT)];
        let polled = poll(&mut fds, PollTimeout::ZERO);
        let [fd] = fds;
        let is_hung_up = (fd.revents()).is_some_and(|events| events.contains(PollFlags::POLLHUP));
        polled.is_ok() && !is_hung_up
    }

    fn connection(&self) -> io::Result<Connection> {
        let reader = Descriptor::new(self.master.try_clone()?)?;
        let writer = Descriptor::new(self.master.try_clone()?)?;
        Ok(Connection {
            reader: Box::new(Reader(reader)),
            writer: Box::new(writer),
        })
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            let _ = fs::remove_file(link);
        }
    }
}

impl Backend for Pty {
    fn kind(&self) -> &'static str {
        "pty"
    }

    fn filename(&self) -> String {
        format!("pty:{}", self.name)
    }

    fn connect(&self, _: usize) -> Connecting<'_> {
        Box::pin(async {
            loop {
                if self.is_open() {
                    match self.connection() {
                        Ok(connection) => return connection,
                        Err(error) => {
                            tracing::warn!("cannot use {}: {}", self.name, reason(&error));
                        }
                    }
                }
                tokio::time::sleep(INTERVAL).await;
            }
        })
    }

    fn pty(&self) -> Option<String> {
        Some(self.name.clone())
    }
}

fn make() -> nix::Result<(OwnedFd, String)> {
    let master: PtyMaster =
        posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname_r(&master)?;
    // Opened once, it is in the state of one that nobody has open any more.
    let terminal = fs::OpenOptions::new().read(true).write(true).open(&name);
    let terminal = terminal.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
    let mut mode = tcgetattr(&terminal)?;
    cfmakeraw(&mut mode);
    tcsetattr(&terminal, SetArg::TCSAFLUSH, &mode)?;
    Ok((OwnedFd::from(master), name))
}

fn link(name: &str, path: &str) -> io::Result<PathBuf> {
    // Absolute, because the working directory is another one when the link is removed.
    let path = std::path::absolute(path)?;
    symlink(name, &path)?;
    Ok(path)
}

/// The terminal's output, which ends when nobody has it open any more.
struct Reader(Descriptor);

impl AsyncRead for Reader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.0).poll_read(cx, buf) {
            Poll::Ready(Err(error)) if error.raw_os_error() == Some(nix::libc::EIO) => {
                Poll::Ready(Ok(()))
            }
            other => other,
        }
    }
}
