use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};

use super::lanes::{COMPUTING, NO_CONTEXT};
use super::*;

/// A pool of the test's own.
fn pool() -> &'static Pool {
    Box::leak(Box::new(Pool::new()))
}

/// A job that says when it has begun, ends when told to, and delivers its number.
struct Held {
    number: usize,
    begun: Sender<usize>,
    go: Arc<Mutex<Receiver<()>>>,
    done: Sender<usize>,
}

impl Job for Held {
    fn run(&mut self) {
        self.begun.send(self.number).expect("the test listens");
        let go = self.go.lock().expect("nobody panics");
        go.recv().expect("the test goes on");
    }

    fn deliver(self: Box<Self>) {
        self.done.send(self.number).expect("the test listens");
    }
}

/// The test's side of held jobs.
struct Holder {
    begun: Receiver<usize>,
    go: Sender<()>,
    done: Receiver<usize>,
    make: Box<dyn Fn(usize) -> Box<dyn Job>>,
}

fn holder() -> Holder {
    let (began, begun) = mpsc::channel();
    let (go, wait) = mpsc::channel();
    let (finished, done) = mpsc::channel();
    let wait = Arc::new(Mutex::new(wait));
    let make = Box::new(move |number| {
        Box::new(Held {
            number,
            begun: began.clone(),
            go: Arc::clone(&wait),
            done: finished.clone(),
        }) as Box<dyn Job>
    });
    Holder {
        begun,
        go,
        done,
        make,
    }
}

#[test]
fn a_serial_user_keeps_to_one_thread() {
    let pool = pool();
    let held = holder();
    for number in 0..500 {
        pool.start(0, (held.make)(number));
        held.go.send(()).expect("a job waits");
        assert_eq!(held.done.recv(), Ok(number));
        assert_eq!(pool.lock().threads, 1);
    }
}

#[test]
fn a_lane_runs_as_many_jobs_as_its_limit_and_the_rest_in_order() {
    let pool = pool();
    let held = holder();
    pool.set_limits(3, PoolLimits { min: 0, max: 2 });
    for number in 0..5 {
        pool.start(3, (held.make)(number));
    }
    let mut first: Vec<usize> = held.begun.iter().take(2).collect();
    first.sort_unstable();
    assert_eq!(first, [0, 1]);
    for next in 2..5 {
        assert!(held.begun.try_recv().is_err());
        held.go.send(()).expect("a job waits");
        held.done.recv().expect("one ends");
        assert_eq!(held.begun.recv(), Ok(next));
    }
    assert_eq!(pool.lock().threads, 2);
    for _ in 0..2 {
        held.go.send(()).expect("a job waits");
        held.done.recv().expect("one ends");
    }
}

#[test]
fn a_lane_without_places_does_not_hold_up_another() {
    let pool = pool();
    let (held, other) = (holder(), holder());
    pool.set_limits(1, PoolLimits { min: 0, max: 1 });
    pool.start(1, (held.make)(0));
    pool.start(1, (held.make)(1));
    assert_eq!(held.begun.recv(), Ok(0));
    pool.start(NO_CONTEXT, (other.make)(7));
    assert_eq!(other.begun.recv(), Ok(7));
    other.go.send(()).expect("the job waits");
    assert_eq!(other.done.recv(), Ok(7));
    assert!(held.begun.try_recv().is_err());
    held.go.send(()).expect("a job waits");
    held.go.send(()).expect("a job waits");
    assert_eq!(held.done.recv(), Ok(0));
    assert_eq!(held.done.recv(), Ok(1));
}

#[test]
fn a_raised_limit_lets_waiting_jobs_run() {
    let pool = pool();
    let held = holder();
    pool.set_limits(1, PoolLimits { min: 0, max: 1 });
    pool.start(1, (held.make)(0));
    pool.start(1, (held.make)(1));
    assert_eq!(held.begun.recv(), Ok(0));
    pool.set_limits(1, PoolLimits { min: 0, max: 2 });
    assert_eq!(held.begun.recv(), Ok(1));
    for _ in 0..2 {
        held.go.send(()).expect("a job waits");
        held.done.recv().expect("one ends");
    }
}

#[test]
fn threads_that_are_to_be_kept_start_at_once() {
    let pool = pool();
    pool.set_limits(1, PoolLimits { min: 3, max: 8 });
    assert_eq!(pool.lock().threads, 3);
    pool.set_limits(2, PoolLimits { min: 1, max: 8 });
    assert_eq!(pool.lock().threads, 4);
}

#[test]
fn computations_are_as_many_as_processors() {
    let pool = pool();
    let held = holder();
    let processors = thread::available_parallelism()
        .map_or(1, usize::from)
        .max(4);
    for number in 0..=processors {
        pool.start(COMPUTING, (held.make)(number));
    }
    for _ in 0..processors {
        held.begun.recv().expect("they begin");
    }
    assert_eq!(pool.lock().lanes.ready(), 0);
    assert!(held.begun.try_recv().is_err());
    for _ in 0..=processors {
        held.go.send(()).expect("a job waits");
    }
    assert_eq!(
        held.done.iter().take(processors + 1).count(),
        processors + 1
    );
}
