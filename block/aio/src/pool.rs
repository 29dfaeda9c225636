//! Threads for what blocks: opening files, name resolution, compression, key derivation, and the
//! operations of a context without a ring.
//!
//! The pool belongs to the process. Threads are started when work waits and none is idle, up to
//! 64, and end after 10 s without work. Jobs start in the order in which they came.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::sim;

const MAX_THREADS: usize = 64;
const IDLE: Duration = Duration::from_secs(10);
const STACK: usize = 256 << 10;

type Job = Box<dyn FnOnce() + Send>;

struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

static POOL: Pool = Pool {
    state: Mutex::new(State {
        jobs: VecDeque::new(),
        threads: 0,
        idle: 0,
    }),
    work: Condvar::new(),
};

/// Runs `f` on a thread that may block and gives its result; in a simulation, `f` runs at once.
/// Can be awaited anywhere. Dropping the future does not stop `f`.
///
/// # Panics
///
/// When `f` does.
pub async fn run<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    if sim::is_active() {
        crate::yield_now().await;
        return f();
    }
    let (sender, receiver) = oneshot::channel();
    start(Box::new(move || {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
        // Nobody waits when the future was dropped.
        let _ = sender.send(result);
    }));
    match receiver.await.expect("the job always answers") {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Queues a job that does not panic.
pub(crate) fn start(job: Job) {
    let mut state = POOL.lock();
    state.jobs.push_back(job);
    if state.idle >= state.jobs.len() {
        drop(state);
        POOL.work.notify_one();
        return;
    }
    if state.threads == MAX_THREADS {
        return;
    }
    state.threads += 1;
    drop(state);
    let spawned = thread::Builder::new()
        .name("pool".into())
        .stack_size(STACK)
        .spawn(work);
    if let Err(error) = spawned {
        let mut state = POOL.lock();
        state.threads -= 1;
        assert!(
            state.threads > 0,
            "cannot start a thread for blocking work: {error}"
        );
    }
}

fn work() {
    let mut state = POOL.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = POOL.lock();
            continue;
        }
        state.idle += 1;
        let (woken, timeout) = POOL
            .work
            .wait_timeout(state, IDLE)
            .unwrap_or_else(PoisonError::into_inner);
        state = woken;
        state.idle -= 1;
        if timeout.timed_out() && state.jobs.is_empty() {
            state.threads -= 1;
            return;
        }
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
