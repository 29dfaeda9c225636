//! Adaptive polling: how long a loop spins for new work before it sleeps.
//!
//! Follows the `poll-max-ns`, `poll-grow` and `poll-shrink` properties of an iothread: the time is
//! zero at first, grows while events arrive shortly after the loop went to sleep, and shrinks when
//! they take longer than the maximum.

use std::time::Duration;

/// The first polling time, in ns, when it grows from zero.
const FIRST_NS: u64 = 4000;

/// The iothread's polling properties.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PollParams {
    /// The longest polling time in ns; 0 turns polling off.
    pub max_ns: u64,
    /// The factor by which the time grows; 0 stands for 2.
    pub grow: u64,
    /// The divisor by which the time shrinks; 0 resets it to zero.
    pub shrink: u64,
}

/// The polling time of one loop.
#[derive(Debug, Default)]
pub(crate) struct Polling {
    params: PollParams,
    ns: u64,
}

impl Polling {
    /// Takes over new parameters.
    pub(crate) fn set_params(&mut self, params: PollParams) {
        self.params = params;
        self.ns = self.ns.min(params.max_ns);
    }

    /// Whether polling is turned on at all.
    pub(crate) fn is_on(&self) -> bool {
        self.params.max_ns > 0
    }

    /// How long to spin now.
    pub(crate) fn time(&self) -> Duration {
        Duration::from_nanos(self.ns)
    }

    /// Learns how long it took, from the start of spinning, until there was work.
    pub(crate) fn waited(&mut self, waited: Duration) {
        let waited = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        let PollParams {
            max_ns,
            grow,
            shrink,
        } = self.params;
        if waited <= self.ns {
            return;
        }
        if waited > max_ns {
            self.ns = self.ns.checked_div(shrink).unwrap_or(0);
        } else if self.ns < max_ns {
            let grown = match self.ns {
                0 => FIRST_NS,
                ns => ns.saturating_mul(if grow == 0 { 2 } else { grow }),
            };
            self.ns = grown.min(max_ns);
        }
    }
}
