//! Contexts: starting, running, waking, stopping, on both engines.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::engines::{self, Which, both, only_here, run_again};
use stord_aio::sync::{Mutex, Notify, mpsc, oneshot};
use stord_aio::{
    Context, ContextGone, PollParams, add_spinner, current_index, join_all, pool, spawn_local,
    time, yield_now,
};

#[test]
fn a_future_runs_on_the_context_and_gives_its_result() {
    both(|which| {
        let context = which.start();
        let index = context.index();
        let seen = context.block_on(|| async { current_index() });
        assert_eq!(seen, Ok(index));
        let name = context.block_on(|| async { Context::current().map(|c| c.name().to_owned()) });
        assert_eq!(name, Ok(Some(format!("{which:?}"))));
        assert!(Context::current().is_none(), "this is no context");
        context.stop();
    });
}

#[test]
fn a_spawned_task_is_polled_before_spawn_returns() {
    both(|which| {
        let context = which.start();
        let polled = context.block_on(|| async {
            let polled = Rc::new(Cell::new(false));
            let flag = Rc::clone(&polled);
            spawn_local(async move { flag.set(true) });
            polled.get()
        });
        assert_eq!(polled, Ok(true));
        context.stop();
    });
}

#[test]
fn a_yielding_task_lets_all_others_run_first() {
    both(|which| {
        let context = which.start();
        let order = context.block_on(|| async {
            let order = Rc::new(RefCell::new(Vec::new()));
            let tasks = (0..3).map(|name| {
                let order = Rc::clone(&order);
                async move {
                    for round in 0..3 {
                        order.borrow_mut().push((round, name));
                        yield_now().await;
                    }
                }
            });
            in_tasks(tasks.collect()).await;
            order.take()
        });
        let expected: Vec<(i32, i32)> = (0..3).flat_map(|r| (0..3).map(move |n| (r, n))).collect();
        assert_eq!(order, Ok(expected));
        context.stop();
    });
}

#[test]
fn joined_futures_all_start_and_keep_their_order() {
    both(|which| {
        let context = which.start();
        let outputs = context.block_on(|| async {
            let started = Rc::new(Cell::new(0));
            let futures = (0..5u64).map(|n| {
                let started = Rc::clone(&started);
                async move {
                    started.set(started.get() + 1);
                    // Later ones are done first.
                    for _ in n..5 {
                        yield_now().await;
                    }
                    assert_eq!(started.get(), 5, "none waits for another to be done");
                    n
                }
            });
            join_all(futures.collect()).await
        });
        assert_eq!(outputs, Ok(vec![0, 1, 2, 3, 4]));
        context.stop();
    });
}

#[test]
fn timers_expire_in_the_order_of_their_deadlines() {
    both(|which| {
        let context = which.start();
        let order = context.block_on(|| async {
            let start = Instant::now();
            let order = Rc::new(RefCell::new(Vec::new()));
            let tasks = [30, 10, 20].map(|ms| {
                let order = Rc::clone(&order);
                async move {
                    time::sleep(Duration::from_millis(ms)).await;
                    assert!(start.elapsed() >= Duration::from_millis(ms), "not early");
                    order.borrow_mut().push(ms);
                }
            });
            join_all(tasks.into()).await;
            time::sleep_until(start).await;
            order.take()
        });
        assert_eq!(order, Ok(vec![10, 20, 30]));
        context.stop();
    });
}

#[test]
fn a_dropped_timer_wakes_nobody() {
    both(|which| {
        let context = which.start();
        let done = context.block_on(|| async {
            let mut far = Box::pin(time::sleep(Duration::from_secs(3600)));
            let first = std::future::poll_fn(|cx| std::task::Poll::Ready(far.as_mut().poll(cx)));
            assert!(first.await.is_pending());
            drop(far);
        });
        assert_eq!(done, Ok(()));
        context.stop();
    });
}

