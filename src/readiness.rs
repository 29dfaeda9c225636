//! Waits on the control thread until a descriptor of any kind can be read or written.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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
