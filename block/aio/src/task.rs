//! The tasks of one executor and the wakers that name them.
//!
//! A waker is one word: which executor, which task slot, and a generation of each. It owns
//! nothing, so cloning and dropping it cost nothing, it may outlive its task and its executor, and
//! it may be used on any thread. Generations are short and wrap; a waker that outlived its task can
//! therefore, very rarely, wake a later one. A future must stand being polled without need anyway,
//! so that is harmless.
//!
//! A task is in the ready queue at most once.

// UNSAFETY: a `RawWaker` vtable over a plain number.
#![expect(unsafe_code, reason = "wakers are built from a vtable")]

use std::future::Future;
use std::mem::ManuallyDrop;
use std::panic::Location;
use std::pin::Pin;
use std::ptr;
use std::task::{RawWaker, RawWakerVTable, Waker};

use crate::executor;

const _: () = assert!(usize::BITS == 64, "a waker packs its target into 64 bits");

const GENERATION_BITS: u32 = 24;
const SLOT_BITS: u32 = 24;
const MASK: u64 = (1 << GENERATION_BITS) - 1;

/// A task of one executor: its slot and the slot's generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TaskKey(u64);

impl TaskKey {
    fn new(slot: usize, generation: u32) -> TaskKey {
        assert!(slot >> SLOT_BITS == 0, "too many tasks on one context");
        TaskKey((slot as u64) << GENERATION_BITS | (u64::from(generation) & MASK))
    }
    fn slot(self) -> usize {
        (self.0 >> GENERATION_BITS) as usize
    }
    fn generation(self) -> u32 {
        (self.0 & MASK) as u32
    }
}

/// An executor: the index of its context and how often that index was given out before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExecutorId {
    pub(crate) index: u8,
    pub(crate) generation: u8,
}

/// A waker for a task; it has nothing to drop.
pub(crate) fn waker(executor: ExecutorId, task: TaskKey) -> ManuallyDrop<Waker> {
    let word = u64::from(executor.index) << 56 | u64::from(executor.generation) << 48 | task.0;
    #[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits here")]
    let raw = RawWaker::new(ptr::without_provenance(word as usize), &VTABLE);
    // SAFETY: the vtable's functions take the data pointer as a number and never follow it, so
    // they are sound for every number, on every thread, any number of times.
    ManuallyDrop::new(unsafe { Waker::from_raw(raw) })
}

static VTABLE: RawWakerVTable = RawWakerVTable::new(
    |data| RawWaker::new(data, &VTABLE),
    wake,
    wake,
    |_nothing_to_drop| {},
);

fn wake(data: *const ()) {
    let word = data.addr() as u64;
    let [index, generation, ..] = word.to_be_bytes();
    let task = TaskKey(word & ((1 << (SLOT_BITS + GENERATION_BITS)) - 1));
    executor::wake(ExecutorId { index, generation }, task);
}

/// A task's future, as the executor stores it.
pub(crate) type TaskFuture = Pin<Box<dyn Future<Output = ()>>>;

/// All tasks of one executor.
#[derive(Default)]
pub(crate) struct Tasks {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

struct Slot {
    generation: u32,
    queued: bool,
    /// `None` in a free slot and while the task is being polled.
    future: Option<TaskFuture>,
    /// `None` in a free slot; else where the task was spawned.
    spawned_at: Option<&'static Location<'static>>,
}

impl Tasks {
    /// Reserves a slot for a task; its future follows by [`park`](Self::park).
    pub(crate) fn insert(&mut self, spawned_at: &'static Location<'static>) -> TaskKey {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                queued: false,
                future: None,
                spawned_at: None,
            });
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.spawned_at = Some(spawned_at);
        TaskKey::new(index, slot.generation)
    }

    fn get(&mut self, task: TaskKey) -> Option<&mut Slot> {
        self.slots
            .get_mut(task.slot())
            .filter(|slot| slot.generation == task.generation() && slot.spawned_at.is_some())
    }

    /// Notes that the task is woken. True when it must now be put into the ready queue.
    pub(crate) fn wake(&mut self, task: TaskKey) -> bool {
        self.get(task)
            .is_some_and(|slot| !std::mem::replace(&mut slot.queued, true))
    }

    /// Takes a task that was in the ready queue out for polling; `None` when it is gone.
    pub(crate) fn take(&mut self, task: TaskKey) -> Option<TaskFuture> {
        let slot = self.get(task)?;
        slot.queued = false;
        slot.future.take()
    }

    /// Puts a pending task back.
    pub(crate) fn park(&mut self, task: TaskKey, future: TaskFuture) {
        if let Some(slot) = self.get(task) {
            slot.future = Some(future);
        }
    }

    /// Frees the slot of a task that is done.
    pub(crate) fn remove(&mut self, task: TaskKey) {
        if let Some(slot) = self.get(task) {
            let next = ((u64::from(slot.generation) + 1) & MASK) as u32;
            *slot = Slot {
                generation: next,
                queued: false,
                future: None,
                spawned_at: None,
            };
            self.free.push(task.slot());
        }
    }

    /// The number of tasks that are not done.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Where each task that is not done was spawned.
    pub(crate) fn spawned_at(&self) -> impl Iterator<Item = &'static Location<'static>> {
        self.slots.iter().filter_map(|slot| slot.spawned_at)
    }
}
