//! The lock on ranges of bytes, under many interleavings.

use std::cell::RefCell;
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;

use stord_aio::sync::RangeLock;
use stord_aio::{sim, spawn_local, yield_now};

/// Who holds what, kept beside the lock.
#[derive(Default)]
struct Model {
    held: Vec<(u32, Range<u64>, bool)>,
    most: usize,
}

impl Model {
    fn enter(&mut self, task: u32, range: &Range<u64>, is_shared: bool) {
        for (other, held, other_shares) in &self.held {
            let overlap = held.start < range.end && range.start < held.end;
            assert!(
                !overlap || (is_shared && *other_shares),
                "tasks {other} and {task} hold {held:?} and {range:?}"
            );
        }
        self.held.push((task, range.clone(), is_shared));
        self.most = self.most.max(self.held.len());
    }

    fn leave(&mut self, task: u32) {
        self.held.retain(|(holder, ..)| *holder != task);
    }
}

/// Numbers from a seed, for the test's own choices.
struct Choices(u64);

impl Choices {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

#[test]
fn holders_never_conflict_and_everybody_gets_through() {
    let mut most = 0;
    for seed in 1..=500 {
        most = most.max(sim::run(seed, move || async move {
            let lock = Rc::new(RangeLock::new());
            let model = Rc::new(RefCell::new(Model::default()));
            for task in 0..12 {
                let (lock, model) = (Rc::clone(&lock), Rc::clone(&model));
                let mut choices = Choices(seed * 1000 + u64::from(task) + 1);
                spawn_local(async move {
                    for _ in 0..6 {
                        let start = choices.below(20);
                        let range = start..start + choices.below(8);
                        let is_shared = choices.below(3) == 0;
                        let mut locking = Box::pin(if is_shared {
                            lock.lock_shared(range.clone())
                        } else {
                            lock.lock(range.clone())
                        });
                        if choices.below(5) == 0 {
                            // Asks, and sometimes gives up.
                            let first =
                                poll_fn(|cx| Poll::Ready(locking.as_mut().poll(cx).is_ready()));
                            let _is_locked = first.await;
                            yield_now().await;
                            drop(locking);
                            continue;
                        }
                        let guard = locking.await;
                        model.borrow_mut().enter(task, &range, is_shared);
                        for _ in 0..choices.below(4) {
                            yield_now().await;
                        }
                        model.borrow_mut().leave(task);
                        drop(guard);
                    }
                });
            }
            while !lock.is_idle() {
                yield_now().await;
            }
            model.borrow().most
        }));
    }
    assert!(most > 3, "ranges that do not conflict are held together");
}

#[test]
fn those_that_overlap_are_served_in_order() {
    for seed in 0..50 {
        let order = sim::run(seed, || async {
            let lock = Rc::new(RangeLock::new());
            let order = Rc::new(RefCell::new(Vec::new()));
            let first = lock.lock(0..10).await;
            for task in 0..5u64 {
                let (lock, order) = (Rc::clone(&lock), Rc::clone(&order));
                // Polled once at once, so they ask in this order.
                spawn_local(async move {
                    let _guard = lock.lock(task..10).await;
                    order.borrow_mut().push(task);
                    yield_now().await;
                });
            }
            drop(first);
            while !lock.is_idle() {
                yield_now().await;
            }
            order.take()
        });
        assert_eq!(order, [0, 1, 2, 3, 4], "seed {seed}");
    }
}

#[test]
fn readers_do_not_pass_a_writer_that_waits() {
    sim::run(1, || async {
        let lock = RangeLock::new();
        let reader = lock.lock_shared(0..10).await;
        let mut writer = Box::pin(lock.lock(5..15));
        let mut late = Box::pin(lock.lock_shared(8..9));
        let mut apart = Box::pin(lock.lock_shared(0..5));
        assert!(poll_fn(|cx| Poll::Ready(writer.as_mut().poll(cx).is_pending())).await);
        assert!(poll_fn(|cx| Poll::Ready(late.as_mut().poll(cx).is_pending())).await);
        assert!(poll_fn(|cx| Poll::Ready(apart.as_mut().poll(cx).is_ready())).await);
        drop(writer);
        drop(late.await);
        drop(reader);
        drop(lock.lock(0..20).await);
        drop(lock.lock(3..3).await);
    });
}
