//! Sockets of every address that the interface can name: resolved, connected to and listened on without blocking the control
//! thread, with the reference's messages.
//!
//! Everything here needs a tokio runtime. Character devices, the NBD server and the NBD client get their sockets here; what is
//! spoken over them is theirs.

pub mod address;
mod connect;
pub mod fdset;
mod listen;
mod passed;
mod readiness;
mod resolve;

pub use connect::{connect, has_nodelay};
pub use listen::{Listeners, State, take};
pub use passed::duplicate_all;
pub use readiness::{Descriptor, Polled};
pub use resolve::{Purpose, resolve};
