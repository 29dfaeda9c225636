//! An NBD export: what its clients see, who they are, and how they come to an end. On the control thread.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use nix::sys::socket::{Shutdown, shutdown};
use socket2::{Domain, Socket, Type};
use stord_aio::Context;
use stord_aio::sync::Notify;
use stord_block::Backend;
use stord_block::bitmap::DirtyBitmap;
use stord_block::drivers::protocol::nbd::wire::{
    self, ALLOCATION_DEPTH, BASE_ALLOCATION, BlockSizeInfo, DIRTY_BITMAP, TransmissionFlags,
};

use stord_qmp::schema::export::BlockExportOptionsNbd;

use super::channel::Channel;
use super::connection;
use super::handshake::{Agreement, Manner, MetaContext};
use crate::export::{Ended, Export, LocalFuture, Parts};
use crate::registry::NbdLink;

/// Requests of this many bytes and their multiples are fast, whatever the image.
const PREFERRED_SIZE: u32 = 4096;

/// An export of the NBD server.
pub(crate) struct NbdExport {
    name: String,
    description: Option<String>,
    backend: Backend,
    contexts: Vec<Context>,
    writable: bool,
    writethrough: bool,
    allocation_depth: bool,
    /// Busy as long as the export lives.
    bitmaps: Vec<Arc<DirtyBitmap>>,
    clients: RefCell<Vec<Client>>,
    /// Number of the client that comes next.
    next: Cell<u64>,
    is_closing: Cell<bool>,
    /// A client has gone, or the export is closing.
    changed: Notify,
}

/// A client in its transmission phase.
struct Client {
    number: u64,
    /// Index of the context that serves it.
    context: usize,
    socket: OwnedFd,
}

/// How an export presents itself to one client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Presentation {
    pub(super) size: u64,
    pub(super) flags: TransmissionFlags,
    pub(super) block_size: BlockSizeInfo,
}

impl NbdExport {
    /// An export without clients.
    pub(crate) fn new(
        name: String,
        options: &BlockExportOptionsNbd,
        bitmaps: Vec<Arc<DirtyBitmap>>,
        parts: Parts,
    ) -> Rc<Self> {
        Rc::new(Self {
            name,
            description: options.description.clone(),
            backend: parts.backend,
            contexts: parts.contexts,
            writable: parts.writable,
            writethrough: parts.writethrough,
            allocation_depth: options.allocation_depth.unwrap_or(false),
            bitmaps,
            clients: RefCell::default(),
            next: Cell::new(0),
            is_closing: Cell::new(false),
            changed: Notify::new(),
        })
    }

