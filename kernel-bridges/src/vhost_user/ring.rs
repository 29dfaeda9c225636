//! One virtqueue as the front end sets it up: it runs while everything that it needs is there and it is enabled.
//!
//! What a running ring was started with is only changed while it is stopped; descriptors to call and whether writes are logged
//! change under it.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::task::JoinHandle;

use super::device::Device;
use super::in_flight::InFlightRecord;
use super::memory::SharedMemory;
use super::session::Refusal;
use crate::virtio::blk::queue::{Notify, Queue, QueueSetup};
use crate::virtio::ring::split::Place;

/// What the kernel calls descriptors of its event counters.
const EVENTFD: &str = "anon_inode:[eventfd]";

/// The largest ring of the specification.
const MAX_SIZE: u32 = 32768;

/// Where the parts of a ring are, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingParts {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// A virtqueue.
pub(super) struct Ring {
    index: u16,
    size: u16,
    base: u16,
    parts: Option<RingParts>,
    kick: Option<OwnedFd>,
    call: Arc<Event>,
    error: Arc<Event>,
    is_enabled: bool,
    state: State,
}

enum State {
    Stopped,
    Running(Queue),
    /// It will have come so far.
    Stopping(JoinHandle<u16>),
}

/// An event counter of the front end's, if it has given one. It may give another at any time.
#[derive(Default)]
pub(super) struct Event(ArcSwapOption<Counter>);

struct Counter {
    descriptor: OwnedFd,
    /// Adding to a full counter would wait.
    is_blocking: bool,
}

impl Event {
    fn set(&self, counter: Option<Counter>) {
        self.0.store(counter.map(Arc::new));
    }

    /// Adds one.
    fn signal(&self) {
        let Some(counter) = &*self.0.load() else {
            return;
        };
        // That is how the front end wants to have it, which reads the same counter.
        if counter.is_blocking {
            let mut polled = [PollFd::new(counter.descriptor.as_fd(), PollFlags::POLLOUT)];
            if poll(&mut polled, PollTimeout::ZERO) == Ok(0) {
                return;
            }
        }
        // One that is full is one that the front end will look at.
        let _ = nix::unistd::write(&counter.descriptor, &1_u64.to_ne_bytes());
    }
}

/// The counter by which a queue calls its driver.
struct Call(Arc<Event>);

impl Notify for Call {
    fn notify(&self) {
        self.0.signal();
    }
}

/// What a ring needs from its session to run.
pub(super) struct Surroundings {
    pub(super) device: Rc<Device>,
    /// The device's features that were agreed on.
    pub(super) features: u64,
    pub(super) memory: SharedMemory,
    pub(super) in_flight: Option<InFlightRecord>,
    /// There is no message to enable a ring.
    pub(super) all_enabled: bool,
}

impl Ring {
    pub(super) fn new(index: u16) -> Self {
        Self {
            index,
            size: 0,
            base: 0,
            parts: None,
            kick: None,
            call: Arc::default(),
            error: Arc::default(),
            is_enabled: false,
            state: State::Stopped,
        }
    }

    fn is_running(&self) -> bool {
        matches!(self.state, State::Running(_))
    }

    pub(super) fn set_size(&mut self, size: u32) -> Result<(), Refusal> {
        let is_fit = size.is_power_of_two() && size <= MAX_SIZE && !self.is_running();
        let fit = u16::try_from(size).ok().filter(|_| is_fit);
        self.size = fit.ok_or(Refusal::RingSize(size))?;
        Ok(())
    }

    pub(super) fn set_base(&mut self, base: u32) -> Result<(), Refusal> {
        let fit = u16::try_from(base).ok().filter(|_| !self.is_running());
        self.base = fit.ok_or(Refusal::RingBase(base))?;
        Ok(())
    }

    /// Takes other addresses. False if they are those it had.
    pub(super) async fn set_parts(&mut self, parts: RingParts) -> bool {
        if self.parts == Some(parts) {
            return false;
        }
        self.pause().await;
        self.parts = Some(parts);
        true
    }

    pub(super) async fn set_kick(&mut self, kick: OwnedFd) -> Result<(), Refusal> {
        let kick = Counter::new(kick)?;
        self.pause().await;
        self.kick = Some(kick.descriptor);
        Ok(())
    }

