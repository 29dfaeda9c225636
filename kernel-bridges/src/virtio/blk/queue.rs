//! One virtqueue of a block device, served on one context.
//!
//! Chains that are there together are served together: what needs no waiting is done at once, straight between the guest's memory and
//! the storage, and the rest become tasks, which end in whatever order. What has ended is shown to the driver before the queue waits, with
//! one notification if the driver wants any. The driver is asked for kicks only while the queue waits.
//!
//! The queue ends when it is told to, with everything finished that it has taken: then the number of the next available entry says all
//! there is to know of it. In a drained section it takes nothing. A rule that the driver breaks ends the taking, never the process.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use smallvec::SmallVec;
use stord_aio::{
    Context, ContextGone, Errno, IoBuffer, IoVec, PolledFd, Spinner, add_spinner, spawn_local,
    sync, yield_now,
};
use stord_block::ZeroFlags;

use super::super::in_flight::{InFlight, Record};
use super::super::memory::GuestMemory;
use super::super::ring::Broken;
use super::super::ring::split::{Place, SplitRing};
use super::disk::Disk;
use super::request::{Command, ID_LEN, Request, Status};

/// So many chains are taken before what has ended is shown and other tasks get their turn.
const BATCH: u16 = 32;
/// With so many requests under way nothing is taken.
const MOST_REQUESTS: usize = 1024;

/// How a driver is told that chains were given back. Called on the queue's context.
pub(crate) trait Notify {
    /// Tells it; must not block.
    fn notify(&self);
}

/// A queue as a transport hands it over. `memory` makes the queue's view of the guest's memory, on the context.
pub(crate) struct QueueSetup<F> {
    /// For messages.
    pub(crate) index: u16,
    pub(crate) disk: Arc<Disk>,
    pub(crate) memory: F,
    pub(crate) place: Place,
    /// Where to go on in the available ring. A record that was used before knows better.
    pub(crate) next_available: u16,
    /// Those that the driver chose.
    pub(crate) features: u64,
    /// An eventfd that the driver writes to.
    pub(crate) kick: OwnedFd,
    pub(crate) call: Box<dyn Notify + Send>,
    pub(crate) in_flight: Option<InFlight>,
    /// Called on the context, at most once, when the driver has broken a rule. The queue has to be stopped all the same.
    pub(crate) on_broken: Box<dyn FnOnce(Broken) + Send>,
}

/// What a queue is told from other threads.
#[derive(Default)]
pub(super) struct Signals {
    stopping: AtomicBool,
    changed: sync::Notify,
}

