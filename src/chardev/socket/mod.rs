//! The device that is a stream socket: a server, or a client that may connect again and again. Over
//! it may be spoken TLS, over that WebSocket, over that telnet.

mod telnet;
mod tls;
mod websocket;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use serde_json::Value;
use socket2::Socket;
use stord_qmp::schema::chardev::ChardevSocket;
use stord_qmp::schema::socket::{SocketAddress, SocketAddressKind, SocketAddressLegacyKind};
use stord_qmp::{Error, to_json};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, split};

use super::backend::Connecting;
use super::{Backend, Connection, Setting};
use crate::report::{Origin, reason};
use stord_sockets::Descriptor;
use stord_sockets::{Listeners, address};
use telnet::Telnet;
use websocket::Websocket;

/// One client is served at a time, and one may wait.
const BACKLOG: i32 = 1;

/// Both directions of a stream in one.
trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

/// What every socket has.
struct Line {
    id: String,
    nodelay: bool,
    tls: Option<tls::Settings>,
    is_websocket: bool,
    telnet: Option<telnet::Kind>,
    /// What is spoken, as `query-chardev` names it.
    protocol: &'static str,
    /// How the present connection is described, while there is one.
    connected: Rc<RefCell<Option<String>>>,
}

/// Opens the device.
///
/// # Errors
/// Options contradict each other, or the address cannot be had.
pub async fn open(
    options: ChardevSocket,
    id: &str,
    setting: &Setting<'_>,
) -> Result<Box<dyn Backend>, Error> {
    let tls = tls::Settings::of(&options, setting.credentials)?;
    let reconnect = check(&options)?;
    let is_server = options.server.unwrap_or(true);
    let is_websocket = options.websocket.unwrap_or(false);
    let line = Line {
        id: id.to_owned(),
        nodelay: options.nodelay.unwrap_or(false),
        tls,
        is_websocket,
        telnet: telnet::Kind::of(&options),
        protocol: match (options.telnet.unwrap_or(false), is_websocket) {
            (true, _) => "telnet",
            (false, true) => "websocket",
            (false, false) => "tcp",
        },
        connected: Rc::default(),
    };
    let address = SocketAddressKind::from(options.addr);
    if matches!(address, SocketAddressKind::Fd(_)) && !setting.takes_descriptors {
        return Err(Error::generic("only QEMU supports file descriptor passing"));
    }
    if !is_server {
        return Client::open(address, line, reconnect)
            .await
            .map(|client| Box::new(client) as Box<_>);
    }
    let server = Server {
        listeners: Listeners::open(&address, BACKLOG).await?,
        line,
        first: Cell::new(None),
    };
    if options.wait.unwrap_or(false) {
        let filename = server.filename();
        (setting.origin).info(&format!("QEMU waiting for connection on: {filename}"));
        tokio::select! {
            () = server.wait_for_client() => {}
            () = setting.shutdown.requested() => {}
        }
    }
    Ok(Box::new(server))
}

/// Refuses options that contradict each other, and returns the time between attempts to connect.
fn check(options: &ChardevSocket) -> Result<Option<Duration>, Error> {
    let is_server = options.server.unwrap_or(true);
    if options.reconnect.is_some() && options.reconnect_ms.is_some() {
        return Err(Error::generic(
            "'reconnect' and 'reconnect-ms' are mutually exclusive",
        ));
    }
    let asked = match (options.reconnect, options.reconnect_ms) {
        (Some(seconds), _) => seconds.saturating_mul(1000),
        (None, milliseconds) => milliseconds.unwrap_or(0),
    };
    let reconnect = u64::try_from(asked).ok().filter(|millis| *millis > 0);
    check_address(options)?;
    if options.tls_authz.is_some() && options.tls_creds.is_none() {
        return Err(Error::generic(
            "'tls_authz' option requires 'tls_creds' option",
        ));
    }
    if is_server && reconnect.is_some() {
        return Err(Error::generic(
            "'reconnect' option is incompatible with socket in server listen mode",
        ));
    }
    if !is_server && options.websocket.unwrap_or(false) {
        return Err(Error::generic("Websocket client is not implemented"));
    }
    if !is_server && options.wait.is_some() {
        return Err(Error::generic(
            "'wait' option is incompatible with socket in client connect mode",
        ));
    }
    Ok(reconnect.map(Duration::from_millis))
}

