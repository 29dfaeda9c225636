//! The NBD server.

use crate::Qapi;
use crate::schema::export::BlockExportRemoveMode;
use crate::schema::socket::{SocketAddress, SocketAddressLegacy};

/// What `--nbd-server` starts.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct NbdServerOptions {
    /// A client must have finished its handshake after so many seconds; 0 is no limit, default 10.
    pub handshake_max_seconds: Option<u32>,
    /// The id of TLS credentials; with them, clients have to speak TLS.
    pub tls_creds: Option<String>,
    /// The id of an authorization object that says by their certificates which clients may come.
    pub tls_authz: Option<String>,
    /// So many clients may be connected at a time; 0 is no limit, default 100. With 1, clients are not told that several may come.
    pub max_connections: Option<u32>,
    /// Where it listens.
    pub addr: SocketAddress,
}

/// Arguments of `nbd-server-start`.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct NbdServerOptionsLegacy {
    /// A client must have finished its handshake after so many seconds; 0 is no limit, default 10.
    pub handshake_max_seconds: Option<u32>,
    /// The id of TLS credentials; with them, clients have to speak TLS.
    pub tls_creds: Option<String>,
    /// The id of an authorization object that says by their certificates which clients may come.
    pub tls_authz: Option<String>,
    /// So many clients may be connected at a time; 0 is no limit, default 100. With 1, clients are not told that several may come.
    pub max_connections: Option<u32>,
    /// Where it listens.
    pub addr: SocketAddressLegacy,
}

impl From<NbdServerOptionsLegacy> for NbdServerOptions {
    fn from(legacy: NbdServerOptionsLegacy) -> Self {
        Self {
            handshake_max_seconds: legacy.handshake_max_seconds,
            tls_creds: legacy.tls_creds,
            tls_authz: legacy.tls_authz,
            max_connections: legacy.max_connections,
            addr: SocketAddress {
                address: legacy.addr.into(),
            },
        }
    }
}

/// Arguments of `nbd-server-add`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct NbdServerAddOptions {
    /// The name that clients ask for; default the node's.
    pub name: Option<String>,
    /// What it is, for people.
    pub description: Option<String>,
    /// The node.
    pub device: String,
    /// Let clients write; default off.
    pub writable: Option<bool>,
    /// A dirty bitmap of the node that clients can see.
    pub bitmap: Option<String>,
}

/// Arguments of `nbd-server-remove`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct NbdServerRemove {
    /// The export's id.
    pub name: String,
    /// What becomes of its clients; default `safe`.
    pub mode: Option<BlockExportRemoveMode>,
}
