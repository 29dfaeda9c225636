//! Connecting sockets of every family.

use std::io;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use stord_qmp::Error;
use stord_qmp::schema::socket::{InetSocketAddress, SocketAddressKind};
use tokio::io::Interest;

use crate::address;
use crate::listen::{State, take};
use crate::readiness::Polled;
use crate::resolve::{Purpose, resolve};

/// Connects.
///
/// # Errors
/// Nobody listens there, or there is no such place.
pub async fn connect(target: &SocketAddressKind) -> Result<Socket, Error> {
    let failed = |place: &str, error: io::Error| {
        let reason = Error::reason(&error);
        Error::generic(format!("Failed to connect to '{place}': {reason}")).with_source(error)
    };
    match target {
        SocketAddressKind::Inet(inet) => connect_inet(inet).await,
        SocketAddressKind::Unix(unix) => {
            let name = address::unix(unix)?;
            let connected = connect_to(&name, None).await;
            connected.map_err(|error| failed(&unix.path, error))
        }
        SocketAddressKind::Vsock(vsock) => {
            let place = format!("{}:{}", vsock.cid, vsock.port);
            let connected = connect_to(&address::vsock(vsock)?, None).await;
            connected.map_err(|error| failed(&place, error))
        }
        SocketAddressKind::Fd(fd) => {
            let sockets = take(&fd.r#str, State::Connected)?;
            let only: Result<[Socket; 1], _> = sockets.try_into();
            only.map(|[socket]| socket).map_err(|_| {
                let name = &fd.r#str;
                Error::generic(format!("Several sockets are named '{name}'"))
            })
        }
    }
}

async fn connect_inet(inet: &InetSocketAddress) -> Result<Socket, Error> {
    let protocol = inet.mptcp.unwrap_or(false).then_some(Protocol::MPTCP);
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in resolve(inet, Purpose::Connect).await? {
        match connect_to(&candidate.into(), protocol).await {
            Ok(socket) => {
                if let Some(keep_alive) = inet.keep_alive {
                    socket.set_keepalive(keep_alive).map_err(|error| {
                        let reason = Error::reason(&error);
                        Error::generic(format!(
                            "Unable to set keep-alive option on socket: {reason}"
                        ))
                    })?;
                }
                return Ok(socket);
            }
            Err(error) => failure = error,
        }
    }
    let InetSocketAddress { host, port, .. } = inet;
    let reason = Error::reason(&failure);
    Err(
        Error::generic(format!("Failed to connect to '{host}:{port}': {reason}"))
            .with_source(failure),
    )
}

async fn connect_to(address: &SockAddr, protocol: Option<Protocol>) -> io::Result<Socket> {
    let socket = Socket::new(address.domain(), Type::STREAM, protocol)?;
    socket.set_nonblocking(true)?;
    match socket.connect(address) {
        Ok(()) => return Ok(socket),
        Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    let polled = Polled::new(socket, Interest::WRITABLE)?;
    polled
        .transfer(Interest::WRITABLE, |socket| {
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
            match socket.peer_addr() {
                Err(error) if error.kind() == io::ErrorKind::NotConnected => {
                    Err(io::ErrorKind::WouldBlock.into())
                }
                result => result.map(drop),
            }
        })
        .await?;
    Ok(polled.into_inner())
}

/// Whether the small packets of sockets of that family can be sent at once.
pub fn has_nodelay(socket: &Socket) -> bool {
    socket
        .domain()
        .is_ok_and(|domain| matches!(domain, Domain::IPV4 | Domain::IPV6))
}
