//! The devices that are stream sockets: listening for one client at a time, or connecting once.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net as std_unix;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, UnixAddr,
    bind, listen, setsockopt, socket, sockopt,
};
use stord_qmp::Error;
use stord_qmp::schema::chardev::ChardevSocket;
use stord_qmp::schema::socket::{InetSocketAddress, SocketAddressLegacyKind, UnixSocketAddress};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::Connection;
use super::resolve::{Purpose, resolve};
use crate::report::reason;

/// The longest path of a Unix domain socket, in bytes, without the terminating zero.
const PATH_MAX: usize = 107;

/// How many clients the kernel lets wait while one is served.
const BACKLOG: i32 = 1;

/// A listening socket.
pub struct Server {
    listeners: Vec<Listener>,
    description: String,
    nodelay: bool,
    /// A client that came while start-up waited for it.
    first: RefCell<Option<Connection>>,
}

enum Listener {
    Unix {
        socket: UnixListener,
        _file: Option<SocketFile>,
    },
    Tcp(TcpListener),
}

/// The file of a listening socket, removed when dropped.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Server {
    /// Starts to listen.
    ///
    /// # Errors
    /// The address cannot be had.
    pub async fn listen(options: &ChardevSocket) -> Result<Self, Error> {
        let (listeners, description) = match &options.addr.address {
            SocketAddressLegacyKind::Unix(unix) => listen_unix(&unix.data)?,
            SocketAddressLegacyKind::Inet(inet) => listen_inet(&inet.data).await?,
        };
        Ok(Self {
            listeners,
            description,
            nodelay: options.nodelay.unwrap_or(false),
            first: RefCell::new(None),
        })
    }

    /// What it listens on, in the reference's notation.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Waits until a client has come, whom the next [`Server::accept`] returns.
    pub async fn wait_for_client(&self) {
        let client = self.accept().await;
        self.first.replace(Some(client));
    }

    /// The next client.
    pub async fn accept(&self) -> Connection {
        if let Some(first) = self.first.take() {
            return first;
        }
        loop {
            match std::future::poll_fn(|cx| self.poll_accept(cx)).await {
                Ok(connection) => return connection,
                Err(error) => {
                    // A client that gave up, or no descriptors left: neither is the end of the
                    // device, but the latter would make this loop spin.
                    tracing::warn!(
                        "could not accept a connection on {}: {}",
                        self.description,
                        reason(&error)
                    );
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Connection>> {
        for listener in &self.listeners {
            match listener {
                Listener::Unix { socket, .. } => {
                    if let Poll::Ready(client) = socket.poll_accept(cx) {
                        return Poll::Ready(client.map(|(stream, _)| split_unix(stream)));
                    }
                }
                Listener::Tcp(tcp) => {
                    if let Poll::Ready(client) = tcp.poll_accept(cx) {
                        return Poll::Ready(
                            client.and_then(|(stream, _)| split_tcp(stream, self.nodelay)),
                        );
                    }
                }
            }
        }
        Poll::Pending
    }
}

/// A connected socket.
pub struct Client(Cell<Option<Connection>>);

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there, or there is no such place.
    pub async fn connect(options: &ChardevSocket) -> Result<Self, Error> {
        let connection = match &options.addr.address {
            SocketAddressLegacyKind::Unix(unix) => connect_unix(&unix.data).await?,
            SocketAddressLegacyKind::Inet(inet) => {
                connect_inet(&inet.data, options.nodelay.unwrap_or(false)).await?
            }
        };
        Ok(Self(Cell::new(Some(connection))))
    }

    /// The one connection, the first time.
    pub fn take(&self) -> Option<Connection> {
        self.0.take()
    }
}

fn split_unix(stream: UnixStream) -> Connection {
    let (reader, writer) = stream.into_split();
    Connection {
        reader: Box::new(reader),
        writer: Box::new(writer),
    }
}

fn split_tcp(stream: TcpStream, nodelay: bool) -> io::Result<Connection> {
    stream.set_nodelay(nodelay)?;
    let (reader, writer) = stream.into_split();
    Ok(Connection {
        reader: Box::new(reader),
        writer: Box::new(writer),
    })
}

/// Whether an address is abstract, and whether its name is padded to the full length.
fn name_of(address: &UnixSocketAddress) -> Result<Name<'_>, Error> {
    let path = &address.path;
    if address.r#abstract.unwrap_or(false) {
        if path.len() > PATH_MAX {
            return Err(
                Error::generic(format!("UNIX socket path '{path}' is too long"))
                    .with_hint(format!("Path must be less than {PATH_MAX} bytes")),
            );
        }
        let mut name = path.clone().into_bytes();
        if !address.tight.unwrap_or(true) {
            name.resize(PATH_MAX, 0);
        }
        return Ok(Name::Abstract(name));
    }
    if path.len() > PATH_MAX {
        return Err(
            Error::generic(format!("UNIX socket path '{path}' is too long"))
                .with_hint(format!("Path must be less than {} bytes", PATH_MAX + 1)),
        );
    }
    Ok(Name::Path(Path::new(path)))
}

enum Name<'a> {
    Path(&'a Path),
    Abstract(Vec<u8>),
}