/// Refuses options that do not go with the kind of address.
fn check_address(options: &ChardevSocket) -> Result<(), Error> {
    let is_server = options.server.unwrap_or(true);
    let has_tls = options.tls_creds.is_some();
    let message = match &options.addr.address {
        SocketAddressLegacyKind::Fd(_) if options.reconnect.is_some_and(|it| it > 0) => {
            "'reconnect' option is incompatible with 'fd' address type"
        }
        SocketAddressLegacyKind::Fd(_) if has_tls && !is_server => {
            "'tls_creds' option is incompatible with 'fd' address type as client"
        }
        SocketAddressLegacyKind::Unix(_) if has_tls => {
            "'tls_creds' option is incompatible with 'unix' address type"
        }
        SocketAddressLegacyKind::Vsock(_) if has_tls => {
            "'tls_creds' option is incompatible with 'vsock' address type"
        }
        _ => return Ok(()),
    };
    Err(Error::generic(message))
}

impl Line {
    /// Makes a connection of a connected socket, `role` being what comes after the address when it
    /// is described. Takes as long as the peer takes for what is to be said beforehand.
    ///
    /// # Errors
    /// The peer is gone, or not who it should be.
    async fn connect(
        &self,
        socket: Socket,
        address: &SocketAddressKind,
        role: &str,
    ) -> Result<Connection, Error> {
        let failed = |error: io::Error| Error::generic(reason(&error)).with_source(error);
        if stord_sockets::has_nodelay(&socket) {
            let set = socket.set_tcp_nodelay(self.nodelay);
            set.map_err(failed)?;
        }
        let description = self.describe(&socket, address, role);
        let descriptor = Descriptor::new(socket.into()).map_err(failed)?;
        let mut stream: Box<dyn Stream> = Box::new(descriptor);
        if let Some(tls) = &self.tls {
            let hostname = match address {
                SocketAddressKind::Inet(inet) => Some(inet.host.as_str()),
                _ => None,
            };
            stream = Box::new(tls.start(stream, hostname).await?);
        }
        if self.is_websocket {
            let accepted = Websocket::accept(stream).await;
            stream = Box::new(accepted.map_err(failed)?);
        }
        if let Some(kind) = self.telnet {
            let greeted = Telnet::greet(stream, kind).await;
            stream = Box::new(greeted.map_err(failed)?);
        }
        self.connected.replace(Some(description));
        let (reader, writer) = split(stream);
        let connected = Rc::clone(&self.connected);
        Ok(Connection {
            reader: Box::new(Held {
                reader,
                _held: Box::new(Disconnect(connected)),
            }),
            writer: Box::new(writer),
        })
    }

    fn describe(&self, socket: &Socket, address: &SocketAddressKind, role: &str) -> String {
        let local = socket.local_addr().ok().and_then(|local| local.as_socket());
        let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
        match (local, peer) {
            (Some(local), Some(peer)) => {
                let protocol = self.protocol;
                format!("{protocol}:{local}{role} <-> {peer}")
            }
            _ => format!("{}{role}", address::describe(address, self.protocol)),
        }
    }

    fn filename(&self, address: &SocketAddressKind, role: &str) -> String {
        match &*self.connected.borrow() {
            Some(connected) => connected.clone(),
            None => {
                let address = address::describe(address, self.protocol);
                format!("disconnected:{address}{role}")
            }
        }
    }

    fn property(&self, name: &str, address: &SocketAddress) -> Option<Value> {
        match name {
            "connected" => Some(self.connected.borrow().is_some().into()),
            "addr" => Some(to_json(address)),
            _ => None,
        }
    }
}

/// Notes the end of a connection.
struct Disconnect(Rc<RefCell<Option<String>>>);

