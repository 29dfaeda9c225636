//! What users give stord to keep: secrets, TLS credentials, and rules about who may come in. Each is
//! an object with an id, and [`Credentials`] finds it by that id wherever in stord it is needed.
//!
//! Loading reads files and keys and may block; using what is loaded does not.

pub mod authorization;
pub mod registry;
pub mod secret;
pub mod tls;

use std::io;

pub use authorization::Authorization;
pub use registry::{Credential, Credentials};
pub use secret::Secret;
pub use tls::{TlsCredentials, TlsSession};

/// What went wrong in the words of the C library, without Rust's "(os error N)".
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}