#[test]
fn wake_ups_from_other_threads_are_never_lost() {
    both(|which| {
        const ROUNDS: u64 = 20_000;
        let (left, right) = (which.start(), which.start());
        let (to_right, mut from_left) = mpsc::unbounded_channel();
        let (to_left, mut from_right) = mpsc::unbounded_channel();
        let echo = right.run(|| async move {
            while let Some(n) = from_left.recv().await {
                if to_left.send(n).is_err() {
                    break;
                }
            }
        });
        let sum = left.block_on(|| async move {
            let mut sum = 0u64;
            for n in 0..ROUNDS {
                to_right.send(n).expect("the other side listens");
                sum += from_right.recv().await.expect("the other side answers");
            }
            sum
        });
        assert_eq!(sum, Ok(ROUNDS * (ROUNDS - 1) / 2));
        drop(echo);
        left.stop();
        right.stop();
    });
}

#[test]
fn many_threads_wake_one_context() {
    both(|which| {
        const THREADS: u64 = 4;
        const EACH: u64 = 5_000;
        let context = which.start();
        let sum = Arc::new(AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for n in 0..EACH {
                        let sum = Arc::clone(&sum);
                        let add = context.run(move || async move {
                            yield_now().await;
                            sum.fetch_add(n, Ordering::Relaxed);
                        });
                        // Not waited for: it runs all the same.
                        drop(add);
                    }
                });
            }
        });
        context.stop();
        assert_eq!(sum.load(Ordering::Relaxed), THREADS * EACH * (EACH - 1) / 2);
    });
}

#[test]
fn a_lock_is_shared_by_contexts_and_plain_threads() {
    both(|which| {
        const EACH: u64 = 2_000;
        let contexts: Vec<Context> = (0..3).map(|_| which.start()).collect();
        let lock = Arc::new(Mutex::new(0u64));
        let running: Vec<_> = contexts
            .iter()
            .map(|context| {
                let lock = Arc::clone(&lock);
                context.run(move || async move {
                    for _ in 0..EACH {
                        let mut counter = lock.lock().await;
                        let seen = *counter;
                        yield_now().await;
                        *counter = seen + 1;
                    }
                })
            })
            .collect();
        drop(running);
        for context in contexts {
            context.stop();
        }
        assert_eq!(*lock.blocking_lock(), 3 * EACH);
    });
}

#[test]
fn stop_waits_for_tasks_and_for_tasks_that_these_start() {
    both(|which| {
        let context = which.start();
        let finished = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&finished);
        let started = context.block_on(|| async move {
            spawn_local(async move {
                time::sleep(Duration::from_millis(5)).await;
                counter.fetch_add(1, Ordering::Relaxed);
                spawn_local(async move {
                    pool::run(|| ()).await;
                    counter.fetch_add(1, Ordering::Relaxed);
                });
            });
        });
        assert_eq!(started, Ok(()));
        context.stop();
        assert_eq!(finished.load(Ordering::Relaxed), 2);
    });
}

#[test]
fn work_may_come_in_while_a_context_stops() {
    both(|which| {
        let context = which.start();
        let (go, wait) = oneshot::channel::<()>();
        let blocked = context.run(|| async move { wait.await.is_ok() });
        let late = context.clone();
        let stopper = std::thread::spawn(move || context.stop());
        // Whether or not the stop has been heard yet, the first task keeps the context alive.
        assert_eq!(late.block_on(|| async { 1 }), Ok(1));
        go.send(()).expect("the task waits");
        stopper.join().expect("it stops");
        assert_eq!(engines::wait(blocked), Ok(true));
        assert_eq!(late.block_on(|| async { 2 }), Err(ContextGone));
        late.stop();
    });
}

#[test]
fn an_ended_context_refuses_work_and_frees_its_index() {
    both(|which| {
        let first = which.start();
        let old = first.clone();
        first.stop();
        assert_eq!(old.block_on(|| async {}), Err(ContextGone));
        for _ in 0..200 {
            let next = which.start();
            assert!(next.index() < stord_aio::MAX_CONTEXTS);
            assert_eq!(next.block_on(|| async { 7 }), Ok(7));
            next.stop();
        }
        assert_eq!(old.block_on(|| async {}), Err(ContextGone));
    });
}

#[test]
fn a_context_can_ask_itself_to_stop() {
    both(|which| {
        let context = which.start();
        let own = context.clone();
        let asked = context.block_on(|| async move {
            own.stop();
            yield_now().await;
        });
        assert_eq!(asked, Ok(()));
        context.stop();
    });
}

