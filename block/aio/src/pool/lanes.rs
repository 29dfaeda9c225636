//! Who may run how many jobs at a time, and whose turn it is.

use std::collections::VecDeque;

use super::{Job, PoolLimits};
use crate::context::MAX_CONTEXTS;

/// The lane of jobs that no context asked for.
pub(super) const NO_CONTEXT: usize = MAX_CONTEXTS;
/// The lane of computations.
pub(super) const COMPUTING: usize = MAX_CONTEXTS + 1;
/// The number of lanes.
pub(super) const LANES: usize = MAX_CONTEXTS + 2;

struct Lane {
    limits: Option<PoolLimits>,
    /// Jobs that are ready or running.
    admitted: usize,
    waiting: VecDeque<Box<dyn Job>>,
}

impl Lane {
    const EMPTY: Lane = Lane {
        limits: None,
        admitted: 0,
        waiting: VecDeque::new(),
    };
}

/// All lanes, and the jobs that have a place in theirs.
pub(super) struct Lanes {
    lanes: [Lane; LANES],
    ready: VecDeque<(usize, Box<dyn Job>)>,
    most_threads: usize,
    fewest_threads: usize,
}

impl Lanes {
    pub(super) const fn new() -> Self {
        Self {
            lanes: [Lane::EMPTY; LANES],
            ready: VecDeque::new(),
            most_threads: 1,
            fewest_threads: 0,
        }
    }

    /// Takes a job.
    pub(super) fn push(&mut self, number: usize, job: Box<dyn Job>) {
        self.lanes[number].waiting.push_back(job);
        self.admit(number);
    }

    /// Gives jobs of a lane their place, as long as there is one.
    fn admit(&mut self, number: usize) {
        let lane = &mut self.lanes[number];
        let limits = match lane.limits {
            Some(limits) => limits,
            None => {
                let limits = default_limits(number);
                self.change_limits(number, Some(limits));
                limits
            }
        };
        let lane = &mut self.lanes[number];
        while lane.admitted < limits.max
            && let Some(job) = lane.waiting.pop_front()
        {
            lane.admitted += 1;
            self.ready.push_back((number, job));
        }
    }

    /// The number of jobs that could run now.
    pub(super) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// The next job, and its lane.
    pub(super) fn pop(&mut self) -> Option<(usize, Box<dyn Job>)> {
        self.ready.pop_front()
    }

    /// Notes that a job of a lane has run.
    pub(super) fn end(&mut self, number: usize) {
        self.lanes[number].admitted -= 1;
        self.admit(number);
    }

    pub(super) fn set_limits(&mut self, number: usize, limits: PoolLimits) {
        self.change_limits(number, Some(limits));
        self.admit(number);
    }

    /// Forgets that somebody set limits.
    pub(super) fn reset_limits(&mut self, number: usize) {
        self.change_limits(number, None);
    }

    fn change_limits(&mut self, number: usize, limits: Option<PoolLimits>) {
        self.lanes[number].limits = limits;
        let used = || self.lanes.iter().filter_map(|lane| lane.limits);
        let most = used().map(|limits| limits.max).max().unwrap_or(1).max(1);
        self.fewest_threads = used()
            .fold(0, |sum, limits| limits.min.saturating_add(sum))
            .min(most);
        self.most_threads = most;
    }

    /// There are never more threads than this.
    pub(super) fn most_threads(&self) -> usize {
        self.most_threads
    }

    /// So many threads are kept.
    pub(super) fn fewest_threads(&self) -> usize {
        self.fewest_threads
    }
}

fn default_limits(number: usize) -> PoolLimits {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    PoolLimits {
        min: PoolLimits::DEFAULT.min,
        max: if number == COMPUTING {
            // A few more, so that a busy machine gives us our share.
            processors.max(4)
        } else {
            PoolLimits::DEFAULT.max
        },
    }
}
