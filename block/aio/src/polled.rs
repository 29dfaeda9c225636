//! Nonblocking descriptors of one context: eventfds, sockets, `/dev/fuse`.
//!
//! A wait for readiness is level-triggered: it ends at once when the descriptor is ready, however
//! often that was said before, so that a user need not read until EAGAIN. Waits end with
//! ECANCELED when the context is told to stop.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::executor;
use crate::iovec::IoVec;
use crate::op::{Action, Descriptor, Op, Request, STREAM};
use crate::syscall;

/// A nonblocking descriptor, waited for and transferred by one context.
#[derive(Debug)]
pub struct PolledFd {
    fd: Rc<OwnedFd>,
}

impl PolledFd {
    /// Takes over a descriptor and makes it nonblocking.
    ///
    /// # Errors
    ///
    /// Those of fcntl(2).
    pub fn new(fd: OwnedFd) -> io::Result<PolledFd> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(PolledFd { fd: Rc::new(fd) })
    }

    /// Waits until there is something to read, an end of the stream, or an error to be read.
    ///
    /// # Errors
    ///
    /// ECANCELED when the context is about to stop.
    pub async fn readable(&self) -> Result<(), Errno> {
        self.ready(libc::POLLIN).await
    }

    /// Waits until something can be written, or a write would fail.
    ///
    /// # Errors
    ///
    /// ECANCELED when the context is about to stop.
    pub async fn writable(&self) -> Result<(), Errno> {
        self.ready(libc::POLLOUT).await
    }

    async fn ready(&self, events: i16) -> Result<(), Errno> {
        let action = Action::Poll {
            events: u32::from(events.cast_unsigned()),
        };
        if executor::with(|local| local.stopping.get()) {
            return Err(Errno::ECANCELED);
        }
        let done = self.submit(action, IoVec::new()).await;
        transferred(done.result).map(drop)
    }

    /// Reads once, at once.
    ///
    /// # Errors
    ///
    /// Those of read(2); EAGAIN when there is nothing yet.
    pub fn try_read(&self, dst: &IoVec) -> Result<usize, Errno> {
        self.attempt(Action::Read { offset: STREAM }, dst)
    }

    /// Writes once, at once, and gives the number of bytes taken.
    ///
    /// # Errors
    ///
    /// Those of write(2); EAGAIN when there is no room.
    pub fn try_write(&self, src: &IoVec) -> Result<usize, Errno> {
        self.attempt(WRITE, src)
    }

    fn attempt(&self, action: Action, buffers: &IoVec) -> Result<usize, Errno> {
        loop {
            match transferred(syscall::attempt(self.fd.as_raw_fd(), action, buffers)) {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }

    /// Reads once, together with whatever else the context submits in this turn of its loop.
    ///
    /// # Errors
    ///
    /// Those of read(2); EAGAIN when there is nothing yet.
    pub async fn read(&self, dst: IoVec) -> Result<usize, Errno> {
        let done = self.submit(Action::Read { offset: STREAM }, dst).await;
        transferred(done.result)
    }

    /// Writes once, together with whatever else the context submits in this turn of its loop, and
    /// gives the number of bytes taken.
    ///
    /// # Errors
    ///
    /// Those of write(2); EAGAIN when there is no room.
    pub async fn write(&self, src: IoVec) -> Result<usize, Errno> {
        let done = self.submit(WRITE, src).await;
        transferred(done.result)
    }

    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn submit(&self, action: Action, buffers: IoVec) -> Op {
        let request = Request {
            descriptor: Descriptor::Local(Rc::clone(&self.fd)),
            action,
            buffers,
        };
        executor::with(|local| local.submit(request))
    }
}

const WRITE: Action = Action::Write {
    offset: STREAM,
    durable: false,
};

fn transferred(result: i32) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::from_raw(result.wrapping_neg()))
}