#[test]
fn block_on_passes_a_panic_on_and_the_context_lives_on() {
    both(|which| {
        let context = which.start();
        let same = context.clone();
        let panic = std::panic::catch_unwind(move || {
            same.block_on(|| async {
                yield_now().await;
                panic!("as expected");
            })
        });
        let panic = panic.expect_err("the panic is passed on");
        assert_eq!(panic.downcast_ref(), Some(&"as expected"));
        assert_eq!(context.block_on(|| async { 1 }), Ok(1));
        context.stop();
    });
}

#[test]
fn a_panic_in_a_task_ends_the_process_with_a_message() {
    both(|which| {
        let test = "context::a_panic_in_a_task_ends_the_process_with_a_message";
        if only_here() {
            let context = which.start();
            let running = context.run(|| async { panic!("all is lost") });
            let gone: Result<(), ContextGone> = engines::wait(running);
            assert_eq!(gone, Err(ContextGone));
            // The process is about to end.
            loop {
                std::thread::park();
            }
        }
        let output = run_again(test, which);
        assert!(!output.status.success());
        let message = String::from_utf8_lossy(&output.stderr);
        let expected = format!("a task of I/O context '{which:?}' panicked: all is lost");
        assert!(message.contains(&expected), "{message}");
    });
}

#[test]
fn the_environment_chooses_the_fallback_engine() {
    both(|which| {
        if only_here() {
            let context = Which::Ring.start();
            let expected = which == Which::Ring;
            assert_eq!(context.uses_ring(), expected);
            context.stop();
            return;
        }
        let output = run_again(
            "context::the_environment_chooses_the_fallback_engine",
            which,
        );
        assert!(output.status.success(), "{output:?}");
    });
}

#[test]
fn a_polling_context_works_and_its_parameters_change() {
    both(|which| {
        let params = PollParams {
            max_ns: 50_000,
            grow: 2,
            shrink: 2,
        };
        let context = which.start_polling(params);
        assert_eq!(context.polling(), params);
        let slow = context.clone();
        for round in 0..200 {
            let timed = slow.block_on(move || async move {
                if round % 10 == 0 {
                    time::sleep(Duration::from_micros(200)).await;
                }
                round
            });
            assert_eq!(timed, Ok(round));
        }
        context.set_polling(PollParams::default());
        assert_eq!(context.polling(), PollParams::default());
        assert_eq!(context.block_on(|| async { 1 }), Ok(1));
        context.stop();
    });
}

#[test]
fn a_spinner_finds_work_while_the_loop_polls() {
    both(|which| {
        let context = which.start_polling(PollParams {
            max_ns: 1_000_000_000,
            grow: 1_000_000,
            shrink: 0,
        });
        let found = context.block_on(|| async {
            let notify = Rc::new(Notify::new());
            let spins = Rc::new(Cell::new(0));
            let (from_spinner, counter) = (Rc::clone(&notify), Rc::clone(&spins));
            let spinner = add_spinner(Box::new(move || {
                counter.set(counter.get() + 1);
                if counter.get() == 100 {
                    from_spinner.notify_one();
                }
                counter.get() == 100
            }));
            // A few short sleeps make the polling time grow from zero; the spinner may well be
            // found in one of them.
            while spins.get() == 0 {
                time::sleep(Duration::from_micros(50)).await;
            }
            notify.notified().await;
            drop(spinner);
            let before = spins.get();
            time::sleep(Duration::from_micros(50)).await;
            assert_eq!(spins.get(), before, "it is not called any more");
            before
        });
        assert_eq!(found.map(|spins| spins >= 100), Ok(true));
        context.stop();
    });
}

/// Runs each future as a task of its own.
async fn in_tasks(futures: Vec<impl Future<Output = ()> + 'static>) {
    let mut ends = Vec::new();
    for future in futures {
        let (end, done) = oneshot::channel();
        ends.push(done);
        spawn_local(async move {
            future.await;
            let _ = end.send(());
        });
    }
    for end in join_all(ends).await {
        end.expect("the task sends before it ends");
    }
}
