//! One queue on one context: many requests at a time, completed in any order.
//!
//! Data passes through memory that the device has mapped too, and is copied once on the way. The device never sees other memory of this
//! process, and what it changes after it has completed a request changes nothing any more.
//!
//! Requests of one turn of the context are shown to the device together. It is told by an eventfd when it wants to be, and tells us by
//! another; while the context polls, completions are found without either.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Poll, Waker};

use stord_aio::sync::{Mutex, Notify};
use stord_aio::{Errno, IoBuffer, IoVec, PolledFd, Spinner, add_spinner, spawn_local};

use super::arena::Arena;
use super::config::SECTOR;
use super::ring::{self, Broken, Payload, Ring, Shape};
use super::vhost_user::{DATA, QUEUE, Vacant, base_of};

/// 5.2.6.3: status bytes.
const OK: u8 = 0;
const UNSUPPORTED: u8 = 2;

/// Why a request has no good answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The back end went before it answered.
    Lost,
    /// The device says no.
    Errno(Errno),
}

/// How a queue has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The back end went.
    Lost,
    /// The device does what no device does.
    Broken(Broken),
    /// The descriptors are of no use.
    Unusable(Errno),
    /// The context is about to stop.
    Stopping,
}

/// What is asked of the device, with offsets and lengths in bytes.
#[derive(Clone)]
pub(super) enum Ask {
    Read { offset: u64, to: IoVec },
    Write { offset: u64, from: IoVec },
    Flush,
    Discard { offset: u64, len: u64 },
    Zeroes { offset: u64, len: u64, unmap: bool },
}

impl Ask {
    /// 5.2.6: the type of the request.
    fn kind(&self) -> u32 {
        match self {
            Self::Read { .. } => 0,
            Self::Write { .. } => 1,
            Self::Flush => 4,
            Self::Discard { .. } => 11,
            Self::Zeroes { .. } => 13,
        }
    }

    fn sector(&self) -> u64 {
        match self {
            Self::Read { offset, .. } | Self::Write { offset, .. } => offset / SECTOR,
            _ => 0,
        }
    }

    /// Bytes of data.
    fn data(&self) -> u64 {
        match self {
            Self::Read { to: data, .. } | Self::Write { from: data, .. } => data.len(),
            _ => 0,
        }
    }
}

/// What a request takes up.
#[derive(Clone, Copy)]
struct Room {
    place: u16,
    /// Where the data is, in bytes from the beginning of the queue's memory.
    at: usize,
    len: usize,
}

/// A request that waits for its completion.
#[derive(Default)]
struct Waiting {
    outcome: Option<Result<(), Failure>>,
    waker: Option<Waker>,
}

/// A queue that is being used.
pub(super) struct Queue {
    index: usize,
    memory: IoBuffer,
    ring: RefCell<Ring>,
    arena: RefCell<Arena>,
    free: RefCell<Vec<u16>>,
    waiting: RefCell<Vec<Waiting>>,
    /// Who waits for room: the first holds this, so that nobody overtakes him.
    door: Mutex<()>,
    left: Notify,
    descriptors: (OwnedFd, OwnedFd),
    kick: PolledFd,
    call: PolledFd,
    /// Something is to be shown to the device, or nothing ever will be again.
    wake_teller: Notify,
    is_lost: Cell<bool>,
    broken: Cell<Option<Broken>>,
    spinner: Cell<Option<Spinner>>,
}

