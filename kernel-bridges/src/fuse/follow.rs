//! Brings a context's thread to the processor of its client while there is one that sends one request at a time.
//!
//! Such a client sleeps while it is served. On its own processor, serving it costs two switches between threads; from another one it
//! costs two wake-ups of a processor, which take ten times as long where an idle processor is halted, as in a virtual machine. Left to
//! itself, the system prefers an idle processor. A client that sends several requests at a time is served while it goes on, and the
//! thread is left to the system again.
//!
//! The thread never leaves the processors that it was allowed when it was brought to one; whoever changes that meanwhile is obeyed.

use std::cell::RefCell;
use std::fs;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// So many requests in a row, one at a time and from one client, bring the thread to it.
const BRING: u32 = 32;
/// So many requests later it is looked where the client is now.
const LOOK_AGAIN: u32 = 512;
/// So many more requests that come together than alone set it free, and so many from other clients.
const FREE: u32 = 16;
const OTHERS: u32 = 64;

thread_local! {
    static FOLLOWER: RefCell<Follower<Threads>> = RefCell::default();
}

/// Notes a request that came alone, from the client known as `who`, which runs on the processor that `cpu` tells.
pub(super) fn alone(who: u64, cpu: impl FnOnce() -> Option<usize>) {
    FOLLOWER.with_borrow_mut(|follower| follower.alone(who, cpu));
}

/// The processor that a thread runs on, or ran on last.
pub(super) fn processor_of(thread: u32) -> Option<usize> {
    let status = fs::read_to_string(format!("/proc/{thread}/stat")).ok()?;
    // The name before may hold anything.
    let (_, fields) = status.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(36)?.parse().ok()
}

/// Notes a request that came together with others.
pub(super) fn together() {
    FOLLOWER.with_borrow_mut(Follower::together);
}

/// Who decides where threads run.
trait Processors {
    /// Restricts the calling thread to one processor, if it may run there.
    fn bring(&mut self, cpu: usize) -> bool;
    /// Lets it run where it might before.
    fn free(&mut self);
}

/// How one thread follows its clients.
#[derive(Debug, Default)]
struct Follower<P> {
    processors: P,
    /// The last client, and how many requests in a row came from it alone.
    who: u64,
    streak: u32,
    /// Where the thread was brought, and for whom.
    at: Option<(usize, u64)>,
    /// Requests that came together, less those that came alone.
    together: u32,
    /// Requests of others since the thread was brought here.
    others: u32,
}

impl<P: Processors> Follower<P> {
    fn alone(&mut self, who: u64, cpu: impl FnOnce() -> Option<usize>) {
        self.together = self.together.saturating_sub(1);
        if self.who != who {
            self.who = who;
            self.streak = 0;
        }
        self.streak += 1;
        let patience = if self.at.is_some() { LOOK_AGAIN } else { BRING };
        if self.streak >= patience {
            self.streak = 0;
            self.follow(who, cpu);
        }
        if let Some((_, whose)) = self.at {
            if whose == who {
                self.others = 0;
            } else {
                self.others += 1;
                if self.others >= OTHERS {
                    self.free();
                }
            }
        }
    }

    fn together(&mut self) {
        self.streak = 0;
        if self.at.is_some() {
            self.together += 1;
            if self.together >= FREE {
                self.free();
            }
        }
    }

    fn follow(&mut self, who: u64, cpu: impl FnOnce() -> Option<usize>) {
        let Some(cpu) = cpu() else { return };
        if self.at.is_some_and(|(at, _)| at == cpu) {
            self.at = Some((cpu, who));
            return;
        }
        self.free();
        if self.processors.bring(cpu) {
            self.at = Some((cpu, who));
        }
    }

    fn free(&mut self) {
        self.together = 0;
        self.others = 0;
        if self.at.take().is_some() {
            self.processors.free();
        }
    }
}

/// The system's threads.
#[derive(Debug, Default)]
struct Threads {
    /// Where the thread might run before it was brought, and where it was brought.
    before: Option<(CpuSet, CpuSet)>,
}

/// The calling thread, to the system calls here.
const SELF: Pid = Pid::from_raw(0);

impl Processors for Threads {
    fn bring(&mut self, cpu: usize) -> bool {
        let Ok(allowed) = sched_getaffinity(SELF) else {
            return false;
        };
        let mut one = CpuSet::new();
        if allowed.is_set(cpu) != Ok(true) || one.set(cpu).is_err() {
            return false;
        }
        let is_brought = sched_setaffinity(SELF, &one).is_ok();
        if is_brought {
            self.before = Some((allowed, one));
        }
        is_brought
    }

