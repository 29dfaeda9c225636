//! What the registry asks of an export, whatever its type.

use std::future::Future;
use std::pin::Pin;

use stord_aio::Context;
use stord_block::Backend;

/// A future of the control thread.
pub(crate) type LocalFuture<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Resolves when an export serves no more, for whatever reason.
pub(crate) type Ended = LocalFuture<'static>;

/// A running export. Everything here happens on the control thread.
pub(crate) trait Export {
    /// Whether somebody uses it whom only a removal in the mode `hard` may cut off.
    fn is_in_use(&self) -> bool;

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
