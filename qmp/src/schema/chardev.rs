//! Character devices, on which monitors talk.

use crate::Qapi;
use crate::schema::Data;
use crate::schema::socket::SocketAddressLegacy;

/// A character device to create, and the arguments of `chardev-add` and `chardev-change`.
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
    /// A serial port.
    Serial(Data<ChardevHostdev>),
    /// A parallel port.
    Parallel(Data<ChardevHostdev>),
    /// A pair of FIFOs.
    Pipe(Data<ChardevHostdev>),
    /// A stream socket.
    Socket(Data<ChardevSocket>),
    /// A datagram socket.
    Udp(Data<ChardevUdp>),
    /// A pseudo terminal.
    Pty(Data<ChardevPty>),
    /// Nothing: output is dropped and there is no input.
    Null(Data<ChardevCommon>),
    /// Another device, shared by several users.
    Mux(Data<ChardevMux>),
    /// Several other devices, as if they were one.
    Hub(Data<ChardevHub>),
    /// Standard input and output.
    Stdio(Data<ChardevStdio>),
    /// The last output, kept in memory.
    Ringbuf(Data<ChardevRingbuf>),
    /// The older name of `ringbuf`.
    #[qapi(features("deprecated"))]
    Memory(Data<ChardevRingbuf>),
}

/// What every backend has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct ChardevCommon {
    /// The file to which everything written is copied; default none.
    pub logfile: Option<String>,
    /// Append to it rather than truncate it; default off.
    pub logappend: Option<bool>,
}

/// Options of a file.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ChardevFile {
    /// What every backend has.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// The file read from; default none.
    pub r#in: Option<String>,
    /// The file written to.
    pub out: String,
    /// Append to it rather than truncate it; default off.
    pub append: Option<bool>,
}

/// Options of a device of the host's.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ChardevHostdev {
    /// What every backend has.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// The device's path, or that of FIFOs without their `.in` and `.out`.
    pub device: String,
}

/// Options of a stream socket.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct ChardevSocket {
    /// What every backend has.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// Where to listen or to connect to.
    pub addr: SocketAddressLegacy,
    /// The credentials for TLS; default no TLS.
    pub tls_creds: Option<String>,
    /// The rule about who may come in; default everybody whom TLS lets in.
    pub tls_authz: Option<String>,
    /// Whether to listen; default on.
    pub server: Option<bool>,
    /// Whether to wait for the first client before going on; default off, only for listening.
    pub wait: Option<bool>,
    /// Whether to send small packets at once; default off.
    pub nodelay: Option<bool>,
    /// Whether to speak telnet with clients; default off.
    pub telnet: Option<bool>,
    /// Whether to speak telnet with 3270 terminals; default off.
    pub tn3270: Option<bool>,
    /// Whether to speak WebSocket with clients; default off.
    pub websocket: Option<bool>,
    /// Seconds between attempts to connect; default 0, a single attempt.
    #[qapi(features("deprecated"))]
    pub reconnect: Option<i64>,
    /// Milliseconds between attempts to connect; default 0, a single attempt.
    pub reconnect_ms: Option<i64>,
}

/// Options of a datagram socket.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct ChardevUdp {
    /// What every backend has.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// Where to send to.
    pub remote: SocketAddressLegacy,
    /// Where to receive; default anywhere.
    pub local: Option<SocketAddressLegacy>,
}

/// Options of a pseudo terminal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct ChardevPty {
    /// What every backend has.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// The symbolic link to be made to it; default none.
    pub path: Option<String>,
}

/// Options of a multiplexer.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ChardevMux {
    /// What every backend has.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// The device to be shared.
    pub chardev: String,
}

/// Options of a hub.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ChardevHub {
    /// What every backend has.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// The devices to be joined.
    pub chardevs: Vec<String>,
}

/// Options of standard input and output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct ChardevStdio {
    /// What every backend has.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// Whether control characters of the terminal send signals; default on.
    pub signal: Option<bool>,
}

/// Options of a buffer in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct ChardevRingbuf {
    /// What every backend has.
    #[qapi(flatten)]
    pub common: ChardevCommon,
    /// How much it keeps, in bytes, a power of two; default 65536.
    pub size: Option<i64>,
}

/// What `chardev-add` and `chardev-change` return.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct ChardevReturn {
    /// The path of the pseudo terminal that was made.
    pub pty: Option<String>,
}

/// Arguments of `chardev-remove` and `chardev-send-break`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ChardevId {
    /// The device.
    pub id: String,
}

/// A device, as `query-chardev` reports it.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ChardevInfo {
    /// The id.
    pub label: String,
    /// What it is connected to.
    pub filename: String,
    /// Whether it has a user.
    pub frontend_open: bool,
}

/// A kind of backend, as `query-chardev-backends` reports it.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ChardevBackendInfo {
    /// The name.
    pub name: String,
}

/// How bytes are written in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum DataFormat {
    /// As text.
    Utf8,
    /// In base64.
    Base64,
}

/// Arguments of `ringbuf-write`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct RingbufWrite {
    /// The device.
    pub device: String,
    /// The bytes.
    pub data: String,
    /// How they are written; default `utf8`.
    pub format: Option<DataFormat>,
}

/// Arguments of `ringbuf-read`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct RingbufRead {
    /// The device.
    pub device: String,
    /// The most bytes to read.
    pub size: i64,
    /// How they are to be written; default `utf8`.
    pub format: Option<DataFormat>,
}