    /// The name that clients ask for.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What it is, for people.
    pub(super) fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }

    /// The metadata contexts that clients can choose, with their names.
    pub(super) fn contexts(&self) -> Vec<(MetaContext, String)> {
        let mut contexts = vec![(MetaContext::Allocation, BASE_ALLOCATION.to_owned())];
        if self.allocation_depth {
            contexts.push((MetaContext::Depth, ALLOCATION_DEPTH.to_owned()));
        }
        let bitmaps = (0..).zip(&self.bitmaps);
        contexts.extend(bitmaps.map(|(index, bitmap)| {
            let name = format!("{DIRTY_BITMAP}{}", bitmap.name());
            (MetaContext::Bitmap(index), name)
        }));
        contexts
    }

    /// Whether new clients are let in.
    pub(super) fn is_open(&self) -> bool {
        !self.is_closing.get()
    }

    /// What a client is told. `several` is whether more than one client may come at a time.
    pub(super) fn present(&self, several: bool) -> Presentation {
        let mut flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_CACHE;
        if self.writable {
            flags |= TransmissionFlags::SEND_TRIM
                | TransmissionFlags::SEND_WRITE_ZEROES
                | TransmissionFlags::SEND_FAST_ZERO;
        } else {
            flags |= TransmissionFlags::READ_ONLY;
        }
        if several {
            // All clients share one backend, and a flush of it covers what any of them was told is written.
            flags |= TransmissionFlags::CAN_MULTI_CONN;
        }
        let alignment = self.backend.alignment();
        Presentation {
            size: self.backend.size(),
            flags,
            block_size: BlockSizeInfo {
                minimum: alignment.into(),
                preferred: alignment.max(PREFERRED_SIZE).into(),
                maximum: wire::MAX_PAYLOAD.into(),
            },
        }
    }

    /// Makes the export end when its clients have gone.
    pub(crate) fn ended(self: &Rc<Self>) -> Ended {
        let export = Rc::clone(self);
        Box::pin(async move {
            loop {
                let changed = export.changed.notified();
                if export.is_closing.get() && export.clients.borrow().is_empty() {
                    return;
                }
                changed.await;
            }
        })
    }

    /// Serves a client until it or the export goes.
    pub(super) async fn serve(&self, agreement: Agreement) {
        let Agreement {
            channel, manner, ..
        } = agreement;
        if self.is_closing.get() {
            return;
        }
        let socket = match channel.duplicate() {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, export = self.name, "cannot serve an NBD client");
                return;
            }
        };
        let context = self.least_loaded();
        let number = self.next.replace(self.next.get() + 1);
        self.clients.borrow_mut().push(Client {
            number,
            context,
            socket,
        });
        let service = connection::Service {
            backend: self.backend.clone(),
            writable: self.writable,
            writethrough: self.writethrough,
            bitmaps: self.bitmaps.clone(),
            manner,
        };
        let (fd, tls) = channel.into_parts();
        let task = self.contexts[context]
            .run(move || async move { connection::serve(fd, tls, service).await });
        // A context that has ended has ended the connection before.
        let _ = task.await;
        self.clients
            .borrow_mut()
            .retain(|client| client.number != number);
        self.changed.notify_waiters();
    }

    /// Makes so many clients that need no handshake, and gives their ends of the connections.
    pub(crate) fn link(self: &Rc<Self>, clients: usize) -> io::Result<NbdLink> {
        let mut sockets = Vec::new();
        for _ in 0..clients {
            let (ours, theirs) = Socket::pair(Domain::UNIX, Type::STREAM, None)?;
            ours.set_nonblocking(true)?;
            let agreement = Agreement {
                channel: Channel::new(ours)?,
                export: Rc::clone(self),
                manner: Manner::simple(),
            };
            let export = Rc::clone(self);
            tokio::task::spawn_local(async move { export.serve(agreement).await });
            sockets.push(theirs.into());
        }
        let Presentation { size, flags, .. } = self.present(true);
        Ok(NbdLink {
            sockets,
            size,
            flags: flags.bits(),
        })
    }

    /// The context with the fewest clients.
    fn least_loaded(&self) -> usize {
        let clients = self.clients.borrow();
        let load = |context: &usize| {
            let on_it = clients.iter().filter(|client| client.context == *context);
            on_it.count()
        };
        (0..self.contexts.len()).min_by_key(load).unwrap_or(0)
    }

    fn disconnect_all(&self) {
        for client in self.clients.borrow().iter() {
            // Fails when the client has gone already.
            let _ = shutdown(client.socket.as_raw_fd(), Shutdown::Both);
        }
    }
}

impl Export for NbdExport {
    fn is_in_use(&self) -> LocalFuture<'_, bool> {
        Box::pin(std::future::ready(!self.clients.borrow().is_empty()))
    }

    fn shut_down(&self) -> LocalFuture<'_> {
        Box::pin(async {
            self.is_closing.set(true);
            self.disconnect_all();
            self.changed.notify_waiters();
        })
    }

    fn finish(&self) -> LocalFuture<'_> {
        for bitmap in &self.bitmaps {
            bitmap.set_busy(false);
        }
        Box::pin(async {})
    }
}
