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
    /// Whether to use several paths at once, by Multipath TCP; default off.
    pub mptcp: Option<bool>,
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

/// The address of a socket between a virtual machine and its host.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct VsockSocketAddress {
    /// The number of the machine.
    pub cid: String,
    /// The port number.
    pub port: String,
}

/// A descriptor that was passed to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct FdSocketAddress {
    /// The descriptor's number, or the name it was given.
    pub r#str: String,
}

/// The address of a socket.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct SocketAddress {
    /// The address.
    #[qapi(union = "type")]
    pub address: SocketAddressKind,
}

/// The address of a socket.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union)]
pub enum SocketAddressKind {
    /// TCP.
    Inet(InetSocketAddress),
    /// Unix domain.
    Unix(UnixSocketAddress),
    /// Between a virtual machine and its host.
    Vsock(VsockSocketAddress),
    /// A descriptor that is a socket already.
    Fd(FdSocketAddress),
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
    /// Between a virtual machine and its host.
    Vsock(Data<VsockSocketAddress>),
    /// A descriptor that is a socket already.
    Fd(Data<FdSocketAddress>),
}

impl From<SocketAddressLegacy> for SocketAddressKind {
    fn from(legacy: SocketAddressLegacy) -> Self {
        match legacy.address {
            SocketAddressLegacyKind::Inet(inet) => Self::Inet(inet.data),
            SocketAddressLegacyKind::Unix(unix) => Self::Unix(unix.data),
            SocketAddressLegacyKind::Vsock(vsock) => Self::Vsock(vsock.data),
            SocketAddressLegacyKind::Fd(fd) => Self::Fd(fd.data),
        }
    }
}