impl Drop for Disconnect {
    fn drop(&mut self) {
        self.0.take();
    }
}

/// A reader that something else goes with.
struct Held<R> {
    reader: R,
    _held: Box<dyn Any>,
}

impl<R: AsyncRead + Unpin> AsyncRead for Held<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buf)
    }
}

/// A listening socket.
struct Server {
    listeners: Listeners,
    line: Line,
    /// A client that came while start-up waited for it.
    first: Cell<Option<Connection>>,
}

impl Server {
    async fn wait_for_client(&self) {
        let client = self.accept().await;
        self.first.set(Some(client));
    }

    async fn accept(&self) -> Connection {
        if let Some(first) = self.first.take() {
            return first;
        }
        let address = &self.listeners.address().address;
        loop {
            let failed = |reason: &str| {
                tracing::warn!(
                    "could not accept a connection on {}: {reason}",
                    self.filename()
                );
            };
            match self.listeners.accept().await {
                Ok(socket) => match self.line.connect(socket, address, ",server=on").await {
                    Ok(connection) => return connection,
                    Err(error) => failed(&error.message),
                },
                Err(error) => {
                    // A client that gave up, or no descriptors left: neither is the end of the
                    // device, but the latter would make this loop spin.
                    failed(&reason(&error));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Backend for Server {
    fn kind(&self) -> &'static str {
        "socket"
    }

    fn filename(&self) -> String {
        let address = &self.listeners.address().address;
        self.line.filename(address, ",server=on")
    }

    fn connect(&self, _: usize) -> Connecting<'_> {
        Box::pin(self.accept())
    }

    fn property(&self, name: &str) -> Option<Value> {
        self.line.property(name, self.listeners.address())
    }
}

/// A connecting socket.
struct Client {
    address: SocketAddress,
    line: Line,
    reconnect: Option<Duration>,
    first: Cell<Option<First>>,
}

/// What was connected at once.
enum First {
    Connection(Connection),
    /// TLS is for its user to wait for: the server may take its time.
    Socket(Socket),
}

impl Client {
    async fn open(
        address: SocketAddressKind,
        line: Line,
        reconnect: Option<Duration>,
    ) -> Result<Self, Error> {
        let address = SocketAddress { address };
        let client = Self {
            address,
            line,
            reconnect,
            first: Cell::new(None),
        };
        if reconnect.is_none() {
            let address = &client.address.address;
            let socket = stord_sockets::connect(address).await?;
            let first = match client.line.tls {
                Some(_) => First::Socket(socket),
                None => First::Connection(client.line.connect(socket, address, "").await?),
            };
            client.first.set(Some(first));
        }
        Ok(client)
    }

    async fn next(&self) -> Connection {
        let address = &self.address.address;
        let mut is_reported = false;
        loop {
            let connected = match (self.first.take(), self.reconnect) {
                (Some(First::Connection(first)), _) => return first,
                (Some(First::Socket(first)), _) => Ok(first),
                (None, Some(_)) => stord_sockets::connect(address).await,
                (None, None) => return std::future::pending().await,
            };
            let connected = match connected {
                Ok(socket) => self.line.connect(socket, address, "").await,
                Err(error) => Err(error),
            };
            match connected {
                Ok(connection) => return connection,
                Err(error) => {
                    if !is_reported {
                        let id = &self.line.id;
                        let what = format!("Unable to connect character device {id}");
                        Origin::none().error(&error.context(what));
                    }
                    is_reported = true;
                }
            }
            tokio::time::sleep(self.reconnect.unwrap_or_default()).await;
        }
    }
}

impl Backend for Client {
    fn kind(&self) -> &'static str {
        "socket"
    }

    fn filename(&self) -> String {
        self.line.filename(&self.address.address, "")
    }

    fn connect(&self, _: usize) -> Connecting<'_> {
        Box::pin(self.next())
    }

    fn property(&self, name: &str) -> Option<Value> {
        self.line.property(name, &self.address)
    }
}
