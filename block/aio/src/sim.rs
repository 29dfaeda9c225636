//! Runs tasks on the calling thread with interleavings chosen by a seed and a clock that only
//! moves when nothing else can: the same seed gives the same run.
//!
//! At each step one ready task is polled or one submitted operation is carried out, whichever the
//! seed picks; so tasks run in every possible order, and operations in flight together complete in
//! every possible order too. When there is neither, the clock jumps to the next timer. When there
//! is no timer either, the tasks wait for each other and the simulation panics, naming them.
//!
//! Nothing may come in from outside: work of the blocking pool runs inline, and a wake-up from
//! another thread is not seen.

use std::cell::Cell;
use std::future::Future;
use std::panic::Location;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::engine::{Engine, Simulated};
use crate::executor::{self, Local, VirtualClock};
use crate::task::ExecutorId;

/// Runs a future, and the tasks that it spawns, with the interleaving that belongs to `seed`.
/// Returns when the future and all tasks are done.
///
/// # Panics
///
/// When tasks are left that nothing can wake, when a task panics, or on a context.
#[track_caller]
pub fn run<F, Fut, T>(seed: u64, f: F) -> T
where
    F: FnOnce() -> Fut,
    Fut: Future<Output = T> + 'static,
    T: 'static,
{
    static RUNS: AtomicU8 = AtomicU8::new(0);
    let id = ExecutorId {
        index: u8::MAX,
        generation: RUNS.fetch_add(1, Ordering::Relaxed),
    };
    let started_at = Location::caller();
    let local = Local::new(
        id,
        Engine::Simulated(Simulated::default()),
        Some(VirtualClock::new()),
    );
    local.enter(|| {
        let result = Rc::new(Cell::new(None));
        let output = Rc::clone(&result);
        let future = f();
        let root = async move { output.set(Some(future.await)) };
        local.spawn(Box::pin(root), started_at);
        let mut random = Random::new(seed);
        while step(&local, &mut random) {}
        let stuck: Vec<String> = local
            .tasks
            .borrow()
            .spawned_at()
            .map(|location| format!("\n  the task started at {location}"))
            .collect();
        assert!(
            stuck.is_empty(),
            "simulation with seed {seed}: nothing can wake{}",
            stuck.concat()
        );
        result.take().expect("the root task is done")
    })
}

/// Whether the caller runs in a simulation.
pub fn is_active() -> bool {
    executor::try_with(|local| matches!(local.engine, Engine::Simulated(_))) == Some(true)
}

/// Does one thing; false when there is nothing to do.
fn step(local: &Local, random: &mut Random) -> bool {
    let Engine::Simulated(engine) = &local.engine else {
        return false;
    };
    let tasks = local.ready.borrow().len();
    let operations = engine.runnable(local);
    if tasks + operations == 0 {
        let next = local.timers.borrow().next();
        let (Some(next), Some(clock)) = (next, &local.clock) else {
            return false;
        };
        clock.advance_to(next);
        local.run_timers();
        return true;
    }
    let pick = random.below(tasks + operations);
    if pick < tasks {
        let task = local.ready.borrow_mut().swap_remove_back(pick);
        local.run(task.expect("picked among the ready tasks"));
    } else {
        engine.run(local, pick - tasks);
    }
    true
}

/// The numbers that belong to a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "below `n`")]
        let number = (self.next() % n as u64) as usize;
        number
    }
}
