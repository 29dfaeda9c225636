//! Which connection a request takes, and how a lost one comes back.
//!
//! A connection belongs to a context, and each context that makes requests gets one of its own as long as the server allows several
//! and the options do. Requests of the other contexts are carried over to one that has a connection, which costs a copy.
//!
//! A lost connection is made again in the background, as long as the node is open. Requests that were in flight, and those that come
//! meanwhile, wait up to `reconnect-delay` from the loss on, and are then made (again); without a delay, or after it, they fail.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use stord_aio::sync::Notify;
use stord_aio::{Context, Errno, IoBuffer, pool, spawn_local, time};
use stord_qmp::Error;
use stord_qmp::schema::socket::SocketAddressKind;

use super::link::{Ask, End, Failure, FirstExtent, Link};
use super::negotiate::{Connected, Terms, Wanted, negotiate};
use super::wire::Command;

/// Between two attempts to connect again, the first and the longest time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// So long after `reconnect-delay` attempts go on without anybody asking.
const PERSISTENCE: Duration = Duration::from_secs(10);

/// Where a server is, and what is wanted of it.
pub(super) struct Target {
    pub(super) address: SocketAddressKind,
    pub(super) wanted: Wanted,
}

impl Target {
    /// Connects and negotiates, on a thread of the pool.
    pub(super) async fn connect(self: &Arc<Self>) -> Result<Connected, Error> {
        let target = Arc::clone(self);
        pool::run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| Error::os("Could not connect to the NBD server", error))?;
            let socket = runtime.block_on(stord_sockets::connect(&target.address))?;
            negotiate(socket, &target.wanted)
        })
        .await
    }
}

/// What all contexts share.
pub(super) struct Lanes {
    id: u64,
    target: Arc<Target>,
    /// As they were when the node was opened.
    terms: Terms,
    delay: Duration,
    /// So many connections may be open.
    limit: usize,
    /// The contexts that have a connection, and one that nobody has taken yet.
    homes: Mutex<Homes>,
    is_closed: AtomicBool,
    closing: Notify,
}

struct Homes {
    contexts: Vec<Context>,
    spare: Option<Connected>,
}

thread_local! {
    /// The lanes of this context, by the number of the driver.
    static HERE: RefCell<HashMap<u64, Rc<Lane>>> = RefCell::default();
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// A connection of one context, there or not.
struct Lane {
    shared: Arc<Lanes>,
    link: RefCell<Option<Rc<Link>>>,
    /// When the connection was lost; `None` while the first attempt goes on.
    lost: Cell<Option<Instant>>,
    is_connecting: Cell<bool>,
    /// The connection is there, or an attempt has failed, or the node closes.
    changed: Notify,
}

impl Lanes {
    pub(super) fn new(
        target: Arc<Target>,
        first: Connected,
        delay: Duration,
        limit: usize,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            target,
            terms: first.terms,
            delay,
            limit,
            homes: Mutex::new(Homes {
                contexts: Vec::new(),
                spare: Some(first),
            }),
            is_closed: AtomicBool::new(false),
            closing: Notify::new(),
        })
    }

    /// What was agreed on when the node was opened.
    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Makes a request.
    pub(super) async fn request(self: &Arc<Self>, ask: Ask) -> Result<Option<FirstExtent>, Errno> {
        if let Some(lane) = self.lane_here() {
            return lane.request(ask).await;
        }
        let home = {
            let homes = self.lock();
            let at = stord_aio::current_index() % homes.contexts.len().max(1);
            homes.contexts.get(at).cloned().ok_or(Errno::EIO)?
        };
        self.carry_over(home, ask).await
    }

    /// Whether a new connection leads to the same disk.
    fn check(&self, connected: Connected) -> Result<Connected, Error> {
        let (was, is) = (&self.terms, &connected.terms);
        if is.size < was.size || is.minimum > was.minimum || is.maximum < was.maximum {
            return Err(Error::generic("the NBD server has another disk now"));
        }
        if is.flags != was.flags || is.style != was.style || is.context != was.context {
            return Err(Error::generic("the NBD server offers something else now"));
        }
        Ok(connected)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Homes> {
        self.homes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lane of this context; made if there may be one more.
    fn lane_here(self: &Arc<Self>) -> Option<Rc<Lane>> {
        if let Some(lane) = HERE.with_borrow(|here| here.get(&self.id).cloned()) {
            return Some(lane);
        }
        let context = Context::current()?;
        let spare = {
            let mut homes = self.lock();
            let has_home = homes
                .contexts
                .iter()
                .any(|home| home.index() == context.index());
            if !has_home {
                if homes.contexts.len() >= self.limit {
                    return None;
                }
                homes.contexts.push(context);
            }
            homes.spare.take()
        };
        let lane = Rc::new(Lane {
            shared: Arc::clone(self),
            link: RefCell::new(None),
            lost: Cell::new(None),
            is_connecting: Cell::new(false),
            changed: Notify::new(),
        });
        HERE.with_borrow_mut(|here| here.insert(self.id, Rc::clone(&lane)));
        match spare {
            Some(connected) => lane.install(connected),
            None => lane.reconnect(),
        }
        Some(lane)
    }

    /// Has another context make the request.
    async fn carry_over(
        self: &Arc<Self>,
        home: Context,
        ask: Ask,
    ) -> Result<Option<FirstExtent>, Errno> {
        let lanes = Arc::clone(self);
        let Ask {
            command,
            flags,
            offset,
            length,
            data,
        } = ask;
        let size = usize::try_from(data.len()).map_err(|_| Errno::EINVAL)?;
        let bytes = if command == Command::Write {
            data.to_vec()
        } else {
            Vec::new()
        };
        let (answer, bytes) = home
            .run(move || async move {
                let memory = if command == Command::Write {
                    IoBuffer::from_vec(bytes)
                } else {
                    IoBuffer::zeroed(size)
                };
                let ask = Ask {
                    command,
                    flags,
                    offset,
                    length,
                    data: memory.clone().into(),
                };
                let Some(lane) = lanes.lane_here() else {
                    return (Err(Errno::EIO), Vec::new());
                };
                let answer = lane.request(ask).await;
                let bytes = if command == Command::Read {
                    memory.to_vec()
                } else {
                    Vec::new()
                };
                (answer, bytes)
            })
            .await
            .map_err(|_| Errno::EIO)?;
        if answer.is_ok() && command == Command::Read {
            data.write_at(0, &bytes);
        }
        answer
    }

    /// Ends every connection. Nothing may be in flight.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.closing.notify_waiters();
        let homes = std::mem::take(&mut self.lock().contexts);
        let id = self.id;
        for home in homes {
            // Starts without being awaited; a context that has ended has ended its connection too.
            drop(home.run(move || async move {
                let lane = HERE.with_borrow_mut(|here| here.remove(&id));
                let Some(lane) = lane else { return };
                lane.changed.notify_waiters();
                let link = lane.link.take();
                if let Some(link) = link {
                    link.disconnect();
                }
            }));
        }
    }
}

