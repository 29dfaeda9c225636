//! Nonblocking descriptors of one context: eventfds, sockets, `/dev/fuse`.
//!
//! A wait for readiness is level-triggered: it ends at once when the descriptor is ready, however
//! often that was said before, so that a user need not read until EAGAIN. Waits end with
//! ECANCELED when the context is told to stop.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::executor;
use crate::iovec::IoVec;
use crate::op::{Action, Descriptor, Op, Request, When};
use crate::syscall;

/// A nonblocking descriptor, waited for and transferred by one context.
#[derive(Debug)]
pub struct PolledFd {
    fd: Rc<OwnedFd>,
    /// How an operation is kept from waiting: the kernel must be told for sockets and eventfds, for
    /// which a ring waits in spite of O_NONBLOCK, and refuses to be told for other kinds.
    at_once: Cell<When>,
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
        Ok(PolledFd {
            fd: Rc::new(fd),
            at_once: Cell::new(When::Now),
        })
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
        let events = u32::from(events.cast_unsigned());
        self.wait(Action::Poll { events }, IoVec::new())
            .await
            .map(drop)
    }

    /// Reads once, at once.
    ///
    /// # Errors
    ///
    /// Those of read(2); EAGAIN when there is nothing yet.
    pub fn try_read(&self, dst: &IoVec) -> Result<usize, Errno> {
        self.attempt(Action::Receive(When::Unspecified), dst)
    }

    /// Writes once, at once, and gives the number of bytes taken.
    ///
    /// # Errors
    ///
    /// Those of write(2); EAGAIN when there is no room.
    pub fn try_write(&self, src: &IoVec) -> Result<usize, Errno> {
        self.attempt(Action::Send(When::Unspecified), src)
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
        self.once(Action::Receive, dst).await
    }

    /// Writes once, together with whatever else the context submits in this turn of its loop, and
    /// gives the number of bytes taken.
    ///
    /// # Errors
    ///
    /// Those of write(2); EAGAIN when there is no room.
    pub async fn write(&self, src: IoVec) -> Result<usize, Errno> {
        self.once(Action::Send, src).await
    }

    async fn once(&self, action: fn(When) -> Action, buffers: IoVec) -> Result<usize, Errno> {
        let when = self.at_once.get();
        let done = self.submit(action(when), buffers).await;
        match transferred(done.result) {
            // Such a descriptor is asked without the flag, and O_NONBLOCK has the same effect.
            Err(Errno::EOPNOTSUPP) if when == When::Now => {
                self.at_once.set(When::Unspecified);
                let done = self.submit(action(When::Unspecified), done.buffers).await;
                transferred(done.result)
            }
            result => result,
        }
    }

    /// Waits until there is something to read and reads it. On a ring this is submitted as a
    /// whole, so that the next message of a stream costs one turn of the loop.
    ///
    /// # Errors
    ///
    /// Those of read(2), but for EAGAIN; ECANCELED when the context is about to stop.
    pub async fn read_when_ready(&self, dst: IoVec) -> Result<usize, Errno> {
        self.wait(Action::Receive(When::Ready), dst).await
    }

    /// Waits until there is room to write and writes what fits. Gives the number of bytes taken.
    ///
    /// # Errors
    ///
    /// Those of write(2), but for EAGAIN; ECANCELED when the context is about to stop.
    pub async fn write_when_ready(&self, src: IoVec) -> Result<usize, Errno> {
        self.wait(Action::Send(When::Ready), src).await
    }

    async fn wait(&self, action: Action, mut buffers: IoVec) -> Result<usize, Errno> {
        loop {
            if executor::with(|local| local.stopping.get()) {
                return Err(Errno::ECANCELED);
            }
            let done = self.submit(action, buffers).await;
            match transferred(done.result) {
                // Somebody else was faster.
                Err(Errno::EAGAIN | Errno::EINTR) => buffers = done.buffers,
                result => return result,
            }
        }
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
            batch: 0,
        };
        executor::with(|local| local.submit(request))
    }
}

fn transferred(result: i32) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::from_raw(result.wrapping_neg()))
}
