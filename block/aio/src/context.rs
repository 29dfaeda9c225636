//! I/O contexts: threads with an executor and a ring of their own.
//!
//! A [`Context`] is a handle that any thread may hold. Work gets in by [`Context::run`] and from
//! there by [`spawn_local`](crate::spawn_local); it never moves to another context.
//!
//! One turn of the loop: run what is ready, look into the mailbox, look at the clock, then submit
//! everything queued and wait for the next event in one system call.
//!
//! Stopping: [`Context::stop`] waits until every task is done, those started meanwhile included,
//! and no operation is in flight. A task that serves a descriptor until it is told otherwise hears
//! of it by ECANCELED from [`PolledFd`](crate::PolledFd); other endless tasks must be told to end by
//! who started them.
//!
//! A panic in a task ends the process with a message, because the other tasks of the context would
//! wait forever for a thread that is gone.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::io::{self, Write as _};
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{self, Poll, Wake, Waker};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::engine::{Engine, Wait};
use crate::executor::{self, Local};
use crate::fences::Fences;
use crate::polling::{self, PollParams, Spinner};
use crate::pool::{self, PoolLimits};
use crate::remote::{self, Mailbox, Message};
use crate::task::ExecutorId;

/// There are never more contexts than this; [`Context::index`] is below it.
pub const MAX_CONTEXTS: usize = 64;

/// Address space for a context's stack; what is not touched takes no memory.
const STACK: usize = 1 << 20;
/// So many tasks run before the loop looks for completions again.
const TASKS_PER_TURN: usize = 128;
/// When a stopping context waits longer than this for its tasks, it says for which.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// How a context is to be made.
#[derive(Clone, Debug, Default)]
pub struct ContextConfig {
    /// The thread's name; the kernel shows 15 bytes of it.
    pub name: String,
    /// Do not use io_uring.
    pub force_fallback: bool,
    /// How long to poll before sleeping.
    pub poll: PollParams,
    /// Submit as soon as so many operations are queued; 0 leaves it to the context.
    pub batch: u32,
    /// How many of its jobs may block at a time.
    pub pool: PoolLimits,
}

/// The context has ended, or ended before the work was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the I/O context has ended")]
pub struct ContextGone;

/// A handle of a context; clones are handles of the same.
#[derive(Clone)]
pub struct Context {
    shared: Arc<Shared>,
}

struct Shared {
    id: ExecutorId,
    name: String,
    uses_ring: bool,
    polling: Mutex<PollParams>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

thread_local! {
    /// The handle of the context that runs on this thread.
    static HANDLE: RefCell<Option<Context>> = const { RefCell::new(None) };
}

impl Context {
    /// Starts a thread with a context. It runs until [`stop`](Self::stop), whether or not handles
    /// are left.
    ///
    /// The ring is left out when `force_fallback` or the environment variable
    /// `STORD_ENGINE=fallback` says so, or when the kernel refuses it.
    ///
    /// # Errors
    ///
    /// When a thread or its descriptors cannot be had, or [`MAX_CONTEXTS`] are running.
    pub fn start(config: ContextConfig) -> io::Result<Context> {
        // While there is one thread, if this is the first context.
        let _ = Fences::new();
        let Some(id) = remote::open()? else {
            return Err(io::Error::other(format!(
                "there are {MAX_CONTEXTS} I/O contexts already"
            )));
        };
        let (report, started) = std::sync::mpsc::sync_channel(1);
        let (hand_over, receive) = std::sync::mpsc::sync_channel(1);
        let ContextConfig {
            name,
            force_fallback,
            poll,
            batch,
            pool: pool_limits,
        } = config;
        let thread_name = name.replace('\0', "");
        let spawned = thread::Builder::new()
            .name(thread_name)
            .stack_size(STACK)
            .spawn(move || {
                let engine = Engine::choose(id, force_fallback, batch);
                let engine = match engine {
                    Ok(engine) => engine,
                    Err(error) => {
                        // The starter waits for it.
                        let _ = report.send(Err(error));
                        return;
                    }
                };
                let uses_ring = matches!(engine, Engine::Ring(_));
                if report.send(Ok(uses_ring)).is_err() {
                    return;
                }
                let Ok(handle) = receive.recv() else { return };
                thread_main(handle, engine, poll);
            });
        let started = spawned.and_then(|thread| {
            let answer = started
                .recv()
                .unwrap_or_else(|_| Err(io::Error::other("the thread of an I/O context died")));
            answer.map(|uses_ring| (thread, uses_ring))
        });
        let (thread, uses_ring) = match started {
            Ok(started) => started,
            Err(error) => {
                remote::mailbox(id).close_if_empty();
                return Err(error);
            }
        };
        let context = Context {
            shared: Arc::new(Shared {
                id,
                name,
                uses_ring,
                polling: Mutex::new(poll),
                thread: Mutex::new(Some(thread)),
            }),
        };
        pool::set_limits(id, pool_limits);
        hand_over
            .send(context.clone())
            .expect("the thread waits for it");
        Ok(context)
    }

