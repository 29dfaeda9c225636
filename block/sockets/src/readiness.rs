//! Waits on the control thread until a descriptor of any kind can be read or written.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{read, write};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// A non-blocking descriptor that can be waited for.
pub struct Polled<T: AsFd>(AsyncFd<Held<T>>);

struct Held<T>(T);

impl<T: AsFd> AsRawFd for Held<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl<T: AsFd> Polled<T> {
    /// Prepares for waiting. The descriptor must be non-blocking. Needs a tokio runtime.
    ///
    /// # Errors
    /// It is of a kind that is always ready, such as a regular file.
    #[expect(
        deprecated,
        reason = "what took its place is unsafe, for types whose descriptor changes or is not \
                  theirs; those that implement AsFd own or borrow theirs as long as they live"
    )]
    pub fn new(inner: T, interest: Interest) -> io::Result<Self> {
        AsyncFd::with_interest(Held(inner), interest).map(Self)
    }

    /// What was waited for, which no one waits for any more.
    pub fn into_inner(self) -> T {
        self.0.into_inner().0
    }

    /// Does a transfer if it can be done, else the task is woken when it may be.
    pub fn poll_read<R>(
        &self,
        cx: &mut Context<'_>,
        mut transfer: impl FnMut(&T) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            if let Ok(result) = guard.try_io(|held| transfer(&held.get_ref().0)) {
                return Poll::Ready(result);
            }
        }
    }

    /// Does a transfer as soon as it does not give `WouldBlock`.
    ///
    /// # Errors
    /// Those of the transfer.
    pub async fn transfer<R>(
        &self,
        interest: Interest,
        mut transfer: impl FnMut(&T) -> io::Result<R>,
    ) -> io::Result<R> {
        self.0
            .async_io(interest, |Held(inner)| transfer(inner))
            .await
    }
}

/// A descriptor of any kind that can be waited for, as a stream of bytes.
pub struct Descriptor(Polled<OwnedFd>);

impl Descriptor {
    /// Makes the descriptor non-blocking and prepares for waiting. Needs a tokio runtime.
    ///
    /// # Errors
    /// It is of a kind that is always ready, such as a regular file.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Polled::new(fd, Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    /// The descriptor, which no one waits for any more.
    pub fn into_inner(self) -> OwnedFd {
        self.0.into_inner()
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.get_ref().0.as_fd()
    }
}

impl AsyncRead for Descriptor {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let bytes = buf.initialize_unfilled();
        let count = ready!(self.0.poll_read(cx, |fd| Ok(read(fd, bytes)?)))?;
        buf.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Descriptor {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.0.poll_write_ready(cx))?;
            let done = guard.try_io(|held| Ok(write(&held.get_ref().0, bytes)?));
            if let Ok(result) = done {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
