//! Fences between one side that runs for every request and one that runs seldom: the frequent side
//! pays nothing, the seldom one interrupts every processor that runs a thread of ours.
//!
//! The guarantee is that of two sequentially consistent fences: of a thread that writes X, calls
//! [`Fences::light`] and reads Y, and a thread that writes Y, calls [`Fences::heavy`] and reads X,
//! at least one sees what the other wrote.
//!
//! Linux gives this by membarrier(2). Where a sandbox refuses it, both sides are ordinary fences.

// UNSAFETY: calls membarrier(2), which has no wrapper.
#![expect(unsafe_code, reason = "membarrier has no safe wrapper")]

use std::sync::OnceLock;
use std::sync::atomic::{Ordering, compiler_fence, fence};

/// From linux/membarrier.h, 4.14.
const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

/// Both sides of the fence; all users of one variable need the same, or a copy of it.
#[derive(Clone, Copy, Debug)]
pub struct Fences {
    by_kernel: bool,
}

impl Fences {
    /// The cheapest fences to be had. Quick after the first time, and always while the process has
    /// one thread.
    pub fn new() -> Fences {
        static REGISTERED: OnceLock<bool> = OnceLock::new();
        Fences {
            by_kernel: *REGISTERED.get_or_init(|| membarrier(REGISTER_PRIVATE_EXPEDITED)),
        }
    }

    /// The fence of the frequent side.
    #[inline]
    pub fn light(self) {
        if self.by_kernel {
            compiler_fence(Ordering::SeqCst);
        } else {
            fence(Ordering::SeqCst);
        }
    }

    /// The fence of the seldom side; some microseconds. False if there was none: then nothing may
    /// be concluded from what is read.
    #[must_use]
    pub fn heavy(self) -> bool {
        fence(Ordering::SeqCst);
        !self.by_kernel || membarrier(PRIVATE_EXPEDITED)
    }
}

impl Default for Fences {
    fn default() -> Self {
        Self::new()
    }
}

fn membarrier(command: libc::c_int) -> bool {
    const FLAGS: libc::c_uint = 0;
    const CPU: libc::c_int = 0;
    // SAFETY: takes no memory.
    unsafe { libc::syscall(libc::SYS_membarrier, command, FLAGS, CPU) == 0 }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::Barrier;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;

    /// Two threads announce themselves and look for the other; never may both miss it.
    fn never_both_miss(fences: Fences) {
        const ROUNDS: usize = 2000;
        let shared = Arc::new([const { AtomicUsize::new(0) }; 2]);
        let rounds = Arc::new(Barrier::new(2));
        let (other, their_rounds) = (Arc::clone(&shared), Arc::clone(&rounds));
        let light = thread::spawn(move || {
            let look = |round| {
                their_rounds.wait();
                other[0].store(round, Ordering::Relaxed);
                fences.light();
                other[1].load(Ordering::Relaxed) == round
            };
            (1..=ROUNDS).map(look).collect::<Vec<_>>()
        });
        let look = |round| {
            rounds.wait();
            shared[1].store(round, Ordering::Relaxed);
            assert!(fences.heavy());
            shared[0].load(Ordering::Relaxed) == round
        };
        let heavy: Vec<bool> = (1..=ROUNDS).map(look).collect();
        let light = light.join().expect("it does not panic");
        assert!(
            heavy
                .iter()
                .zip(light)
                .all(|(heavy, light)| *heavy || light)
        );
    }

    #[test]
    fn one_of_two_always_sees_the_other() {
        never_both_miss(Fences::new());
        never_both_miss(Fences { by_kernel: false });
    }
}
