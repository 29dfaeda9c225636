//! How a queue waits for the next request of a client that sends one at a time: asleep, or looking for it again and again for a moment.
//!
//! Which is better depends on what nobody tells: whether the client runs on another processor, what it costs to wake one up (in a
//! virtual machine tens of microseconds on either side), and what else wants to run here. So both are tried in turn, a few windows of
//! requests each, and looking stays only while it makes requests clearly faster and costs hardly more processor time. A client that
//! pauses between its requests ends it at once.

use std::time::Duration;

/// Requests in one window of a trial.
const WINDOW: u32 = 32;
/// Windows in a trial: asleep, looking, asleep, ...
const WINDOWS: u32 = 6;
/// How long to look for the next request before going to sleep.
const LOOK: Duration = Duration::from_micros(40);
/// So many requests until the first trial, and then between trials while looking pays.
const FIRST_TRIAL: u32 = 256;
const LOOKING: u32 = 1 << 13;
/// After a lost trial the next one is so many requests off, twice as many after each, up to a limit.
const AFTER_LOSS: u32 = 1 << 11;
const AFTER_LOSS_MOST: u32 = 1 << 17;
/// So many vain looks within so many requests are too many.
const VAIN: u32 = 8;
const VAIN_WITHIN: u32 = 64;

/// Time of day and processor time of the thread.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Clocks {
    pub(super) wall: Duration,
    pub(super) cpu: Duration,
}

/// How one queue waits.
#[derive(Debug)]
pub(super) struct Waiting {
    phase: Phase,
    /// The next loss puts the next trial so many requests off.
    after_loss: u32,
    /// Vain looks, and the requests since they were last counted.
    vain: u32,
    since_vain: u32,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// No trial for so many requests.
    Settled {
        looks: bool,
        left: u32,
    },
    Trial(Trial),
}

#[derive(Clone, Copy, Debug, Default)]
struct Trial {
    /// Windows that are over.
    done: u32,
    /// Requests in the present one, and the clocks when it began.
    requests: u32,
    began: Option<Clocks>,
    /// The best window of each kind: what disturbs a window only makes it worse.
    asleep: Option<Clocks>,
    looking: Option<Clocks>,
}

impl Default for Waiting {
    fn default() -> Self {
        Self {
            phase: Phase::Settled {
                looks: false,
                left: FIRST_TRIAL,
            },
            after_loss: AFTER_LOSS,
            vain: 0,
            since_vain: 0,
        }
    }
}

impl Waiting {
    /// How long to look for the next request before going to sleep; `None` to sleep at once.
    pub(super) fn look(&self) -> Option<Duration> {
        let looks = match self.phase {
            Phase::Settled { looks, .. } => looks,
            Phase::Trial(trial) => trial.looks(),
        };
        looks.then_some(LOOK)
    }

    /// Notes that a look found nothing.
    pub(super) fn looked_in_vain(&mut self) {
        self.vain += 1;
        if self.vain >= VAIN {
            self.lose();
        }
    }

    /// Notes that a request was answered. `clocks` is asked at the borders of windows only.
    pub(super) fn answered(&mut self, clocks: impl FnOnce() -> Clocks) {
        self.since_vain += 1;
        if self.since_vain >= VAIN_WITHIN {
            self.since_vain = 0;
            self.vain = 0;
        }
        match &mut self.phase {
            Phase::Settled { left, .. } => {
                *left -= 1;
                if *left == 0 {
                    self.phase = Phase::Trial(Trial::default());
                }
            }
            Phase::Trial(trial) => {
                if trial.answered(clocks) {
                    self.judge();
                }
            }
        }
    }

    /// Notes a pause, or requests that came several at a time: the present window says nothing.
    pub(super) fn disturbed(&mut self) {
        if let Phase::Trial(trial) = &mut self.phase {
            trial.requests = 0;
            trial.began = None;
        }
    }

    fn judge(&mut self) {
        let Phase::Trial(Trial {
            asleep: Some(asleep),
            looking: Some(looking),
            ..
        }) = self.phase
        else {
            return self.lose();
        };
        // A quarter faster, for a quarter more processor time at most.
        let is_faster = looking.wall * 5 <= asleep.wall * 4;
        let is_cheap = looking.cpu * 4 <= asleep.cpu * 5;
        if is_faster && is_cheap {
            self.after_loss = AFTER_LOSS;
            self.phase = Phase::Settled {
                looks: true,
                left: LOOKING,
            };
        } else {
            self.lose();
        }
    }

    fn lose(&mut self) {
        self.vain = 0;
        self.phase = Phase::Settled {
            looks: false,
            left: self.after_loss,
        };
        self.after_loss = (self.after_loss * 2).min(AFTER_LOSS_MOST);
    }
}