    /// The context that the caller runs on.
    pub fn current() -> Option<Context> {
        HANDLE.with_borrow(Clone::clone)
    }

    /// A small number, below [`MAX_CONTEXTS`], that no other running context has.
    pub fn index(&self) -> usize {
        usize::from(self.shared.id.index)
    }

    /// The name it was started with.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Whether its operations go through io_uring.
    pub fn uses_ring(&self) -> bool {
        self.shared.uses_ring
    }

    /// Calls `f` on the context and runs its future there as a task. This starts at once, not
    /// when the result is first awaited, and dropping the result does not stop it.
    ///
    /// # Errors
    ///
    /// [`ContextGone`] when the context has ended.
    #[track_caller]
    pub fn run<F, Fut, T>(
        &self,
        f: F,
    ) -> impl Future<Output = Result<T, ContextGone>> + Send + use<F, Fut, T>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let location = Location::caller();
        let start = move || {
            let future = f();
            executor::with(|local| {
                let task = async move {
                    // Nobody waits when the result was dropped.
                    let _ = sender.send(future.await);
                };
                local.spawn(Box::pin(task), location);
            });
        };
        // When the context is gone, the sender goes with the message, and the receiver sees it.
        let _ = remote::send(self.shared.id, Message::Run(Box::new(start)));
        async move { receiver.await.map_err(|_| ContextGone) }
    }

