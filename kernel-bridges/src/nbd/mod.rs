//! The NBD server and its exports.
//!
//! ```text
//! server       listens, lets clients in, sees to the limits              (control thread)
//!   handshake    finds out what a client wants; offers the exports       (channel: plain or TLS)
//!   export       an export, its clients and their end
//!     connection   serves one client on one context                      (outbox, payloads: memory; request, reply: wire)
//!       waiting      what cannot be answered at once                     (extents: block status and sparse reads)
//! ```
//!
//! The wire format, the stream and what was received are the client's too: `stord_block::drivers::protocol::nbd`.

mod channel;
mod connection;
mod export;
mod extents;
mod handshake;
mod outbox;
mod payloads;
mod reply;
mod request;
mod server;
mod waiting;

pub(crate) use export::NbdExport;
pub(crate) use handshake::Security;
pub(crate) use server::{NbdServer, NbdServerSettings};
