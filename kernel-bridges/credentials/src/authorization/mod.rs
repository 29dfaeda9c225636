//! Rules about who may come in, asked with a name that was verified before: the distinguished name
//! of a client's certificate, say. When in doubt the answer is no.

mod list;
mod list_file;
mod simple;

pub use list::List;
pub use list_file::ListFile;
pub use simple::Simple;

/// A rule. It may change at any time, and counts as it is when asked.
pub trait Authorization: Send + Sync {
    /// Whether the rule lets the name in.
    fn is_allowed(&self, identity: &str) -> bool;
}
