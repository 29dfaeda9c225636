//! The pool of blocking threads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Barrier};
use std::thread;

use stord_aio::{join_all, pool, yield_now};

use crate::engines::{self, both};

#[test]
fn blocking_work_runs_elsewhere_and_the_context_goes_on() {
    both(|which| {
        let context = which.start();
        let (go, wait) = std::sync::mpsc::channel();
        let result = context.block_on(move || async move {
            let own = thread::current().id();
            let blocking = pool::run(move || {
                wait.recv().expect("the context goes on");
                thread::current().id()
            });
            let going_on = async move {
                yield_now().await;
                go.send(()).expect("the pool waits");
                own
            };
            let both: Vec<std::pin::Pin<Box<dyn Future<Output = thread::ThreadId>>>> =
                vec![Box::pin(blocking), Box::pin(going_on)];
            let ids = join_all(both).await;
            ids[0] != ids[1]
        });
        assert_eq!(result, Ok(true));
        context.stop();
    });
}

#[test]
fn jobs_that_wait_for_each_other_run_at_the_same_time() {
    // Fewer than the pool's limit, which other tests use, too.
    const JOBS: usize = 32;
    let barrier = Arc::new(Barrier::new(JOBS));
    let jobs = (0..JOBS).map(|n| {
        let barrier = Arc::clone(&barrier);
        pool::run(move || {
            barrier.wait();
            n
        })
    });
    let results = engines::wait(join_all(jobs.collect()));
    assert_eq!(results, (0..JOBS).collect::<Vec<_>>());
}

#[test]
fn more_jobs_than_threads_all_run() {
    let jobs = (0..1000u64).map(|n| pool::run(move || n));
    let sum: u64 = engines::wait(join_all(jobs.collect())).iter().sum();
    assert_eq!(sum, 999 * 1000 / 2);
}

#[test]
fn a_panic_of_a_job_is_passed_on_and_the_thread_lives_on() {
    for _ in 0..100 {
        let job = pool::run(|| panic!("as expected"));
        let panic: Result<(), _> = catch_unwind(AssertUnwindSafe(|| engines::wait(job)));
        let panic = panic.expect_err("the panic is passed on");
        assert_eq!(panic.downcast_ref(), Some(&"as expected"));
    }
    assert_eq!(engines::wait(pool::run(|| 1)), 1);
}