    /// The same from a plain thread, which waits. A panic in `f` or its future is passed on to the
    /// caller and leaves the context running.
    ///
    /// # Errors
    ///
    /// [`ContextGone`] when the context has ended.
    ///
    /// # Panics
    ///
    /// On a context or in a simulation, where it would wait for itself.
    #[track_caller]
    pub fn block_on<F, Fut, T>(&self, f: F) -> Result<T, ContextGone>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        assert!(
            executor::try_with(|_| ()).is_none(),
            "a context must not wait for a context"
        );
        let task = self.run(|| CatchUnwind::start(f));
        match wait_on_thread(task)? {
            Ok(result) => Ok(result),
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Changes the polling parameters.
    pub fn set_polling(&self, params: PollParams) {
        *self.lock_polling() = params;
        let set = move || executor::with(|local| local.polling.borrow_mut().set_params(params));
        // A context that has ended does not poll.
        let _ = remote::send(self.shared.id, Message::Run(Box::new(set)));
    }

    /// The polling parameters.
    pub fn polling(&self) -> PollParams {
        *self.lock_polling()
    }

    /// Changes how many operations are queued before they are submitted; 0 leaves it to the context.
    pub fn set_batch(&self, batch: u32) {
        let set = move || executor::with(|local| local.engine.set_batch(batch));
        // A context that has ended submits nothing.
        let _ = remote::send(self.shared.id, Message::Run(Box::new(set)));
    }

    /// Changes how many blocking jobs of this context run at a time, and how many threads are kept
    /// for them.
    pub fn set_pool_limits(&self, limits: PoolLimits) {
        pool::set_limits(self.shared.id, limits);
    }

    fn lock_polling(&self) -> std::sync::MutexGuard<'_, PollParams> {
        self.shared
            .polling
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the context: waits until its tasks are done and joins its thread. Called on the
    /// context itself, or a second time, it does not wait.
    pub fn stop(self) {
        // Fails when it has ended already.
        let _ = remote::send(self.shared.id, Message::Stop);
        let is_self = executor::try_with(|local| local.id == self.shared.id);
        if is_self == Some(true) {
            return;
        }
        let thread = self
            .shared
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // It ends the process rather than panicking.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context({} {:?})", self.index(), self.name())
    }
}

/// The index of the context that the caller runs on; 0 in a simulation.
///
/// # Panics
///
/// Outside a context or simulation.
#[track_caller]
pub fn current_index() -> usize {
    executor::with(|local| match &local.engine {
        Engine::Simulated(_) => 0,
        _ => usize::from(local.id.index),
    })
}

/// Adds a callback that this context calls while it polls before sleeping. It looks for work
/// without a system call, and returns true when it found some and has woken the task concerned.
/// Dropping what this gives takes it away again.
///
/// # Panics
///
/// Outside a context or simulation.
#[track_caller]
pub fn add_spinner(spinner: Box<dyn FnMut() -> bool>) -> Spinner {
    executor::with(|local| local.spinners.borrow_mut().insert(spinner))
}

fn thread_main(handle: Context, engine: Engine, poll: PollParams) {
    // Without the privilege it is not needed either: such a daemon is not in the writeback path.
    let _ = crate::syscall::set_io_flusher();
    let name = handle.name().to_owned();
    let id = handle.shared.id;
    HANDLE.set(Some(handle));
    let local = Local::new(id, engine, None);
    local.polling.borrow_mut().set_params(poll);
    let result = catch_unwind(AssertUnwindSafe(|| local.enter(|| run_loop(&local))));
    if let Err(panic) = result {
        die(&name, &*panic);
    }
    HANDLE.set(None);
}

fn run_loop(local: &Local) {
    let mailbox = remote::mailbox(local.id);
    let mut messages = Vec::new();
    let mut warn_at = None;
    local.engine.start(local);
    loop {
        for _ in 0..TASKS_PER_TURN {
            let task = local.ready.borrow_mut().pop_front();
            match task {
                Some(task) => local.run(task),
                None => break,
            }
        }
        if mailbox.is_filled() {
            receive(local, mailbox, &mut messages);
        }
        let mut next_timer = local.run_timers();
        if local.stopping.get() {
            if is_drained(local) && finish(local, mailbox) {
                return;
            }
            let due = complain_when_due(local, &mut warn_at);
            next_timer = Some(next_timer.map_or(due, |time| time.min(due)));
        }
        let may_wait = local.ready.borrow().is_empty();
        if !may_wait {
            local.engine.turn(local, Wait::No);
            continue;
        }
        wait_for_work(local, mailbox, next_timer);
    }
}

fn receive(local: &Local, mailbox: &Mailbox, messages: &mut Vec<Message>) {
    mailbox.take(messages);
    for message in messages.drain(..) {
        match message {
            Message::Wake(task) => local.wake(task),
            Message::Run(start) => {
                local.refill_budget();
                start();
            }
            Message::Complete { slot, result } => local.complete(slot, result),
            Message::Stop => stop_waits(local),
        }
    }
}

fn stop_waits(local: &Local) {
    if local.stopping.replace(true) {
        return;
    }
    let waits = local.slots.borrow_mut().waits();
    for slot in waits {
        local.engine.cancel(local, slot);
    }
}

fn is_drained(local: &Local) -> bool {
    local.tasks.borrow().len() == 0
        && local.ready.borrow().is_empty()
        && local.slots.borrow().in_flight() == local.engine.own_operations()
}

/// Ends the engine and closes the mailbox. False when work came in meanwhile.
fn finish(local: &Local, mailbox: &Mailbox) -> bool {
    if mailbox.is_filled() {
        return false;
    }
    local.engine.shut_down(local);
    // While the index is still ours.
    pool::reset_limits(local.id);
    if mailbox.close_if_empty() {
        return true;
    }
    local.engine.start(local);
    false
}

/// Waits until there is something to do, polling first when that is wanted.
fn wait_for_work(local: &Local, mailbox: &Mailbox, next_timer: Option<Duration>) {
    let wait = next_timer.map_or(Wait::Forever, Wait::AtMost);
    let is_polling = local.polling.borrow().is_on();
    if !is_polling {
        sleep(local, mailbox, wait);
        return;
    }
    local.engine.turn(local, Wait::No);
    if !local.ready.borrow().is_empty() || mailbox.is_filled() {
        return;
    }
    let start = Instant::now();
    let limit = local.polling.borrow().time();
    let limit = next_timer.map_or(limit, |timer| limit.min(timer));
    let mut found = false;
    while !found && start.elapsed() < limit {
        std::hint::spin_loop();
        if local.engine.has_events() {
            local.engine.turn(local, Wait::No);
        }
        found = polling::spin(&local.spinners)
            || mailbox.is_filled()
            || !local.ready.borrow().is_empty();
    }
    if !found {
        sleep(local, mailbox, wait);
    }
    local.polling.borrow_mut().waited(start.elapsed());
}

fn sleep(local: &Local, mailbox: &Mailbox, wait: Wait) {
    if mailbox.prepare_sleep() {
        local.engine.turn(local, wait);
        mailbox.wake_up();
    } else {
        local.engine.turn(local, Wait::No);
    }
}

/// Says which tasks a stopping context still waits for. Gives the time until it says so again.
fn complain_when_due(local: &Local, due: &mut Option<Instant>) -> Duration {
    let now = Instant::now();
    let at = *due.get_or_insert(now + STOP_PATIENCE);
    if now < at {
        return at - now;
    }
    *due = Some(now + STOP_PATIENCE);
    for location in local.tasks.borrow().spawned_at() {
        tracing::warn!("a context that is to end still waits for the task started at {location}");
    }
    STOP_PATIENCE
}

/// Ends the process: the tasks of this context are lost.
fn die(name: &str, panic: &(dyn Any + Send)) -> ! {
    let why = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    // Straight to the descriptor: a test harness may hold back what the panic hook printed.
    let line = format!("a task of I/O context '{name}' panicked: {why}; aborting\n");
    let _ = io::stderr().write_all(line.as_bytes());
    std::process::abort()
}

/// A future whose panics are results.
struct CatchUnwind<Fut>(Result<Pin<Box<Fut>>, Option<Box<dyn Any + Send>>>);

impl<Fut: Future> CatchUnwind<Fut> {
    fn start(f: impl FnOnce() -> Fut) -> CatchUnwind<Fut> {
        let started = catch_unwind(AssertUnwindSafe(f));
        CatchUnwind(started.map(Box::pin).map_err(Some))
    }
}

impl<Fut: Future> Future for CatchUnwind<Fut> {
    type Output = Result<Fut::Output, Box<dyn Any + Send>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Ok(future) => match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
                Ok(poll) => poll.map(Ok),
                Err(panic) => Poll::Ready(Err(panic)),
            },
            Err(panic) => Poll::Ready(Err(panic.take().expect("polled until it is ready"))),
        }
    }
}

/// Waits for a future on a thread without an executor.
fn wait_on_thread<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut task::Context::from_waker(&waker)) {
            Poll::Ready(result) => return result,
            Poll::Pending => thread::park(),
        }
    }
}
