//! Which queue a request takes, and how a back end that went comes back.
//!
//! A queue belongs to a context, and each context that makes requests gets one of its own as long as the device has any. Requests of the
//! other contexts are carried over to one that has a queue, which costs another copy.
//!
//! One task on the main context watches the connection. A lost one is made again in the background, with new memory and new queues, as
//! long as the node is open: what the old back end still does with the old memory concerns nobody. Requests that were in flight, and
//! those that come meanwhile, wait up to `reconnect-delay` from the loss on, and are then made (again); without a delay, or after it, they
//! fail.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stord_aio::sync::{Notify, mpsc, oneshot};
use stord_aio::{Context, Errno, ExposedMemory, IoBuffer, pool, time};

use super::config::{Terms, capacity};
use super::control::{Watch, Wires, watch};
use super::queue::{Ask, End, Failure, Queue};
use super::ring::Shape;
use super::vhost_user::{Connected, Vacant, connect};

/// Between two attempts to connect again, the first and the longest time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What all contexts share.
pub(super) struct Lanes {
    id: u64,
    path: String,
    /// As they were when the node was opened.
    terms: Terms,
    delay: Duration,
    state: Mutex<State>,
    is_closed: AtomicBool,
    closing: Notify,
    /// A back end is there, or an attempt has failed, or the node closes.
    changed: Notify,
}

struct State {
    session: Option<Arc<Session>>,
    /// When the back end was lost.
    lost: Instant,
}

/// A connection to a back end.
struct Session {
    number: u64,
    shape: Shape,
    memory: Arc<ExposedMemory>,
    queues: Mutex<Queues>,
    is_lost: AtomicBool,
    /// Ends the watch when it is shut down.
    socket: Option<UnixStream>,
    /// Who wants to know the configuration.
    asks: mpsc::UnboundedSender<oneshot::Sender<Vec<u8>>>,
}

struct Queues {
    vacant: Vec<Vacant>,
    /// The contexts that have a queue.
    homes: Vec<Context>,
}

/// The queue of a context.
#[derive(Clone)]
struct Lane {
    session: u64,
    queue: Rc<Queue>,
}

thread_local! {
    /// The queues of this context, by the number of the driver.
    static HERE: RefCell<HashMap<u64, Lane>> = RefCell::default();
}

static NEXT_NUMBER: AtomicU64 = AtomicU64::new(0);

