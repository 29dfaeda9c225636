//! The device that sends datagrams to one place, and receives them from anywhere. What is written at
//! once is one datagram; what is received is taken as bytes without bounds between datagrams.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use stord_qmp::Error;
use stord_qmp::schema::chardev::ChardevUdp;
use stord_qmp::schema::socket::{InetSocketAddress, SocketAddressKind};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UdpSocket;

use super::backend::Connecting;
use super::file::once;
use super::{Backend, Connection};
use crate::report::reason;
use stord_sockets::{Purpose, resolve};

/// The most bytes in a datagram of IPv4; more is sent as several.
const DATAGRAM_MAX: usize = 65507;

/// A datagram socket.
pub struct Udp(Cell<Option<Connection>>);

impl Udp {
    /// Opens the socket.
    ///
    /// # Errors
    /// An address is unknown or taken.
    pub async fn open(options: &ChardevUdp) -> Result<Self, Error> {
        let SocketAddressKind::Inet(remote) = options.remote.clone().into() else {
            return Err(Error::generic("socket type unsupported for datagram"));
        };
        let local = match options.local.clone().map(SocketAddressKind::from) {
            None => None,
            Some(SocketAddressKind::Inet(local)) => Some(local),
            Some(_) => return Err(Error::generic("socket type unsupported for datagram")),
        };
        let socket = Rc::new(connect(remote, local).await?);
        let received = Received {
            socket: Rc::clone(&socket),
            rest: Vec::new(),
        };
        Ok(Self(Cell::new(Some(Connection {
            reader: Box::new(received),
            writer: Box::new(Sender(socket)),
        }))))
    }
}

impl Backend for Udp {
    fn kind(&self) -> &'static str {
        "udp"
    }

    fn connect(&self, _: usize) -> Connecting<'_> {
        Box::pin(once(&self.0))
    }
}

async fn connect(
    remote: InetSocketAddress,
    local: Option<InetSocketAddress>,
) -> Result<UdpSocket, Error> {
    let InetSocketAddress { host, port, .. } = &remote;
    let failed = |what: &str, error: io::Error| {
        let reason = reason(&error);
        Error::generic(format!("{what}: {reason}")).with_source(error)
    };
    let peers = resolve(&remote, Purpose::Connect).await?;
    let locals = match &local {
        None => Vec::new(),
        Some(local) => resolve(local, Purpose::Listen).await?,
    };
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for peer in peers {
        let any = match peer.is_ipv4() {
            true => ([0; 4], 0).into(),
            false => ([0u16; 8], 0).into(),
        };
        let same_family = locals
            .iter()
            .find(|local| local.is_ipv4() == peer.is_ipv4());
        if same_family.is_none() && !locals.is_empty() {
            continue;
        }
        let socket = UdpSocket::bind(same_family.copied().unwrap_or(any))
            .await
            .map_err(|error| failed("Failed to bind socket", error))?;
        match socket.connect(peer).await {
            Ok(()) => return Ok(socket),
            Err(error) => failure = error,
        }
    }
    Err(failed(
        &format!("Failed to connect to '{host}:{port}'"),
        failure,
    ))
}

struct Sender(Rc<UdpSocket>);

impl AsyncWrite for Sender {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let datagram = bytes.get(..DATAGRAM_MAX).unwrap_or(bytes);
        match ready!(self.0.poll_send(cx, datagram)) {
            // Nobody was there when the last one came, which says nothing about this one.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Poll::Ready(Ok(datagram.len()))
            }
            result => Poll::Ready(result),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

struct Received {
    socket: Rc<UdpSocket>,
    /// What of the last datagram did not fit.
    rest: Vec<u8>,
}

impl AsyncRead for Received {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            let mut bytes = vec![0; 1 << 16];
            let mut datagram = ReadBuf::new(&mut bytes);
            match ready!(self.socket.poll_recv(cx, &mut datagram)) {
                Ok(()) => {
                    let length = datagram.filled().len();
                    bytes.truncate(length);
                    self.rest = bytes;
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        let count = self.rest.len().min(buf.remaining());
        let taken: Vec<u8> = self.rest.drain(..count).collect();
        buf.put_slice(&taken);
        Poll::Ready(Ok(()))
    }
}
