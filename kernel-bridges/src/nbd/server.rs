//! The NBD server: where it listens, whom it lets in, and for how long a handshake may last. On the control thread.
//!
//! Whoever connects and does not say what it wants holds a place until its time is over. While others wait for a place that time is
//! short ([`HASTE`]), so that any number of silent clients cannot keep out those who talk. There are never more clients than the
//! process has descriptors for: those beyond wait in the kernel.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::{Rc, Weak};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use socket2::Socket;
use stord_aio::sync::{Notify, watch};
use stord_qmp::Error;
use stord_qmp::schema::socket::SocketAddressKind;
use stord_sockets::Listeners;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::channel::Channel;
use super::export::NbdExport;
use super::handshake::{self, Agreement, Offer, Security};

/// So many clients the kernel lets wait to be accepted.
const BACKLOG: i32 = 128;
/// After running out of descriptors the server waits so long before it accepts again.
const PAUSE: Duration = Duration::from_millis(100);
/// A handshake older than this is broken off when somebody waits for its place.
const HASTE: Duration = Duration::from_secs(1);
/// Descriptors that clients leave to the rest of the process.
const SPARE_DESCRIPTORS: u64 = 256;
/// Descriptors that a client takes: its socket, and a second one to end it by.
const DESCRIPTORS_PER_CLIENT: u64 = 2;

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
    /// Ends when nobody can connect any more.
    listening: RefCell<Option<JoinHandle<()>>>,
}

struct Running {
    settings: NbdServerSettings,
    exports: RefCell<Vec<Weak<NbdExport>>>,
    clients: Cell<u32>,
    /// So many may be.
    most_clients: u32,
    /// A client has gone.
    left: Notify,
    /// Handshakes under way, the oldest first.
    handshakes: RefCell<BTreeMap<u64, Handshake>>,
    /// Number of the handshake that comes next.
    next: Cell<u64>,
    /// True when the server ends.
    ending: watch::Sender<bool>,
}

/// A client that has not said yet what it wants.
struct Handshake {
    begun: Instant,
    /// Breaks it off.
    leave: Rc<Notify>,
}

/// What a client has of the server from when it was let in.
struct Place {
    /// Of its handshake.
    number: u64,
    /// Its handshake is to be broken off.
    leave: Rc<Notify>,
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
        let most_clients = most_clients(settings.max_connections);
        let running = Rc::new(Running {
            settings,
            exports: RefCell::default(),
            clients: Cell::new(0),
            most_clients,
            left: Notify::new(),
            handshakes: RefCell::default(),
            next: Cell::new(0),
            ending,
        });
        *self.running.borrow_mut() = Some(Rc::clone(&running));
        let listening = tokio::task::spawn_local(async move { running.listen(listeners).await });
        *self.listening.borrow_mut() = Some(listening);
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

    /// Stops listening and breaks off handshakes; nobody can connect when this returns. The exports have to be gone.
    pub(crate) async fn stop(&self) {
        let running = self.running.borrow_mut().take();
        let listening = self.listening.borrow_mut().take();
        if let Some(running) = running {
            running.ending.send_replace(true);
        }
        if let Some(listening) = listening {
            // It has no way to fail.
            let _ = listening.await;
        }
    }
}

impl Running {
    async fn listen(self: Rc<Self>, listeners: Listeners) {
        let mut ending = self.ending.subscribe();
        let mut is_refused = false;
        loop {
            let client = tokio::select! {
                _ = ending.wait_for(|ending| *ending) => return,
                client = self.accept(&listeners) => client,
            };
            match client {
                Ok(client) => {
                    is_refused = false;
                    let place = self.take_place();
                    let server = Rc::clone(&self);
                    tokio::task::spawn_local(async move { server.serve(client, place).await });
                }
                Err(error) => {
                    if !is_refused {
                        tracing::warn!(%error, "NBD clients cannot be accepted");
                    }
                    is_refused = true;
                    let pause = tokio::time::timeout(PAUSE, ending.wait_for(|ending| *ending));
                    // Whether the server ends is asked again above.
                    let _ = pause.await;
                }
            }
        }
    }

    /// The next client, once there is room for it.
    async fn accept(&self, listeners: &Listeners) -> io::Result<Socket> {
        let client = listeners.accept().await?;
        while self.clients.get() >= self.most_clients {
            self.make_room().await;
        }
        Ok(client)
    }

