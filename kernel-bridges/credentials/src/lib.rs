//! What users give stord to keep: secrets, TLS credentials, and rules about who may come in. Each is
//! an object with an id, and [`Credentials`] finds it by that id wherever in stord it is needed.
//!
//! Loading reads files and keys and may block; using what is loaded does not.

pub mod authorization;
pub mod registry;
pub mod secret;
pub mod tls;

pub use authorization::Authorization;
pub use registry::{Credential, Credentials};
pub use secret::Secret;
pub use tls::{TlsCredentials, TlsSession};