impl Lane {
    async fn request(self: &Rc<Self>, ask: Ask) -> Result<Option<FirstExtent>, Errno> {
        loop {
            let link = self.link().await?;
            match link.request(ask.clone()).await {
                Ok(extent) => return Ok(extent),
                Err(Failure::Errno(errno)) => return Err(errno),
                Err(Failure::Lost) => self.note_lost(&link),
            }
        }
    }

    /// The connection, if there is one in time.
    async fn link(self: &Rc<Self>) -> Result<Rc<Link>, Errno> {
        loop {
            let changed = self.changed.notified();
            if let Some(link) = &*self.link.borrow() {
                return Ok(Rc::clone(link));
            }
            if self.shared.is_closed.load(Ordering::Acquire) {
                return Err(Errno::EIO);
            }
            self.reconnect();
            let Some(lost) = self.lost.get() else {
                changed.await;
                continue;
            };
            let deadline = lost + self.shared.delay;
            if time::now() >= deadline {
                return Err(Errno::EIO);
            }
            tokio::select! {
                () = changed => {}
                () = time::sleep_until(deadline) => {}
            }
        }
    }

    /// Takes a connection into use.
    fn install(self: &Rc<Self>, connected: Connected) {
        let lane = Rc::downgrade(self);
        let started = Link::start(connected, move |link, end| {
            if let Some(lane) = lane.upgrade() {
                lane.ended(link, end);
            }
        });
        match started {
            Ok(link) => *self.link.borrow_mut() = Some(link),
            Err(error) => {
                tracing::warn!(%error, "an NBD connection cannot be used");
                self.lost.set(Some(time::now()));
            }
        }
        self.changed.notify_waiters();
    }

    fn ended(self: &Rc<Self>, link: &Rc<Link>, end: End) {
        self.note_lost(link);
        match end {
            End::Lost => self.reconnect(),
            // Nobody can make requests here any more.
            End::Stopping => {
                let here = stord_aio::current_index();
                self.shared
                    .lock()
                    .contexts
                    .retain(|home| home.index() != here);
            }
        }
    }

    /// The connection is of no use any more; there may be another one already.
    fn note_lost(&self, link: &Rc<Link>) {
        let mut held = self.link.borrow_mut();
        if held.as_ref().is_some_and(|held| Rc::ptr_eq(held, link)) {
            *held = None;
            self.lost.set(Some(time::now()));
        }
    }

    /// Makes the connection again, in the background. After some time without success it waits for the next request.
    fn reconnect(self: &Rc<Self>) {
        if self.is_connecting.get() || self.shared.is_closed.load(Ordering::Acquire) {
            return;
        }
        self.is_connecting.set(true);
        let lane = Rc::downgrade(self);
        let shared = Arc::clone(&self.shared);
        spawn_local(async move {
            let give_up = time::now() + shared.delay + PERSISTENCE;
            let mut pause = FIRST_PAUSE;
            loop {
                let attempt = shared.target.connect().await;
                let is_closed = shared.is_closed.load(Ordering::Acquire);
                let Some(lane) = lane.upgrade().filter(|_| !is_closed) else {
                    return;
                };
                match attempt.and_then(|connected| shared.check(connected)) {
                    Ok(connected) => {
                        lane.is_connecting.set(false);
                        return lane.install(connected);
                    }
                    Err(error) => {
                        tracing::debug!(%error, "the NBD server cannot be reached");
                        if lane.lost.get().is_none() {
                            lane.lost.set(Some(time::now()));
                        }
                        lane.changed.notify_waiters();
                        if time::now() >= give_up {
                            lane.is_connecting.set(false);
                            return;
                        }
                    }
                }
                drop(lane);
                let closing = shared.closing.notified();
                tokio::select! {
                    () = closing => {}
                    () = time::sleep(pause) => {}
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        });
    }
}