impl Queue {
    /// Takes a queue into use on this context. `memory` is that of all queues. `ended` is called once, when it is no more.
    pub(super) fn start(
        vacant: Vacant,
        memory: &IoBuffer,
        shape: Shape,
        ended: impl FnOnce(&Rc<Self>, End) + 'static,
    ) -> io::Result<Rc<Self>> {
        let start = vacant.index * QUEUE;
        let memory = memory.slice(start..start + QUEUE);
        let ring = Ring::new(
            memory.clone(),
            base_of(vacant.index),
            shape,
            vacant.position,
        );
        let places = shape.places();
        let queue = Rc::new(Self {
            index: vacant.index,
            memory,
            ring: RefCell::new(ring),
            arena: RefCell::new(Arena::new(DATA)),
            free: RefCell::new((0..places).rev().collect()),
            waiting: RefCell::new((0..places).map(|_| Waiting::default()).collect()),
            door: Mutex::new(()),
            left: Notify::new(),
            kick: PolledFd::new(vacant.kick.try_clone()?)?,
            call: PolledFd::new(vacant.call.try_clone()?)?,
            descriptors: (vacant.kick, vacant.call),
            wake_teller: Notify::new(),
            is_lost: Cell::new(false),
            broken: Cell::new(None),
            spinner: Cell::new(None),
        });
        let spinning = Rc::downgrade(&queue);
        queue.spinner.set(Some(add_spinner(Box::new(move || {
            spinning.upgrade().is_some_and(|queue| queue.look())
        }))));
        let teller = Rc::clone(&queue);
        spawn_local(async move { teller.tell().await });
        let listener = Rc::clone(&queue);
        spawn_local(async move {
            let end = listener.listen().await;
            drop(listener.spinner.take());
            listener.give_up();
            ended(&listener, end);
        });
        Ok(queue)
    }

    /// Gives the queue up to be used elsewhere, if the device has nothing of it.
    pub(super) fn vacate(&self) -> Option<Vacant> {
        let position = self.ring.borrow().position()?;
        Some(Vacant {
            index: self.index,
            kick: self.descriptors.0.try_clone().ok()?,
            call: self.descriptors.1.try_clone().ok()?,
            position,
        })
    }

    pub(super) fn is_lost(&self) -> bool {
        self.is_lost.get()
    }