impl Signals {
    /// Makes the queue look what has changed.
    pub(super) fn notify(&self) {
        self.changed.notify_one();
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// A queue that is being served.
#[must_use = "a queue has to be stopped"]
pub(crate) struct Queue {
    signals: Arc<Signals>,
    ended: Pin<Box<dyn Future<Output = Result<u16, ContextGone>> + Send>>,
    next_available: u16,
}

impl Queue {
    /// Starts to serve a queue on a context: first what a record says was under way, then what is available.
    pub(crate) fn start<M, F>(context: &Context, setup: QueueSetup<F>) -> Self
    where
        M: GuestMemory,
        F: FnOnce() -> M + Send + 'static,
    {
        let signals = Arc::new(Signals::default());
        setup.disk.enroll(&signals);
        let next_available = setup.next_available;
        let theirs = Arc::clone(&signals);
        let ended = context.run(move || serve(setup, theirs));
        Self {
            signals,
            ended: Box::pin(ended),
            next_available,
        }
    }

    /// Takes no more, and returns when everything that was taken has been given back: the number of the next entry of the available ring.
    pub(crate) async fn stop(self) -> u16 {
        self.signals.stopping.store(true, Ordering::Release);
        self.signals.notify();
        // A context that has ended has ended the queue before.
        self.ended.await.unwrap_or(self.next_available)
    }
}

/// The service of one queue.
struct Service<M> {
    index: u16,
    disk: Arc<Disk>,
    memory: M,
    features: u64,
    /// What the driver was told is done outlives this process: another serves the queue then, and the driver does not notice.
    outlives: bool,
    call: Box<dyn Notify + Send>,
    signals: Arc<Signals>,
    state: RefCell<State>,
    /// Requests that are tasks.
    tasks: Cell<usize>,
    /// A task has ended, or there is something to take.
    woken: sync::Notify,
    /// The queue waits for something to take.
    is_idle: Cell<bool>,
}

struct State {
    ring: SplitRing,
    record: Option<Record>,
    /// By first descriptor: chains that were taken and not given back.
    under_way: Vec<bool>,
    /// Chains given back that the driver does not see yet.
    unpublished: Vec<u16>,
    /// The driver was not notified since something was published.
    owes_notification: bool,
    generation: u64,
}

impl State {
    /// Notes that a chain is under way.
    fn mark(&mut self, head: u16) -> Result<(), Broken> {
        match self.under_way.get_mut(usize::from(head)) {
            Some(is_under_way @ false) => *is_under_way = true,
            Some(true) => return Err(Broken::Twice(head)),
            None => return Err(Broken::Descriptor(head)),
        }
        Ok(())
    }
}

/// A request that was taken.
struct Taken {
    head: u16,
    status: IoBuffer,
    writable: u32,
    /// What may have been written to, in guest addresses, if somebody wants to know.
    written: SmallVec<[(u64, u32); 2]>,
}

/// Why a queue takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It was told to stop.
    Stopped,
    /// Its context is about to end.
    ContextEnds,
    /// It cannot be kicked any more.
    Deaf,
    /// The driver broke a rule.
    Broken(Broken),
}

impl From<Broken> for End {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

async fn serve<M, F>(setup: QueueSetup<F>, signals: Arc<Signals>) -> u16
where
    M: GuestMemory,
    F: FnOnce() -> M,
{
    let QueueSetup {
        index,
        disk,
        memory,
        place,
        next_available,
        features,
        kick,
        call,
        in_flight,
        on_broken,
    } = setup;
    let memory = memory();
    let generation = memory.generation();
    let ring = SplitRing::new(place, &memory, next_available, features);
    let kick = PolledFd::new(kick);
    let (ring, kick) = match (ring, kick) {
        (Ok(ring), Ok(kick)) => (ring, kick),
        (Err(broken), _) => {
            disk.report_broken(index, broken);
            on_broken(broken);
            return next_available;
        }
        (Ok(_), Err(error)) => {
            tracing::error!(%error, queue = index, "a queue of a virtio-blk device cannot be kicked");
            return next_available;
        }
    };
    let record = in_flight.and_then(|record| record.open(place.size));
    let service = Rc::new(Service {
        index,
        disk,
        memory,
        features,
        outlives: record.is_some(),
        call,
        signals,
        state: RefCell::new(State {
            under_way: vec![false; usize::from(ring.size())],
            ring,
            record,
            unpublished: Vec::new(),
            owes_notification: false,
            generation,
        }),
        tasks: Cell::new(0),
        woken: sync::Notify::new(),
        is_idle: Cell::new(false),
    });
    let spinner = service.spinner();
    let end = service.run(&kick).await;
    drop(spinner);
    if let End::Broken(broken) = end {
        service.disk.report_broken(service.index, broken);
        on_broken(broken);
    }
    service.finish(end).await
}

impl<M: GuestMemory> Service<M> {
    /// Looks for chains while the context polls.
    fn spinner(self: &Rc<Self>) -> Spinner {
        let service = Rc::downgrade(self);
        add_spinner(Box::new(move || {
            let Some(service) = service.upgrade() else {
                return false;
            };
            // An index that makes no sense is something to look at, too.
            let found = service.is_idle.get() && service.state.borrow().ring.available() != Ok(0);
            if found {
                service.is_idle.set(false);
                service.woken.notify_one();
            }
            found
        }))
    }

