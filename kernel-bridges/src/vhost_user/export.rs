//! A vhost-user-blk export: where front ends come, one after the other. On the control thread.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use socket2::Socket;
use stord_aio::sync::watch;
use stord_qmp::Error;
use stord_qmp::schema::socket::SocketAddressKind;
use stord_sockets::{Listeners, State, take};

use super::device::Device;
use super::session::Session;
use crate::export::{Ended, Export, LocalFuture, Parts};
use crate::virtio::blk::disk::{Disk, DiskOptions};

/// So many front ends the kernel lets wait while another is served.
const BACKLOG: i32 = 16;
/// After running out of descriptors the export waits so long before it accepts again.
const PAUSE: Duration = Duration::from_millis(100);

/// What drivers see as the serial number, as in the reference.
const SERIAL: &str = "vhost_user_blk";
/// A request has at most so many segments of data: with its header and its status, as many descriptors as the queues of most front
/// ends have.
const SEG_MAX: u32 = 126;

/// What a vhost-user-blk export is to be.
pub(crate) struct VhostUserOptions {
    pub(crate) id: String,
    pub(crate) address: SocketAddressKind,
    /// In bytes, a power of two from 512.
    pub(crate) logical_block_size: u32,
    pub(crate) queues: u16,
}

/// Where front ends come from.
enum Entrance {
    Listening(Listeners),
    /// One, and no other after it.
    Connected(Socket),
}

/// A vhost-user-blk export.
pub(crate) struct VhostUserExport {
    /// True when the export ends.
    ending: watch::Sender<bool>,
    /// A front end is being served.
    is_connected: Cell<bool>,
}

impl VhostUserExport {
    /// Starts to listen, and to serve whoever comes. The second result resolves when nobody is served any more.
    ///
    /// # Errors
    /// The address cannot be had.
    pub(crate) async fn start(
        options: VhostUserOptions,
        parts: Parts,
    ) -> Result<(Rc<Self>, Ended), Error> {
        let entrance = open(&options.address).await?;
        let disk = Disk::new(
            parts.backend,
            DiskOptions {
                writable: parts.writable,
                writethrough: parts.writethrough,
                logical_block_size: options.logical_block_size,
                serial: SERIAL.to_owned(),
                queues: options.queues,
                seg_max: SEG_MAX,
            },
        );
        let device = Device::new(&options.id, disk, options.queues, parts.contexts);
        let (ending, _) = watch::channel(false);
        let export = Rc::new(Self {
            ending,
            is_connected: Cell::new(false),
        });
        let served = Rc::clone(&export);
        let ended: Ended = Box::pin(async move { served.serve(entrance, device).await });
        // At once, not when somebody waits for the end.
        let service = tokio::task::spawn_local(ended);
        let ended = Box::pin(async move {
            let _ = service.await;
        });
        Ok((export, ended))
    }

    async fn serve(&self, entrance: Entrance, device: Rc<Device>) {
        let mut ending = self.ending.subscribe();
        let listeners = match entrance {
            Entrance::Listening(listeners) => listeners,
            Entrance::Connected(socket) => {
                self.serve_one(socket, &device).await;
                // An export ends when it is told to, not when it is of no use any more.
                let _ = ending.wait_for(|ending| *ending).await;
                return;
            }
        };
        loop {
            let front_end = tokio::select! {
                biased;
                _ = ending.wait_for(|ending| *ending) => return,
                front_end = listeners.accept() => front_end,
            };
            match front_end {
                Ok(socket) => self.serve_one(socket, &device).await,
                Err(error) => {
                    tracing::debug!(%error, "a vhost-user front end could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn serve_one(&self, socket: Socket, device: &Rc<Device>) {
        let export = device.id();
        tracing::debug!(export, "a vhost-user front end has come");
        self.is_connected.set(true);
        let session = Session::new(Rc::clone(device));
        session.serve(socket, self.ending.subscribe()).await;
        self.is_connected.set(false);
        tracing::debug!(export, "the vhost-user front end has gone");
    }
}

async fn open(address: &SocketAddressKind) -> Result<Entrance, Error> {
    match address {
        SocketAddressKind::Unix(_) => {}
        SocketAddressKind::Fd(fd) => {
            if let Ok(mut sockets) = take(&fd.r#str, State::Connected)
                && let Some(socket) = sockets.pop()
                && sockets.is_empty()
                && is_connected(&socket)
            {
                return Ok(Entrance::Connected(socket));
            }
        }
        SocketAddressKind::Inet(_) | SocketAddressKind::Vsock(_) => {
            return Err(Error::generic(
                "Only socket address types 'unix' and 'fd' are supported",
            ));
        }
    }
    Listeners::open(address, BACKLOG)
        .await
        .map(Entrance::Listening)
}

fn is_connected(socket: &Socket) -> bool {
    let peer: io::Result<_> = socket.peer_addr();
    peer.is_ok()
}

impl Export for VhostUserExport {
    /// A front end keeps nobody from removing the export in either mode, as in the reference.
    fn is_in_use(&self) -> LocalFuture<'_, bool> {
        Box::pin(std::future::ready(false))
    }

    fn shut_down(&self) -> LocalFuture<'_> {
        Box::pin(async {
            self.ending.send_replace(true);
        })
    }

    fn finish(&self) -> LocalFuture<'_> {
        Box::pin(async {})
    }
}