    /// Makes a request and waits for its completion.
    pub(super) async fn request(&self, ask: &Ask) -> Result<(), Failure> {
        let len = usize::try_from(ask.data()).map_err(|_| Failure::Errno(Errno::EINVAL))?;
        let room = self.enter(len).await?;
        self.offer(room, ask);
        let outcome = poll_fn(|cx| {
            let mut waiting = self.waiting.borrow_mut();
            let waiting = &mut waiting[usize::from(room.place)];
            match waiting.outcome.take() {
                Some(outcome) => Poll::Ready(outcome),
                None => {
                    waiting.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
        if let (Ok(()), Ask::Read { to, .. }) = (outcome, ask) {
            self.data(room).copy_to(to);
        }
        // What a back end that went has still is never used again.
        if outcome != Err(Failure::Lost) {
            self.leave(room);
        }
        outcome
    }

    fn data(&self, room: Room) -> IoVec {
        self.memory.slice(room.at..room.at + room.len).into()
    }

    fn offer(&self, room: Room, ask: &Ask) {
        let len = u32::try_from(room.len).expect("less than the memory of a queue");
        let payload = match ask {
            Ask::Read { .. } => Payload::FromDevice(room.at, len),
            Ask::Write { from, .. } => {
                from.copy_to(&self.data(room));
                Payload::ToDevice(room.at, len)
            }
            Ask::Flush => Payload::None,
            Ask::Discard { offset, len } => segment(*offset, *len, false),
            Ask::Zeroes { offset, len, unmap } => segment(*offset, *len, *unmap),
        };
        let mut ring = self.ring.borrow_mut();
        ring.offer(room.place, ask.kind(), ask.sector(), payload);
        self.wake_teller.notify_one();
    }

    /// Waits for a place and for room for so many bytes.
    async fn enter(&self, len: usize) -> Result<Room, Failure> {
        if len > DATA {
            return Err(Failure::Errno(Errno::EINVAL));
        }
        let _first = match self.door.try_lock() {
            Ok(first) => first,
            Err(_) => self.door.lock().await,
        };
        loop {
            if self.is_lost.get() {
                return Err(Failure::Lost);
            }
            let left = self.left.notified();
            if let Some(room) = self.try_enter(len) {
                return Ok(room);
            }
            left.await;
        }
    }

    fn try_enter(&self, len: usize) -> Option<Room> {
        let mut free = self.free.borrow_mut();
        let place = *free.last()?;
        let at = ring::HEAD + self.arena.borrow_mut().take(len)?;
        free.pop();
        Some(Room { place, at, len })
    }

    fn leave(&self, room: Room) {
        let offset = room.at - ring::HEAD;
        self.arena.borrow_mut().give_back(offset, room.len);
        self.free.borrow_mut().push(room.place);
        self.left.notify_one();
    }

    /// Shows the device what is offered, until the queue ends.
    async fn tell(&self) {
        let one: IoVec = IoBuffer::copy_of(&1_u64.to_ne_bytes()).into();
        while !self.is_lost.get() {
            let wants_to_know = self.ring.borrow_mut().publish();
            if wants_to_know {
                // Not by a plain write(2), which the device could make wait. A counter that is full says it, too.
                match self.kick.write(one.clone()).await {
                    Ok(_) | Err(Errno::EAGAIN) => {}
                    Err(errno) => tracing::warn!(%errno, "a back end cannot be told of requests"),
                }
            }
            self.wake_teller.notified().await;
        }
    }

    /// Takes completions until the queue ends.
    async fn listen(&self) -> End {
        let count = IoBuffer::zeroed(8);
        loop {
            if let Err(broken) = self.take_all() {
                return End::Broken(broken);
            }
            if let Some(broken) = self.broken.get() {
                return End::Broken(broken);
            }
            if self.is_lost.get() {
                return End::Lost;
            }
            if self.ring.borrow().listen() {
                continue;
            }
            match self.call.read_when_ready(count.clone().into()).await {
                Ok(_) => {}
                Err(Errno::ECANCELED) => return End::Stopping,
                Err(errno) => return End::Unusable(errno),
            }
        }
    }

    /// Takes what the device has completed. True if there was something.
    fn take_all(&self) -> Result<bool, Broken> {
        let mut found = false;
        loop {
            let completed = self.ring.borrow_mut().take()?;
            let Some((place, status)) = completed else {
                return Ok(found);
            };
            found = true;
            self.complete(
                place,
                match status {
                    OK => Ok(()),
                    UNSUPPORTED => Err(Failure::Errno(Errno::ENOTSUP)),
                    _ => Err(Failure::Errno(Errno::EIO)),
                },
            );
        }
    }

    fn complete(&self, place: u16, outcome: Result<(), Failure>) {
        let waker = {
            let mut waiting = self.waiting.borrow_mut();
            let waiting = &mut waiting[usize::from(place)];
            waiting.outcome = Some(outcome);
            waiting.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Looks for completions while the context polls.
    fn look(&self) -> bool {
        if self.is_lost.get() || !self.ring.borrow().has_completions() {
            return false;
        }
        match self.take_all() {
            Ok(found) => found,
            Err(broken) => {
                self.broken.set(Some(broken));
                self.wake_listener();
                true
            }
        }
    }

    /// Fails what waits, and whatever comes.
    fn give_up(&self) {
        self.is_lost.set(true);
        let busy: Vec<u16> = self.ring.borrow().busy().collect();
        for place in busy {
            self.complete(place, Err(Failure::Lost));
        }
        self.left.notify_waiters();
        self.left.notify_one();
        self.wake_teller.notify_one();
    }

    /// Ends the queue, because the back end went.
    pub(super) fn lose(self: &Rc<Self>) {
        if !self.is_lost.get() {
            self.give_up();
            self.wake_listener();
        }
    }

    fn wake_listener(&self) {
        let one: IoVec = IoBuffer::copy_of(&1_u64.to_ne_bytes()).into();
        let Ok(call) = self.descriptors.1.try_clone().and_then(PolledFd::new) else {
            return;
        };
        spawn_local(async move {
            // A counter that is full wakes it, too.
            let _ = call.write(one).await;
        });
    }
}

/// 5.2.6: the range of a discard or a request to write zeroes.
fn segment(offset: u64, len: u64, unmap: bool) -> Payload {
    Payload::Segment {
        sector: offset / SECTOR,
        sectors: u32::try_from(len / SECTOR).unwrap_or(u32::MAX),
        flags: unmap.into(),
    }
}