    pub(super) fn set_call(&mut self, call: Option<OwnedFd>) -> Result<(), Refusal> {
        self.call.set(call.map(Counter::new).transpose()?);
        // What was completed while there was none, or another, may not have been noticed.
        self.call.signal();
        Ok(())
    }

    pub(super) fn set_error(&mut self, error: Option<OwnedFd>) -> Result<(), Refusal> {
        self.error.set(error.map(Counter::new).transpose()?);
        Ok(())
    }

    pub(super) async fn enable(&mut self, is_enabled: bool) {
        self.is_enabled = is_enabled;
        if !is_enabled {
            self.pause().await;
        }
    }

    /// Starts the ring if everything for that is there.
    ///
    /// # Errors
    /// It does not fit into the record of requests in flight.
    pub(super) fn start(&mut self, surroundings: &Surroundings) -> Result<(), Refusal> {
        let Surroundings {
            device,
            features,
            memory,
            in_flight,
            all_enabled,
        } = surroundings;
        let is_ready = matches!(self.state, State::Stopped)
            && self.size > 0
            && (self.is_enabled || *all_enabled);
        let (true, Some(parts), Some(kick)) = (is_ready, self.parts, &self.kick) else {
            return Ok(());
        };
        let in_flight = in_flight
            .as_ref()
            .map(|record| record.of_ring(self.index, self.size));
        let in_flight = in_flight.transpose()?;
        let failed = Refusal::system("there is no descriptor left");
        let kick = kick.try_clone().map_err(failed)?;
        let memory = memory.clone();
        let error = Arc::clone(&self.error);
        let setup = QueueSetup {
            index: self.index,
            disk: Arc::clone(device.disk()),
            memory: move || memory.local(),
            place: Place {
                descriptors: parts.descriptors,
                available: parts.available,
                used: parts.used,
                size: self.size,
            },
            next_available: self.base,
            features: *features,
            kick,
            call: Box::new(Call(Arc::clone(&self.call))),
            in_flight,
            on_broken: Box::new(move |_| error.signal()),
        };
        tracing::debug!(ring = self.index, ?parts, base = self.base, "a ring starts");
        self.state = State::Running(Queue::start(device.context(self.index), setup));
        Ok(())
    }

    /// Lets the ring come to its end; [`pause`](Self::pause) waits for that.
    pub(super) fn begin_pause(&mut self) {
        let state = std::mem::replace(&mut self.state, State::Stopped);
        self.state = match state {
            State::Running(queue) => State::Stopping(tokio::task::spawn_local(queue.stop())),
            other => other,
        };
    }

    /// Stops the ring when all its requests are done; it can go on from there. False if it did not run.
    pub(super) async fn pause(&mut self) -> bool {
        self.begin_pause();
        let State::Stopping(stopping) = &mut self.state else {
            return false;
        };
        // Fails only when the process ends.
        if let Ok(base) = stopping.await {
            self.base = base;
        }
        self.state = State::Stopped;
        tracing::debug!(ring = self.index, base = self.base, "a ring has stopped");
        true
    }

    /// Stops the ring until the front end sets it up again. Gives the entry that it would have gone on with.
    pub(super) async fn stop(&mut self) -> u16 {
        self.pause().await;
        self.kick = None;
        self.base
    }

    /// Forgets everything that the front end has set. The ring has to be stopped.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.index);
    }
}

impl Counter {
    /// Sees that a descriptor is an event counter, the only kind that cannot make who writes it or waits for it do more than that.
    fn new(descriptor: OwnedFd) -> Result<Self, Refusal> {
        let name = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
        // Without /proc, nothing can be said.
        if let Ok(kind) = std::fs::read_link(name)
            && kind.as_os_str() != EVENTFD
        {
            return Err(Refusal::NoEventFd);
        }
        let flags = fcntl(&descriptor, FcntlArg::F_GETFL);
        let flags = flags.map_err(Refusal::system("an eventfd cannot be used"))?;
        let flags = OFlag::from_bits_retain(flags);
        Ok(Self {
            descriptor,
            is_blocking: !flags.contains(OFlag::O_NONBLOCK),
        })
    }
}
