//! Character devices, on which monitors talk.

use crate::Qapi;
use crate::schema::Data;
use crate::schema::socket::SocketAddressLegacy;

/// A character device to create.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct ChardevOptions {
    /// The device's unique id.
    pub id: String,
    /// What it is connected to.
    pub backend: ChardevBackend,
}

/// What a character device is connected to.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct ChardevBackend {
    /// The kind of backend and its options.
    #[qapi(union = "type")]
    pub kind: ChardevBackendKind,
}

/// A kind of backend and its options.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union)]
pub enum ChardevBackendKind {
    /// A file written to, and another read from.
    File(Data<ChardevFile>),
    /// A stream socket.
    Socket(Data<ChardevSocket>),
    /// Nothing: output is dropped and there is no input.
    Null(Data<ChardevNull>),
    /// Standard input and output.
    Stdio(Data<ChardevStdio>),
}

/// Options of a file.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ChardevFile {
    /// The file read from; default none.
    pub r#in: Option<String>,
    /// The file written to.
    pub out: String,
    /// Append to it rather than truncate it; default off.
    pub append: Option<bool>,
}

/// Options of a stream socket.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct ChardevSocket {
    /// Where to listen or to connect to.
    pub addr: SocketAddressLegacy,
    /// Whether to listen; default on.
    pub server: Option<bool>,
    /// Whether to wait for the first client before going on; default off, only for listening.
    pub wait: Option<bool>,
    /// Whether to send small packets at once; default off.
    pub nodelay: Option<bool>,
}

/// Options of `null`: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct ChardevNull {}

/// Options of standard input and output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct ChardevStdio {
    /// Whether control characters of the terminal send signals; default on.
    pub signal: Option<bool>,
}
