//! The NBD server: where it listens, whom it lets in, and for how long a handshake may last. On the control thread.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::{Rc, Weak};
use std::time::Duration;

use socket2::Socket;
use stord_aio::sync::{Notify, watch};
use stord_qmp::Error;
use stord_qmp::schema::socket::SocketAddressKind;
use stord_sockets::Listeners;

use super::channel::Channel;
use super::export::NbdExport;
use super::handshake::{self, Offer, Security};

/// So many clients the kernel lets wait to be accepted.
const BACKLOG: i32 = 128;
/// After running out of descriptors the server waits so long before it accepts again.
const PAUSE: Duration = Duration::from_millis(100);

/// What the server is to be.
pub(crate) struct NbdServerSettings {
    pub(crate) address: SocketAddressKind,
    /// A handshake may last so long; zero is no limit.
    pub(crate) handshake_limit: Duration,
    /// So many clients may be connected at a time; 0 is no limit.
    pub(crate) max_connections: u32,
    /// TLS, if clients have to speak it.
    pub(crate) security: Option<Security>,
}

/// The NBD server of the process, running or not, and the exports it offers.
#[derive(Default)]
pub(crate) struct NbdServer {
    running: RefCell<Option<Rc<Running>>>,
}

struct Running {
    settings: NbdServerSettings,
    exports: RefCell<Vec<Weak<NbdExport>>>,
    clients: Cell<u32>,
    /// A client has gone.
    left: Notify,
    /// True when the server ends.
    ending: watch::Sender<bool>,
}

impl NbdServer {
    /// Starts to listen.
    ///
    /// # Errors
    /// It listens already, or the address cannot be had.
    pub(crate) async fn start(&self, settings: NbdServerSettings) -> Result<(), Error> {
        self.check_stopped()?;
        let listeners = Listeners::open(&settings.address, BACKLOG).await?;
        // Somebody else may have been faster while the address was looked up.
        self.check_stopped()?;
        let (ending, _) = watch::channel(false);
        let running = Rc::new(Running {
            settings,
            exports: RefCell::default(),
            clients: Cell::new(0),
            left: Notify::new(),
            ending,
        });
        *self.running.borrow_mut() = Some(Rc::clone(&running));
        tokio::task::spawn_local(async move { running.listen(listeners).await });
        Ok(())
    }

    pub(crate) fn check_stopped(&self) -> Result<(), Error> {
        if self.running.borrow().is_some() {
            return Err(Error::generic("NBD server already running"));
        }
        Ok(())
    }

    /// Looks whether an export of that name can be offered.
    ///
    /// # Errors
    /// The server does not run, or there is one.
    pub(crate) fn check_name(&self, name: &str) -> Result<(), Error> {
        if self.find(name)?.is_some() {
            return Err(Error::generic(format!(
                "NBD server already has export named '{name}'"
            )));
        }
        Ok(())
    }

    /// Looks whether the server runs.
    ///
    /// # Errors
    /// It does not.
    pub(crate) fn check_running(&self) -> Result<(), Error> {
        self.running().map(drop)
    }

    fn running(&self) -> Result<Rc<Running>, Error> {
        let running = self.running.borrow().clone();
        running.ok_or_else(|| Error::generic("NBD server not running"))
    }

    fn find(&self, name: &str) -> Result<Option<Rc<NbdExport>>, Error> {
        let exports = self.running()?.exports();
        Ok(exports.into_iter().find(|export| export.name() == name))
    }

    /// Offers an export, as long as somebody else holds it.
    ///
    /// # Errors
    /// The server does not run, or has one of that name.
    pub(crate) fn offer(&self, export: &Rc<NbdExport>) -> Result<(), Error> {
        self.check_name(export.name())?;
        let running = self.running()?;
        running.exports.borrow_mut().push(Rc::downgrade(export));
        Ok(())
    }

    /// Stops listening and breaks off handshakes. The exports have to be gone.
    pub(crate) fn stop(&self) {
        if let Some(running) = self.running.borrow_mut().take() {
            running.ending.send_replace(true);
        }
    }
}

impl Running {
    async fn listen(self: Rc<Self>, listeners: Listeners) {
        let mut ending = self.ending.subscribe();
        loop {
            let client = tokio::select! {
                _ = ending.wait_for(|ending| *ending) => return,
                client = self.accept(&listeners) => client,
            };
            match client {
                Ok(client) => {
                    self.clients.set(self.clients.get() + 1);
                    let server = Rc::clone(&self);
                    tokio::task::spawn_local(async move { server.serve(client).await });
                }
                Err(error) => {
                    tracing::debug!(%error, "an NBD client could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// The next client, once there is room for it.
    async fn accept(&self, listeners: &Listeners) -> io::Result<Socket> {
        let limit = self.settings.max_connections;
        while limit != 0 && self.clients.get() >= limit {
            self.left.notified().await;
        }
        listeners.accept().await
    }

    /// Sees a client to its end.
    async fn serve(&self, socket: Socket) {
        let mut ending = self.ending.subscribe();
        let negotiation = async {
            let channel = Channel::new(socket)?;
            handshake::negotiate(channel, self).await
        };
        let limited = async {
            let limit = self.settings.handshake_limit;
            if limit.is_zero() {
                return negotiation.await;
            }
            tokio::time::timeout(limit, negotiation)
                .await
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        };
        let negotiated = tokio::select! {
            _ = ending.wait_for(|ending| *ending) => Ok(None),
            negotiated = limited => negotiated,
        };
        match negotiated {
            Ok(Some(agreement)) => {
                let export = Rc::clone(&agreement.export);
                export.serve(agreement).await;
            }
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "an NBD handshake failed"),
        }
        self.clients.set(self.clients.get() - 1);
        self.left.notify_one();
    }
}

impl Offer for Running {
    fn exports(&self) -> Vec<Rc<NbdExport>> {
        let mut exports = self.exports.borrow_mut();
        exports.retain(|export| export.strong_count() > 0);
        let held = exports.iter().filter_map(Weak::upgrade);
        held.filter(|export| export.is_open()).collect()
    }

    fn is_shared(&self) -> bool {
        self.settings.max_connections != 1
    }

    fn security(&self) -> Option<&Security> {
        self.settings.security.as_ref()
    }
}