fn listen_unix(address: &UnixSocketAddress) -> Result<(Vec<Listener>, String), Error> {
    let path = &address.path;
    let failed = |error: io::Error| {
        let reason = reason(&error);
        Error::generic(format!("Failed to bind socket to {path}: {reason}")).with_source(error)
    };
    let name = name_of(address)?;
    let mut description = format!("unix:{path}");
    let (unix, file) = match &name {
        Name::Abstract(name) => {
            description.push_str(",abstract=on");
            if address.tight.unwrap_or(true) {
                description.push_str(",tight=on");
            }
            (UnixAddr::new_abstract(name), None)
        }
        Name::Path(path) => {
            remove_stale(path).map_err(failed)?;
            // Absolute, because the working directory is another one when the file is removed.
            let file = std::path::absolute(path).map_err(failed)?;
            (UnixAddr::new(*path), Some(file))
        }
    };
    let unix = unix.map_err(|errno| failed(errno.into()))?;
    let fd = open_socket(AddressFamily::Unix, |_| Ok(()), &unix).map_err(failed)?;
    let listener = Listener::Unix {
        _file: file.map(SocketFile),
        socket: UnixListener::from_std(std_unix::UnixListener::from(fd)).map_err(failed)?,
    };
    description.push_str(",server=on");
    Ok((vec![listener], description))
}

/// Removes the socket file of a daemon that is gone; anything but a socket stays.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path),
        Ok(_) | Err(_) => Ok(()),
    }
}

async fn listen_inet(address: &InetSocketAddress) -> Result<(Vec<Listener>, String), Error> {
    let addresses = resolve(address, Purpose::Listen).await?;
    let last_port = address.to.unwrap_or(0);
    let mut listeners = Vec::new();
    let mut description = None;
    let mut failure = None;
    for candidate in addresses {
        match listen_tcp(candidate, last_port) {
            Ok((listener, local)) => {
                description.get_or_insert_with(|| {
                    format!("tcp:{}:{},server=on", local.ip(), local.port())
                });
                listeners.push(Listener::Tcp(listener));
            }
            // One family may be missing on this machine; any other failure is the caller's.
            Err(error) if is_missing_family(&error) => failure = Some(error),
            Err(error) => return Err(no_port(error)),
        }
    }
    match (description, failure) {
        (Some(description), _) => Ok((listeners, description)),
        (None, failure) => {
            Err(no_port(failure.unwrap_or_else(|| {
                io::Error::from(io::ErrorKind::AddrNotAvailable)
            })))
        }
    }
}

fn no_port(error: io::Error) -> Error {
    let reason = reason(&error);
    Error::generic(format!("Failed to find an available port: {reason}")).with_source(error)
}

fn is_missing_family(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(nix::libc::EAFNOSUPPORT | nix::libc::EADDRNOTAVAIL)
    )
}

/// Listens on the first free port from the address's to `last_port`, or on the address's alone.
fn listen_tcp(address: SocketAddr, last_port: u16) -> io::Result<(TcpListener, SocketAddr)> {
    let first_port = address.port();
    for port in first_port..=last_port.max(first_port) {
        match listen_on(SocketAddr::new(address.ip(), port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && port < last_port => {}
            done => return done,
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

fn listen_on(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let fd = match address {
        SocketAddr::V4(v4) => open_socket(
            AddressFamily::Inet,
            |fd| setsockopt(fd, sockopt::ReuseAddr, &true),
            &SockaddrIn::from(v4),
        )?,
        SocketAddr::V6(v6) => open_socket(
            AddressFamily::Inet6,
            |fd| {
                setsockopt(fd, sockopt::ReuseAddr, &true)?;
                // IPv4 has a socket of its own.
                setsockopt(fd, sockopt::Ipv6V6Only, &true)
            },
            &SockaddrIn6::from(v6),
        )?,
    };
    let listener = TcpListener::from_std(std::net::TcpListener::from(fd))?;
    let local = listener.local_addr()?;
    Ok((listener, local))
}

fn open_socket(
    family: AddressFamily,
    prepare: impl FnOnce(&OwnedFd) -> nix::Result<()>,
    address: &dyn SockaddrLike,
) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    prepare(&fd)?;
    bind(fd.as_raw_fd(), address)?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(fd)
}

async fn connect_unix(address: &UnixSocketAddress) -> Result<Connection, Error> {
    let path = &address.path;
    let connected = match name_of(address)? {
        Name::Path(path) => UnixStream::connect(path).await,
        Name::Abstract(name) => std_unix::SocketAddr::from_abstract_name(name)
            .and_then(|address| std_unix::UnixStream::connect_addr(&address))
            .and_then(|stream| {
                stream.set_nonblocking(true)?;
                UnixStream::from_std(stream)
            }),
    };
    connected.map(split_unix).map_err(|error| {
        let reason = reason(&error);
        Error::generic(format!("Failed to connect to '{path}': {reason}")).with_source(error)
    })
}

async fn connect_inet(address: &InetSocketAddress, nodelay: bool) -> Result<Connection, Error> {
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in resolve(address, Purpose::Connect).await? {
        let connected = TcpStream::connect(candidate).await;
        match connected.and_then(|stream| split_tcp(stream, nodelay)) {
            Ok(connection) => return Ok(connection),
            Err(error) => failure = error,
        }
    }
    let InetSocketAddress { host, port, .. } = address;
    let reason = reason(&failure);
    Err(
        Error::generic(format!("Failed to connect to '{host}:{port}': {reason}"))
            .with_source(failure),
    )
}