impl Trial {
    /// Whether the present window is one of looking.
    fn looks(&self) -> bool {
        self.done % 2 == 1
    }

    /// Counts a request; true when the trial is over.
    fn answered(&mut self, clocks: impl FnOnce() -> Clocks) -> bool {
        let Some(began) = self.began else {
            // The first request's waiting belongs to what was before.
            self.began = Some(clocks());
            return false;
        };
        self.requests += 1;
        if self.requests < WINDOW {
            return false;
        }
        let now = clocks();
        let cost = Clocks {
            wall: now.wall.saturating_sub(began.wall),
            cpu: now.cpu.saturating_sub(began.cpu),
        };
        let best = if self.looks() {
            &mut self.looking
        } else {
            &mut self.asleep
        };
        *best = Some(best.map_or(cost, |best| Clocks {
            wall: best.wall.min(cost.wall),
            cpu: best.cpu.min(cost.cpu),
        }));
        self.done += 1;
        self.requests = 0;
        self.began = None;
        self.done == WINDOWS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client, and what a request costs with each way of waiting: wall and processor time in microseconds.
    struct Client {
        asleep: (u64, u64),
        looking: (u64, u64),
        now: Clocks,
    }

    impl Client {
        fn new(asleep: (u64, u64), looking: (u64, u64)) -> Self {
            Self {
                asleep,
                looking,
                now: Clocks::default(),
            }
        }

        fn send(&mut self, waiting: &mut Waiting, requests: u32) {
            for _ in 0..requests {
                let (wall, cpu) = if waiting.look().is_some() {
                    self.looking
                } else {
                    self.asleep
                };
                self.now.wall += Duration::from_micros(wall);
                self.now.cpu += Duration::from_micros(cpu);
                waiting.answered(|| self.now);
            }
        }
    }

    const TRIAL: u32 = (WINDOW + 1) * WINDOWS;

    #[test]
    fn looking_stays_where_waking_up_is_slow() {
        let mut waiting = Waiting::default();
        let mut client = Client::new((45, 18), (18, 17));
        client.send(&mut waiting, FIRST_TRIAL + TRIAL);
        assert_eq!(waiting.look(), Some(LOOK));
        client.send(&mut waiting, LOOKING - 1);
        assert_eq!(waiting.look(), Some(LOOK));
    }

    #[test]
    fn sleeping_stays_where_the_client_shares_the_processor() {
        let mut waiting = Waiting::default();
        let mut client = Client::new((10, 5), (11, 6));
        client.send(&mut waiting, FIRST_TRIAL + TRIAL);
        assert_eq!(waiting.look(), None);
        client.send(&mut waiting, AFTER_LOSS - 1);
        assert_eq!(waiting.look(), None);
    }

    #[test]
    fn speed_is_not_bought_with_much_processor_time() {
        let mut waiting = Waiting::default();
        Client::new((45, 10), (18, 17)).send(&mut waiting, FIRST_TRIAL + TRIAL);
        assert_eq!(waiting.look(), None);
    }

    #[test]
    fn a_client_that_begins_to_pause_ends_the_looking() {
        let mut waiting = Waiting::default();
        let mut client = Client::new((45, 18), (18, 17));
        client.send(&mut waiting, FIRST_TRIAL + TRIAL);
        for _ in 0..VAIN {
            assert_eq!(waiting.look(), Some(LOOK));
            waiting.looked_in_vain();
        }
        assert_eq!(waiting.look(), None);
    }

    #[test]
    fn a_vain_look_now_and_then_does_no_harm() {
        let mut waiting = Waiting::default();
        let mut client = Client::new((45, 18), (18, 17));
        client.send(&mut waiting, FIRST_TRIAL + TRIAL);
        for _ in 0..50 {
            waiting.looked_in_vain();
            client.send(&mut waiting, VAIN_WITHIN);
            assert_eq!(waiting.look(), Some(LOOK));
        }
    }

    #[test]
    fn a_disturbed_window_is_begun_again() {
        let mut waiting = Waiting::default();
        let mut client = Client::new((45, 18), (18, 17));
        client.send(&mut waiting, FIRST_TRIAL + 10);
        // Long enough to spoil every window, were it counted.
        client.now.wall += Duration::from_secs(1);
        waiting.disturbed();
        client.send(&mut waiting, TRIAL);
        assert_eq!(waiting.look(), Some(LOOK));
    }

    #[test]
    fn lost_trials_become_rare() {
        let mut waiting = Waiting::default();
        let mut client = Client::new((10, 5), (11, 6));
        client.send(&mut waiting, 1 << 20);
        let mut looked = 0;
        for _ in 0..1 << 16 {
            looked += u32::from(waiting.look().is_some());
            client.send(&mut waiting, 1);
        }
        assert!(looked <= TRIAL, "{looked}");
    }
}