    fn free(&mut self) {
        let Some((before, ours)) = self.before.take() else {
            return;
        };
        // Somebody else's choice stands.
        if sched_getaffinity(SELF) == Ok(ours) {
            // A processor that has gone meanwhile is the system's business.
            let _ = sched_setaffinity(SELF, &before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Processors 0 to 7.
    #[derive(Debug, Default)]
    struct Recorded(Vec<Option<usize>>);

    impl Processors for Recorded {
        fn bring(&mut self, cpu: usize) -> bool {
            let is_there = cpu < 8;
            if is_there {
                self.0.push(Some(cpu));
            }
            is_there
        }

        fn free(&mut self) {
            self.0.push(None);
        }
    }

    fn send(follower: &mut Follower<Recorded>, who: u64, cpu: usize, requests: u32) {
        for _ in 0..requests {
            follower.alone(who, || Some(cpu));
        }
    }

    #[test]
    fn a_client_that_sends_one_at_a_time_is_followed() {
        let mut follower = Follower::default();
        send(&mut follower, 1, 3, BRING - 1);
        assert_eq!(follower.processors.0, []);
        send(&mut follower, 1, 3, 1000);
        assert_eq!(follower.processors.0, [Some(3)]);
        send(&mut follower, 1, 5, LOOK_AGAIN);
        assert_eq!(follower.processors.0, [Some(3), None, Some(5)]);
        send(&mut follower, 2, 5, OTHERS + BRING);
        assert_eq!(follower.processors.0[3..], [None, Some(5)]);
    }

    #[test]
    fn requests_that_come_together_free_the_thread() {
        let mut follower = Follower::default();
        send(&mut follower, 1, 3, BRING);
        for _ in 0..FREE {
            follower.together();
        }
        assert_eq!(follower.processors.0, [Some(3), None]);
        send(&mut follower, 1, 3, BRING - 1);
        follower.together();
        send(&mut follower, 1, 3, BRING - 1);
        assert_eq!(follower.processors.0, [Some(3), None]);
    }

    #[test]
    fn a_few_that_come_together_do_not() {
        let mut follower = Follower::default();
        send(&mut follower, 1, 3, BRING);
        for _ in 0..100 {
            follower.together();
            send(&mut follower, 1, 3, 2);
        }
        assert_eq!(follower.processors.0, [Some(3)]);
    }

    #[test]
    fn several_clients_in_turn_leave_the_thread_alone() {
        let mut follower = Follower::default();
        for _ in 0..100 {
            send(&mut follower, 1, 3, 1);
            send(&mut follower, 2, 4, 1);
        }
        assert_eq!(follower.processors.0, []);
        send(&mut follower, 1, 3, BRING);
        for _ in 0..OTHERS {
            send(&mut follower, 2, 4, 1);
            send(&mut follower, 3, 5, 1);
        }
        assert_eq!(follower.processors.0, [Some(3), None]);
    }

    #[test]
    fn a_processor_that_is_not_allowed_is_not_tried_for_long() {
        let mut follower = Follower::default();
        send(&mut follower, 1, 9, 1000);
        assert_eq!(follower.processors.0, []);
        follower.together();
        assert_eq!(follower.processors.0, []);
    }

    #[test]
    fn the_processor_of_a_thread_is_found() {
        let cpu = processor_of(std::process::id()).expect("the thread exists");
        assert!(cpu < CpuSet::count());
        assert_eq!(processor_of(u32::MAX), None);
    }

    #[test]
    fn a_real_thread_is_brought_and_freed_where_it_may_run() {
        std::thread::spawn(|| {
            let before = sched_getaffinity(SELF).expect("a thread has processors");
            let cpu = (0..CpuSet::count())
                .find(|cpu| before.is_set(*cpu) == Ok(true))
                .expect("there is one at least");
            let mut threads = Threads::default();
            assert!(threads.bring(cpu));
            let mut one = CpuSet::new();
            one.set(cpu).expect("it is in range");
            assert_eq!(sched_getaffinity(SELF), Ok(one));
            threads.free();
            assert_eq!(sched_getaffinity(SELF), Ok(before));
        })
        .join()
        .expect("the thread succeeds");
    }
}
