//! Addresses of sockets.

use crate::Qapi;
use crate::schema::Data;

/// A TCP address.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct InetSocketAddress {
    /// A name or a numeric address.
    pub host: String,
    /// A port number or a service name.
    pub port: String,
    /// Whether `host` is surely numeric; default off.
    pub numeric: Option<bool>,
    /// When listening, the last port to try.
    pub to: Option<u16>,
    /// Whether to use IPv4; default if both are left out.
    pub ipv4: Option<bool>,
    /// Whether to use IPv6; default if both are left out.
    pub ipv6: Option<bool>,
    /// Whether to send keep-alive probes; default off, not for listening.
    pub keep_alive: Option<bool>,
}

/// The address of a Unix domain socket.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct UnixSocketAddress {
    /// The path, or the abstract name.
    pub path: String,
    /// Whether the name is in Linux's abstract namespace; default off.
    pub r#abstract: Option<bool>,
    /// Whether an abstract name ends where it ends and is not padded; default on.
    pub tight: Option<bool>,
}

/// The address of a socket in the older spelling, with its own `data`.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct SocketAddressLegacy {
    /// The address.
    #[qapi(union = "type")]
    pub address: SocketAddressLegacyKind,
}

/// The address of a socket in the older spelling.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union)]
pub enum SocketAddressLegacyKind {
    /// TCP.
    Inet(Data<InetSocketAddress>),
    /// Unix domain.
    Unix(Data<UnixSocketAddress>),
}
