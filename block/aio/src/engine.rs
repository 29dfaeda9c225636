//! What carries out a context's operations and what it sleeps in: a ring, or epoll with blocking
//! threads. A simulation has neither and carries them out at once.

mod blocking;
mod fallback;
mod ring;
mod simulated;

use std::io;
use std::time::Duration;

use self::fallback::Fallback;
pub(crate) use self::ring::Ring;
pub(crate) use self::simulated::Simulated;
use crate::executor::Local;
use crate::op::{Op, Request};
use crate::task::ExecutorId;

/// The engine of one executor.
#[expect(clippy::large_enum_variant, reason = "there is one for each thread")]
pub(crate) enum Engine {
    Ring(Ring),
    Fallback(Fallback),
    Simulated(Simulated),
}

/// Whether a turn of the loop may wait for something to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Only look.
    No,
    /// Until something happens.
    Forever,
    /// The same, but no longer than this.
    AtMost(Duration),
}

impl Engine {
    /// The best engine to be had: a ring, unless that is not wanted or refused.
    ///
    /// # Errors
    ///
    /// When even epoll is refused.
    pub(crate) fn choose(
        context: ExecutorId,
        force_fallback: bool,
        batch: u32,
    ) -> io::Result<Engine> {
        let force_fallback = force_fallback
            || std::env::var_os("STORD_ENGINE").is_some_and(|name| name == "fallback");
        if !force_fallback {
            match Ring::new(batch) {
                Ok(ring) => return Ok(Engine::Ring(ring)),
                Err(error) => tracing::info!("io_uring is not available ({error}), using epoll"),
            }
        }
        Fallback::new(context).map(Engine::Fallback)
    }

    /// Submits as soon as `batch` operations are queued; 0 leaves it to the engine.
    pub(crate) fn set_batch(&self, batch: u32) {
        if let Engine::Ring(ring) = self {
            ring.set_batch(batch);
        }
    }

    /// Gets ready for the loop.
    pub(crate) fn start(&self, local: &Local) {
        if let Engine::Ring(ring) = self {
            ring.listen(local);
        }
    }

    /// Starts an operation and gives its slot.
    #[inline]
    pub(crate) fn submit(&self, local: &Local, request: Request) -> u32 {
        match self {
            Engine::Ring(ring) => ring.submit(local, request),
            Engine::Fallback(fallback) => fallback.submit(local, request),
            Engine::Simulated(simulated) => simulated.submit(local, request),
        }
    }

    /// Ends the wait for a descriptor in this slot, with ECANCELED, if it is still in flight.
    pub(crate) fn cancel(&self, local: &Local, slot: u32) {
        match self {
            Engine::Ring(ring) => ring.cancel(local, slot),
            Engine::Fallback(fallback) => fallback.cancel(local, slot),
            Engine::Simulated(simulated) => simulated.cancel(local, slot),
        }
    }

    /// Hands over everything submitted, waits as allowed, and completes what is done.
    pub(crate) fn turn(&self, local: &Local, wait: Wait) {
        local.turns.set(local.turns.get() + 1);
        match self {
            Engine::Ring(ring) => ring.turn(local, wait),
            Engine::Fallback(fallback) => fallback.turn(local, wait),
            Engine::Simulated(_) => {}
        }
    }

    /// Hands over what has been submitted, without looking what is done.
    pub(crate) fn submit_now(&self) {
        if let Engine::Ring(ring) = self {
            ring.submit_now();
        }
    }

    /// Whether a turn may find something, told without a system call.
    pub(crate) fn has_events(&self) -> bool {
        match self {
            Engine::Ring(ring) => ring.has_events(),
            Engine::Fallback(fallback) => fallback.has_events(),
            Engine::Simulated(_) => false,
        }
    }

    /// The number of operations that the engine itself keeps in flight.
    pub(crate) fn own_operations(&self) -> usize {
        match self {
            Engine::Ring(ring) => ring.own_operations(),
            Engine::Fallback(_) | Engine::Simulated(_) => 0,
        }
    }

    /// Ends the engine's own operations.
    pub(crate) fn shut_down(&self, local: &Local) {
        if let Engine::Ring(ring) = self {
            ring.shut_down(local);
        }
    }
}

impl Local {
    /// Starts an operation. What it gives waits for it; dropping that does not stop it.
    #[inline]
    pub(crate) fn submit(&self, request: Request) -> Op {
        Op::new(self.engine.submit(self, request))
    }

    /// Starts an operation on a blocking thread.
    pub(crate) fn submit_to_pool(&self, request: Request) -> Op {
        Op::new(match &self.engine {
            Engine::Simulated(simulated) => simulated.submit(self, request),
            _ => blocking::submit_to_pool(self, request),
        })
    }
}
