//! Listening sockets of every family.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use stord_qmp::Error;
use stord_qmp::schema::socket::{
    InetSocketAddress, SocketAddress, SocketAddressKind, UnixSocketAddress,
};
use tokio::io::Interest;

use crate::address;
use crate::passed;
use crate::readiness::Polled;
use crate::resolve::{Purpose, resolve};

/// Sockets that listen on one address, of several families maybe.
pub struct Listeners {
    sockets: Vec<Polled<Socket>>,
    address: SocketAddress,
    _file: Option<SocketFile>,
}

/// The file of a listening socket, removed when dropped.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Listeners {
    /// Starts to listen; the kernel lets `backlog` clients wait to be accepted.
    ///
    /// # Errors
    /// The address cannot be had.
    pub async fn open(asked: &SocketAddressKind, backlog: i32) -> Result<Self, Error> {
        let mut options = Options {
            mptcp: false,
            backlog,
        };
        let (sockets, file) = match asked {
            SocketAddressKind::Inet(inet) => {
                options.mptcp = inet.mptcp.unwrap_or(false);
                (listen_inet(inet, options).await?, None)
            }
            SocketAddressKind::Unix(unix) => {
                let (socket, file) = listen_unix(unix, options)?;
                (vec![socket], file)
            }
            SocketAddressKind::Vsock(vsock) => {
                let bound = bind(&address::vsock(vsock)?, options);
                let socket = bound.map_err(|error| failed("Failed to bind socket", error))?;
                (vec![socket], None)
            }
            SocketAddressKind::Fd(fd) => (take(&fd.r#str, State::Listening)?, None),
        };
        let local = sockets.first().and_then(|socket| socket.local_addr().ok());
        let prepare = |socket| Polled::new(socket, Interest::READABLE);
        let sockets: Result<_, _> = sockets.into_iter().map(prepare).collect();
        Ok(Self {
            sockets: sockets.map_err(|error| failed("Failed to listen on socket", error))?,
            address: address::actual(asked, local.as_ref()),
            _file: file,
        })
    }

    /// The address listened on.
    pub fn address(&self) -> &SocketAddress {
        &self.address
    }

    /// The next client.
    ///
    /// # Errors
    /// It has given up, or there are no descriptors left.
    pub async fn accept(&self) -> io::Result<Socket> {
        std::future::poll_fn(|cx| {
            for socket in &self.sockets {
                let client = socket.poll_read(cx, Socket::accept);
                if client.is_ready() {
                    return client.map_ok(|(client, _)| client);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}

fn failed(what: &str, error: io::Error) -> Error {
    let reason = Error::reason(&error);
    Error::generic(format!("{what}: {reason}")).with_source(error)
}

/// What a socket that was passed to the daemon is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Clients can be accepted on it.
    Listening,
    /// It has a peer.
    Connected,
}

/// The sockets that were passed to the daemon under that number or name: one, or several of a name.
///
/// # Errors
/// There is no such descriptor, or it is no socket in that state.
pub fn take(text: &str, state: State) -> Result<Vec<Socket>, Error> {
    let no_socket = || Error::generic(format!("File descriptor '{text}' is not a socket"));
    let descriptors = match passed::duplicate_all(text) {
        Err(error) if text.parse::<i32>().is_err() => return Err(error),
        Err(_) => return Err(no_socket()),
        Ok(descriptors) => descriptors,
    };
    let check = |fd: OwnedFd| {
        let socket = Socket::from(fd);
        let is_listening = socket.is_listener().map_err(|_| no_socket())?;
        if is_listening != (state == State::Listening) {
            let wanted = match state {
                State::Listening => "does not listen",
                State::Connected => "is not connected",
            };
            return Err(Error::generic(format!("Socket '{text}' {wanted}")));
        }
        socket.set_nonblocking(true).map_err(|_| no_socket())?;
        Ok(socket)
    };
    descriptors.into_iter().map(check).collect()
}

fn listen_unix(
    unix: &UnixSocketAddress,
    options: Options,
) -> Result<(Socket, Option<SocketFile>), Error> {
    let path = &unix.path;
    let what = format!("Failed to bind socket to {path}");
    let name = address::unix(unix)?;
    let is_file = !unix.r#abstract.unwrap_or(false);
    let mut file = None;
    if is_file {
        remove_stale(Path::new(path)).map_err(|error| failed(&what, error))?;
        // Absolute, because the working directory is another one when the file is removed.
        let absolute = std::path::absolute(path).map_err(|error| failed(&what, error))?;
        file = Some(absolute);
    }
    let socket = bind(&name, options).map_err(|error| failed(&what, error))?;
    Ok((socket, file.map(SocketFile)))
}

/// Removes the socket file of a daemon that is gone; anything but a socket stays.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path),
        Ok(_) | Err(_) => Ok(()),
    }
}

async fn listen_inet(inet: &InetSocketAddress, options: Options) -> Result<Vec<Socket>, Error> {
    if inet.keep_alive.is_some() {
        return Err(Error::generic(
            "keep-alive option is not supported for passive sockets",
        ));
    }
    let no_port = |error| failed("Failed to find an available port", error);
    let mut sockets = Vec::new();
    let mut failure = None;
    for candidate in resolve(inet, Purpose::Listen).await? {
        match listen_tcp(candidate, inet.to, options) {
            Ok(socket) => sockets.push(socket),
            // One family may be missing on this machine; any other failure is the caller's.
            Err(error) if is_missing_family(&error) => failure = Some(error),
            Err(error) => return Err(no_port(error)),
        }
    }
    match failure {
        Some(failure) if sockets.is_empty() => Err(no_port(failure)),
        _ => Ok(sockets),
    }
}

fn is_missing_family(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(nix::libc::EAFNOSUPPORT | nix::libc::EADDRNOTAVAIL)
    )
}

/// Listens on the first free port from the address's to the last one allowed.
fn listen_tcp(address: SocketAddr, to: Option<u16>, options: Options) -> io::Result<Socket> {
    let first_port = address.port();
    let last_port = to.unwrap_or(0).max(first_port);
    for port in first_port..=last_port {
        match bind(&SocketAddr::new(address.ip(), port).into(), options) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && port < last_port => {}
            done => return done,
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

#[derive(Clone, Copy)]
struct Options {
    mptcp: bool,
    backlog: i32,
}

fn bind(address: &SockAddr, options: Options) -> io::Result<Socket> {
    let protocol = options.mptcp.then_some(Protocol::MPTCP);
    let socket = Socket::new(address.domain(), Type::STREAM, protocol)?;
    socket.set_nonblocking(true)?;
    match address.domain() {
        Domain::IPV4 => socket.set_reuse_address(true)?,
        Domain::IPV6 => {
            socket.set_reuse_address(true)?;
            // IPv4 has a socket of its own.
            socket.set_only_v6(true)?;
        }
        _ => {}
    }
    socket.bind(address)?;
    socket.listen(options.backlog)?;
    Ok(socket)
}
