//! What the registry asks of an export, whatever its type.

use std::future::Future;
use std::pin::Pin;

use stord_aio::Context;
use stord_block::Backend;
use stord_qmp::Error;

use crate::fuse::Connection;

/// A future of the control thread.
pub(crate) type LocalFuture<'a, T = ()> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Resolves when an export serves no more, for whatever reason.
pub(crate) type Ended = LocalFuture<'static>;

/// A running export. Everything here happens on the control thread.
pub(crate) trait Export {
    /// What another process needs to go on where this one is, unless this export cannot be left to another.
    fn connection(&self) -> Option<Connection> {
        None
    }

    /// Stops serving, as soon as what is under way is done, and leaves the users to another process, which needs the connection; it ends
    /// soon.
    ///
    /// Asked only of exports that gave a connection: this one.
    ///
    /// # Errors
    /// That is not possible now. It serves as before.
    fn leave<'a>(&'a self, connection: &'a mut Connection) -> LocalFuture<'a, Result<(), Error>> {
        let _ = connection;
        Box::pin(async { Err(Error::generic("exports of this type cannot be left")) })
    }

    /// Whether somebody uses it whom only a removal in the mode `hard` may cut off.
    fn is_in_use(&self) -> LocalFuture<'_, bool>;

    /// Says that its users are to be cut off when it is shut down.
    fn force(&self) {}

    /// The block device of this machine that it is.
    fn device(&self) -> Option<String> {
        None
    }

    /// Takes the export away from its users; it ends soon, unless a request of theirs does not.
    fn shut_down(&self) -> LocalFuture<'_>;

    /// Cleans up after the export has ended.
    fn finish(&self) -> LocalFuture<'_>;
}

/// What every type of export is made of.
pub(crate) struct Parts {
    /// Where its requests go.
    pub(crate) backend: Backend,
    /// Who serves them.
    pub(crate) contexts: Vec<Context>,
    /// Whether its users may write.
    pub(crate) writable: bool,
    /// Whether every write is durable when it completes.
    pub(crate) writethrough: bool,
}