    /// Serves until told to stop, or until the driver breaks a rule.
    async fn run(self: &Rc<Self>, kick: &PolledFd) -> End {
        match self.serve_all(kick).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn serve_all(self: &Rc<Self>, kick: &PolledFd) -> Result<Infallible, End> {
        self.recover()?;
        let mut kicked = pin!(None);
        let counter = IoBuffer::zeroed(8);
        loop {
            self.publish();
            if self.signals.is_stopping() {
                return Err(End::Stopped);
            }
            let is_full = self.tasks.get() >= MOST_REQUESTS;
            let taken = if is_full || self.disk.is_held() {
                None
            } else {
                self.follow_memory()?;
                Some(self.take_batch()?)
            };
            self.publish();
            self.notify();
            match taken {
                Some(0) => {
                    if self.wants_more()? {
                        continue;
                    }
                    self.is_idle.set(true);
                }
                Some(_) => {
                    yield_now().await;
                    continue;
                }
                None => {}
            }
            let event = self.event(&mut kicked, || kick.read_when_ready(counter.clone().into()));
            let waited = event.await;
            self.is_idle.set(false);
            self.state.borrow_mut().ring.refuse_kicks();
            waited?;
        }
    }

    /// Serves again what a record says was under way.
    fn recover(self: &Rc<Self>) -> Result<(), Broken> {
        let heads = {
            let mut state = self.state.borrow_mut();
            let State { ring, record, .. } = &mut *state;
            let Some(record) = record else { return Ok(()) };
            let Some(heads) = record.recover(ring.published()) else {
                return Ok(());
            };
            let count = u16::try_from(heads.len()).expect("one for each descriptor at most");
            ring.set_next_available(ring.published().wrapping_add(count));
            heads
        };
        if !heads.is_empty() {
            tracing::info!(
                queue = self.index,
                requests = heads.len(),
                "serving again what was under way in a virtio-blk queue"
            );
        }
        for head in heads {
            self.state.borrow_mut().mark(head)?;
            self.begin(head)?;
        }
        Ok(())
    }

    /// Looks for the ring again when the guest's memory has changed.
    fn follow_memory(&self) -> Result<(), Broken> {
        let generation = self.memory.generation();
        let mut state = self.state.borrow_mut();
        if state.generation != generation {
            state.generation = generation;
            state.ring.move_to(&self.memory)?;
        }
        Ok(())
    }

    /// Takes and begins the chains that are there, up to a limit. Gives their number.
    fn take_batch(self: &Rc<Self>) -> Result<u16, Broken> {
        let count = self.state.borrow().ring.available()?.min(BATCH);
        for _ in 0..count {
            let head = {
                let mut state = self.state.borrow_mut();
                let head = state.ring.take()?;
                state.mark(head)?;
                if let Some(record) = &mut state.record {
                    record.take(head);
                }
                head
            };
            self.begin(head)?;
        }
        Ok(count)
    }

    /// Asks the driver for a kick. True when there is something to take already.
    fn wants_more(&self) -> Result<bool, Broken> {
        let mut state = self.state.borrow_mut();
        state.ring.want_kicks();
        let is_there = state.ring.available()? > 0;
        if is_there {
            state.ring.refuse_kicks();
        }
        Ok(is_there)
    }

    /// Waits for a kick, a task that ends, or a change.
    async fn event<Kick: Future<Output = Result<usize, Errno>>>(
        &self,
        kicked: &mut Pin<&mut Option<Kick>>,
        again: impl Fn() -> Kick,
    ) -> Result<(), End> {
        if kicked.is_none() {
            kicked.set(Some(again()));
        }
        let mut woken = pin!(self.woken.notified());
        let mut changed = pin!(self.signals.changed.notified());
        poll_fn(|cx| {
            let kick = kicked.as_mut().as_pin_mut();
            if let Some(Poll::Ready(result)) = kick.map(|kick| kick.poll(cx)) {
                match result {
                    Ok(8) => {}
                    Err(Errno::ECANCELED) => return Poll::Ready(Err(End::ContextEnds)),
                    result => {
                        // Waiting for it again would go on like that.
                        tracing::error!(
                            ?result,
                            queue = self.index,
                            "a queue of a virtio-blk device gets no more kicks"
                        );
                        return Poll::Ready(Err(End::Deaf));
                    }
                }
                kicked.set(None);
                return Poll::Ready(Ok(()));
            }
            let is_woken = woken.as_mut().poll(cx).is_ready();
            if is_woken || changed.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            Poll::Pending
        })
        .await
    }

    /// Begins a chain that is under way: serves it at once, or as a task.
    fn begin(self: &Rc<Self>, head: u16) -> Result<(), Broken> {
        let chain = self.state.borrow().ring.chain(head, &self.memory)?;
        let request = Request::parse(&chain, self.disk.limits())?;
        let taken = Taken {
            head,
            status: request.status,
            writable: request.writable,
            written: chain.written,
        };
        if let Some(status) = self.try_serve(&request.command) {
            self.give_back(&taken, status);
            return Ok(());
        }
        self.tasks.set(self.tasks.get() + 1);
        let service = Rc::clone(self);
        spawn_local(async move {
            let status = service.serve_later(request.command).await;
            service.give_back(&taken, status);
            service.tasks.set(service.tasks.get() - 1);
            service.woken.notify_one();
        });
        Ok(())
    }

    /// Serves a request if nothing has to be waited for.
    fn try_serve(&self, command: &Command) -> Option<Status> {
        let backend = self.disk.backend();
        match command {
            Command::Refused(status) => Some(*status),
            Command::GetId(to) => {
                let serial = self.disk.serial();
                let room = usize::try_from(to.len()).map_or(ID_LEN, |room| room.min(ID_LEN));
                to.write_at(0, &serial[..room]);
                Some(Status::Ok)
            }
            Command::Read { data, .. } | Command::Write { data, .. } if data.is_empty() => {
                Some(Status::Ok)
            }
            Command::Read { offset, data } => backend.try_read(*offset, data).map(status),
            Command::Write { offset, data } if !self.is_writethrough() => {
                self.try_write(*offset, data).map(status)
            }
            _ => None,
        }
    }

    /// Writes if nothing has to be waited for.
    fn try_write(&self, offset: u64, data: &IoVec) -> Option<Result<(), Errno>> {
        let backend = self.disk.backend();
        if !self.outlives {
            return backend.try_write(offset, data);
        }
        // Bytes in a place that another change has allocated and not settled would be lost with this process.
        if self.disk.is_unsettled() {
            return None;
        }
        let result = backend.try_write(offset, data)?;
        // Such a change may have begun meanwhile: then this write is done again, and waits for it.
        (!self.disk.is_unsettled()).then_some(result)
    }

    async fn serve_later(&self, command: Command) -> Status {
        let is_change = matches!(
            command,
            Command::Write { .. } | Command::Discard { .. } | Command::WriteZeroes { .. }
        );
        if !self.outlives || !is_change {
            return self.carry_out(command).await;
        }
        let change = self.disk.begin_change();
        let mut done = self.carry_out(command).await;
        if done == Status::Ok {
            done = status(self.disk.backend().settle().await);
        }
        drop(change);
        done
    }

    async fn carry_out(&self, command: Command) -> Status {
        let backend = self.disk.backend();
        status(match command {
            Command::Read { offset, data } => backend.read(offset, data).await,
            Command::Write { offset, data } => {
                backend.write(offset, data, self.is_writethrough()).await
            }
            Command::Flush => backend.flush().await,
            Command::Discard { offset, len } => backend.discard(offset, len).await,
            Command::WriteZeroes { offset, len, unmap } => {
                let mut flags = ZeroFlags::empty();
                flags.set(ZeroFlags::MAY_UNMAP, unmap);
                flags.set(ZeroFlags::DURABLE, self.is_writethrough());
                backend.write_zeroes(offset, len, flags).await
            }
            Command::GetId(_) | Command::Refused(_) => {
                unreachable!("that is answered at once")
            }
        })
    }

    fn is_writethrough(&self) -> bool {
        self.disk.is_writethrough(self.features)
    }

    /// Gives a chain back; the driver sees it when it is published.
    fn give_back(&self, taken: &Taken, status: Status) {
        taken.status.write_at(0, &[status as u8]);
        for (addr, len) in &taken.written {
            self.memory.note_write(*addr, (*len).into());
        }
        let mut state = self.state.borrow_mut();
        if let Some(is_under_way) = state.under_way.get_mut(usize::from(taken.head)) {
            *is_under_way = false;
        }
        state.ring.give_back(taken.head, taken.writable);
        if let Some(record) = &state.record {
            record.give_back(taken.head);
        }
        state.unpublished.push(taken.head);
    }

    /// Shows the driver what was given back.
    fn publish(&self) {
        let mut state = self.state.borrow_mut();
        let State {
            ring,
            record,
            unpublished,
            owes_notification,
            ..
        } = &mut *state;
        if unpublished.is_empty() {
            return;
        }
        let (from, count) = ring.publish();
        if let Some(record) = record {
            for head in unpublished.iter() {
                record.forget(*head);
            }
            record.note_used(ring.published());
        }
        unpublished.clear();
        *owes_notification = true;
        if self.memory.tracks_writes() {
            for (addr, len) in ring.written(from, count) {
                self.memory.note_write(addr, len);
            }
        }
    }

    /// Notifies the driver of what was published, if it wants that.
    fn notify(&self) {
        let is_wanted = {
            let mut state = self.state.borrow_mut();
            std::mem::take(&mut state.owes_notification) && state.ring.wants_notification()
        };
        if is_wanted {
            self.call.notify();
        }
    }

    /// Gives back everything that was taken, when it has ended. Does not return before the queue is told to stop, if it can be.
    async fn finish(&self, end: End) -> u16 {
        loop {
            self.publish();
            self.notify();
            let may_end = end == End::ContextEnds || self.signals.is_stopping();
            if self.tasks.get() == 0 && may_end {
                return self.state.borrow().ring.next_available();
            }
            let mut woken = pin!(self.woken.notified());
            let mut changed = pin!(self.signals.changed.notified());
            poll_fn(|cx| {
                let is_woken = woken.as_mut().poll(cx).is_ready();
                if is_woken || changed.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
                Poll::Pending
            })
            .await;
        }
    }
}

fn status(result: Result<(), Errno>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(_) => Status::IoError,
    }
}