fn next_number() -> u64 {
    NEXT_NUMBER.fetch_add(1, Ordering::Relaxed)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lanes {
    /// Serves requests over a connection, and over those that follow it. `main` watches them.
    pub(super) fn start(
        path: String,
        first: Connected,
        delay: Duration,
        main: &Context,
    ) -> Arc<Self> {
        let lanes = Arc::new(Self {
            id: next_number(),
            path,
            terms: first.terms,
            delay,
            state: Mutex::new(State {
                session: None,
                lost: Instant::now(),
            }),
            is_closed: AtomicBool::new(false),
            closing: Notify::new(),
            changed: Notify::new(),
        });
        let wires = lanes.install(first);
        let watching = Arc::clone(&lanes);
        // Starts without being awaited, and ends when the node closes or the context stops.
        drop(main.run(move || async move { watching.supervise(wires).await }));
        lanes
    }

    /// What was agreed on when the node was opened.
    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Asks the device for its capacity, in bytes.
    pub(super) async fn capacity(&self) -> Result<u64, Errno> {
        let session = self.session().await?;
        let (sender, answer) = oneshot::channel();
        session.asks.send(sender).map_err(|_| Errno::EIO)?;
        drop(session);
        let config = answer.await.map_err(|_| Errno::EIO)?;
        capacity(&config).map_err(|_| Errno::EIO)
    }

    /// Makes a request.
    pub(super) async fn request(self: &Arc<Self>, ask: Ask) -> Result<(), Errno> {
        loop {
            let outcome = match self.lane() {
                Some(lane) => lane.queue.request(&ask).await,
                None => self.request_anywhere(&ask).await?,
            };
            match outcome {
                Ok(()) => return Ok(()),
                Err(Failure::Errno(errno)) => return Err(errno),
                Err(Failure::Lost) => {}
            }
        }
    }

    /// The queue of this context, as long as it is of use.
    fn lane(&self) -> Option<Lane> {
        HERE.with_borrow(|here| {
            let lane = here.get(&self.id)?;
            (!lane.queue.is_lost()).then(|| lane.clone())
        })
    }

    /// Makes a request for which this context has no queue yet.
    async fn request_anywhere(self: &Arc<Self>, ask: &Ask) -> Result<Result<(), Failure>, Errno> {
        let session = self.session().await?;
        if let Some(lane) = self.take_queue(&session) {
            return Ok(lane.queue.request(ask).await);
        }
        let home = {
            let queues = lock(&session.queues);
            let at = stord_aio::current_index() % queues.homes.len().max(1);
            queues.homes.get(at).cloned().ok_or(Errno::EIO)?
        };
        Ok(self.carry_over(&home, ask).await)
    }

    /// The connection, if there is one in time.
    async fn session(&self) -> Result<Arc<Session>, Errno> {
        loop {
            let changed = self.changed.notified();
            let lost = {
                let state = lock(&self.state);
                if let Some(session) = &state.session {
                    return Ok(Arc::clone(session));
                }
                state.lost
            };
            let deadline = lost + self.delay;
            if self.is_closed.load(Ordering::Acquire) || Instant::now() >= deadline {
                return Err(Errno::EIO);
            }
            tokio::select! {
                () = changed => {}
                () = time::sleep_until(deadline) => {}
            }
        }
    }

    /// Takes a queue into use on this context, if there is one left.
    fn take_queue(self: &Arc<Self>, session: &Arc<Session>) -> Option<Lane> {
        let context = Context::current()?;
        let vacant = {
            let mut queues = lock(&session.queues);
            let vacant = queues.vacant.pop()?;
            queues.homes.push(context);
            vacant
        };
        let lanes = Arc::downgrade(self);
        let (id, its_session) = (self.id, Arc::clone(session));
        let ended = move |queue: &Rc<Queue>, end: End| {
            HERE.with_borrow_mut(|here| {
                if here
                    .get(&id)
                    .is_some_and(|lane| Rc::ptr_eq(&lane.queue, queue))
                {
                    here.remove(&id);
                }
            });
            match end {
                End::Stopping => its_session.leave(queue),
                End::Lost => {}
                End::Broken(_) | End::Unusable(_) => {
                    if let Some(lanes) = lanes.upgrade() {
                        lanes.report(end);
                        lanes.lose(&its_session);
                    }
                }
            }
        };
        let memory = session.memory.buffer();
        match Queue::start(vacant, &memory, session.shape, ended) {
            Ok(queue) => {
                let lane = Lane {
                    session: session.number,
                    queue,
                };
                HERE.with_borrow_mut(|here| here.insert(self.id, lane.clone()));
                // It may have been lost before it could be told.
                if session.is_lost.load(Ordering::Acquire) {
                    lane.queue.lose();
                }
                Some(lane)
            }
            Err(error) => {
                tracing::warn!(path = self.path, %error, "a queue cannot be used");
                let here = stord_aio::current_index();
                lock(&session.queues)
                    .homes
                    .retain(|home| home.index() != here);
                None
            }
        }
    }

    fn report(&self, end: End) {
        let path = &self.path;
        match end {
            End::Broken(why) => tracing::error!(
                "the vhost-user back end at '{path}' breaks its queue: {why}; the connection is closed"
            ),
            End::Unusable(errno) => tracing::error!(
                "a queue of the vhost-user back end at '{path}' cannot be used: {errno}; the connection is closed"
            ),
            End::Lost | End::Stopping => {}
        }
    }

    /// Has another context make the request.
    async fn carry_over(self: &Arc<Self>, home: &Context, ask: &Ask) -> Result<(), Failure> {
        let lanes = Arc::clone(self);
        let carried = Carried::pack(ask)?;
        let answer = home
            .run(move || async move {
                let lane = lanes.lane();
                drop(lanes);
                let Some(lane) = lane else {
                    return (Err(Failure::Lost), Vec::new());
                };
                let (ask, memory) = carried.unpack();
                let answer = lane.queue.request(&ask).await;
                let bytes = memory.map_or_else(Vec::new, |memory| memory.to_vec());
                (answer, bytes)
            })
            .await;
        let (answer, bytes) = answer.map_err(|_| Failure::Errno(Errno::EIO))?;
        if let (Ok(()), Ask::Read { to, .. }) = (answer, ask) {
            to.write_at(0, &bytes);
        }
        answer
    }

    /// Makes a connection the one that requests take. Gives what has to be watched.
    fn install(&self, connected: Connected) -> Wires {
        let (asks, asked) = mpsc::unbounded_channel();
        let Connected {
            socket,
            channel,
            shape,
            memory,
            mut queues,
            ..
        } = connected;
        // The first is taken first.
        queues.reverse();
        let session = Arc::new(Session {
            number: next_number(),
            shape,
            memory,
            queues: Mutex::new(Queues {
                vacant: queues,
                homes: Vec::new(),
            }),
            is_lost: AtomicBool::new(false),
            socket: socket.try_clone().ok(),
            asks,
        });
        lock(&self.state).session = Some(session);
        self.changed.notify_waiters();
        Wires {
            socket,
            channel,
            asked,
        }
    }

    /// Watches the connection, and makes it again when it is lost.
    async fn supervise(self: Arc<Self>, mut wires: Wires) {
        loop {
            let end = watch(wires).await;
            let session = lock(&self.state).session.clone();
            if let Some(session) = session {
                self.lose(&session);
            }
            if self.is_closed.load(Ordering::Acquire) || end == Watch::Stopping {
                return;
            }
            tracing::error!(
                "the connection to the vhost-user back end at '{}' is lost: {}",
                self.path,
                if end == Watch::Nonsense {
                    "it sent what was not asked for"
                } else {
                    "it was closed"
                }
            );
            match self.reconnect().await {
                Some(connected) => {
                    wires = self.install(connected);
                    // The node may have closed before there was anything to lose.
                    if self.is_closed.load(Ordering::Acquire) {
                        self.close();
                        continue;
                    }
                    tracing::warn!("the vhost-user back end at '{}' is there again", self.path);
                }
                None => return,
            }
        }
    }

    /// Tries until it succeeds; `None` when the node closes.
    async fn reconnect(&self) -> Option<Connected> {
        let mut pause = FIRST_PAUSE;
        let mut complaint = String::new();
        loop {
            let path = self.path.clone();
            let attempt = pool::run(move || connect(&path)).await;
            let why = match attempt {
                Ok(connected) if self.terms.allow(&connected.terms) => {
                    return (!self.is_closed.load(Ordering::Acquire)).then_some(connected);
                }
                Ok(_) => "it has another disk now".to_owned(),
                Err(error) => error.to_string(),
            };
            if why != complaint {
                tracing::warn!(
                    "the vhost-user back end at '{}' cannot be reached: {why}",
                    self.path
                );
                complaint = why;
            }
            let closing = self.closing.notified();
            if self.is_closed.load(Ordering::Acquire) {
                return None;
            }
            tokio::select! {
                () = closing => {}
                () = time::sleep(pause) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Ends a connection and everything that waits for it.
    fn lose(&self, session: &Arc<Session>) {
        if session.is_lost.swap(true, Ordering::AcqRel) {
            return;
        }
        {
            let mut state = lock(&self.state);
            let is_current = state
                .session
                .as_ref()
                .is_some_and(|current| Arc::ptr_eq(current, session));
            if is_current {
                state.session = None;
                state.lost = Instant::now();
            }
        }
        if let Some(socket) = &session.socket {
            // It may be gone already.
            let _ = socket.shutdown(Shutdown::Both);
        }
        let homes = std::mem::take(&mut lock(&session.queues).homes);
        let (id, number) = (self.id, session.number);
        for home in homes {
            // Starts without being awaited; a context that has ended has ended its queue too.
            drop(home.run(move || async move {
                let lane = HERE.with_borrow(|here| here.get(&id).cloned());
                if let Some(lane) = lane.filter(|lane| lane.session == number) {
                    lane.queue.lose();
                }
            }));
        }
        self.changed.notify_waiters();
    }

    /// Ends everything. Nothing may be in flight.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.closing.notify_waiters();
        let session = lock(&self.state).session.clone();
        if let Some(session) = session {
            self.lose(&session);
        }
    }
}

impl Session {
    /// Takes note that a context stops: its queue is there for others.
    fn leave(&self, queue: &Queue) {
        let here = stord_aio::current_index();
        let mut queues = lock(&self.queues);
        queues.homes.retain(|home| home.index() != here);
        queues.vacant.extend(queue.vacate());
    }
}

/// A request on its way to another context.
enum Carried {
    Read { offset: u64, len: usize },
    Write { offset: u64, bytes: Vec<u8> },
    Flush,
    Discard { offset: u64, len: u64 },
    Zeroes { offset: u64, len: u64, unmap: bool },
}

impl Carried {
    fn pack(ask: &Ask) -> Result<Self, Failure> {
        Ok(match ask {
            Ask::Read { offset, to } => Self::Read {
                offset: *offset,
                len: usize::try_from(to.len()).map_err(|_| Failure::Errno(Errno::EINVAL))?,
            },
            Ask::Write { offset, from } => Self::Write {
                offset: *offset,
                bytes: from.to_vec(),
            },
            Ask::Flush => Self::Flush,
            Ask::Discard { offset, len } => Self::Discard {
                offset: *offset,
                len: *len,
            },
            Ask::Zeroes { offset, len, unmap } => Self::Zeroes {
                offset: *offset,
                len: *len,
                unmap: *unmap,
            },
        })
    }

    /// The request, and where the data of a read goes.
    fn unpack(self) -> (Ask, Option<IoBuffer>) {
        match self {
            Self::Read { offset, len } => {
                let memory = IoBuffer::zeroed(len);
                let to = memory.clone().into();
                (Ask::Read { offset, to }, Some(memory))
            }
            Self::Write { offset, bytes } => {
                let from = IoBuffer::from_vec(bytes).into();
                (Ask::Write { offset, from }, None)
            }
            Self::Flush => (Ask::Flush, None),
            Self::Discard { offset, len } => (Ask::Discard { offset, len }, None),
            Self::Zeroes { offset, len, unmap } => (Ask::Zeroes { offset, len, unmap }, None),
        }
    }
}