    /// Waits for a client to go, and sends away one that is too slow. Only for when somebody waits.
    async fn make_room(&self) {
        let slow = self.handshakes.borrow().first_key_value().map(|(_, it)| {
            let leave = Rc::clone(&it.leave);
            (it.begun + HASTE, leave)
        });
        // Without a limit for handshakes nobody is too slow.
        let slow = slow.filter(|_| !self.settings.handshake_limit.is_zero());
        let Some((end, leave)) = slow else {
            return self.left.notified().await;
        };
        tokio::select! {
            () = self.left.notified() => {}
            () = tokio::time::sleep_until(end) => {
                leave.notify_one();
                self.left.notified().await;
            }
        }
    }

    /// Counts a client that is there from now on.
    fn take_place(&self) -> Place {
        self.clients.set(self.clients.get() + 1);
        let number = self.next.replace(self.next.get() + 1);
        let leave = Rc::new(Notify::new());
        let handshake = Handshake {
            begun: Instant::now(),
            leave: Rc::clone(&leave),
        };
        self.handshakes.borrow_mut().insert(number, handshake);
        Place { number, leave }
    }

    /// Sees a client to its end.
    async fn serve(&self, socket: Socket, place: Place) {
        let negotiated = self.negotiate(socket, &place).await;
        self.handshakes.borrow_mut().remove(&place.number);
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

    /// Talks with a client, for as long as it may take, until it has chosen an export.
    async fn negotiate(&self, socket: Socket, place: &Place) -> io::Result<Option<Agreement>> {
        let mut ending = self.ending.subscribe();
        let limit = self.settings.handshake_limit;
        let expiry = async {
            if limit.is_zero() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(limit).await;
        };
        let negotiation = async { handshake::negotiate(Channel::new(socket)?, self).await };
        tokio::select! {
            _ = ending.wait_for(|ending| *ending) => Ok(None),
            () = place.leave.notified() => Err(io::ErrorKind::TimedOut.into()),
            () = expiry => Err(io::ErrorKind::TimedOut.into()),
            negotiated = negotiation => negotiated,
        }
    }
}

/// The number of clients that may be, `wanted` (0 is no limit) or what the process has descriptors for. It may take as many of those as
/// the system grants it.
fn most_clients(wanted: u32) -> u32 {
    let wanted = if wanted == 0 { u32::MAX } else { wanted };
    let needed = u64::from(wanted) * DESCRIPTORS_PER_CLIENT + SPARE_DESCRIPTORS;
    let Ok((mut soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return wanted;
    };
    if soft < needed && soft < hard {
        let more = needed.min(hard);
        match setrlimit(Resource::RLIMIT_NOFILE, more, hard) {
            Ok(()) => soft = more,
            Err(errno) => tracing::warn!(%errno, "the limit of descriptors cannot be raised"),
        }
    }
    let possible = soft.saturating_sub(SPARE_DESCRIPTORS) / DESCRIPTORS_PER_CLIENT;
    let possible = u32::try_from(possible.max(1)).unwrap_or(u32::MAX);
    if possible < wanted && wanted != u32::MAX {
        tracing::warn!(
            possible,
            wanted,
            "the limit of descriptors allows fewer NBD clients than max-connections"
        );
    }
    wanted.min(possible)
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn running(handshake_limit: Duration) -> Running {
        let (ending, _) = watch::channel(false);
        Running {
            settings: NbdServerSettings {
                address: SocketAddressKind::Unix(stord_qmp::schema::socket::UnixSocketAddress {
                    path: String::new(),
                    r#abstract: None,
                    tight: None,
                }),
                handshake_limit,
                max_connections: 1,
                security: None,
            },
            exports: RefCell::default(),
            clients: Cell::new(0),
            most_clients: 1,
            left: Notify::new(),
            handshakes: RefCell::default(),
            next: Cell::new(0),
            ending,
        }
    }

    #[test]
    fn waiting_client_costs_little() {
        let server = running(Duration::ZERO);
        let (socket, _peer) = UnixStream::pair().expect("a pair");
        let serving = server.serve(Socket::from(socket), server.take_place());
        let size = size_of_val(&serving);
        assert!(size < 3000, "{size} bytes");
    }

    #[tokio::test]
    async fn slow_client_makes_room_after_a_moment() {
        let server = running(Duration::from_secs(10));
        let (socket, _peer) = UnixStream::pair().expect("a pair");
        let begun = Instant::now();
        let place = server.take_place();
        tokio::join!(
            server.make_room(),
            server.serve(Socket::from(socket), place)
        );
        assert!(begun.elapsed() >= HASTE && begun.elapsed() < HASTE * 5);
        assert_eq!(server.clients.get(), 0);
    }
}
