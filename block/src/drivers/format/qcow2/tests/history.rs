//! What a disk may hold after everything that was done to it, some of which failed and some of which a power cut undid.
//!
//! Every sector, and the length, is a register that remembers its versions in the order in which they were issued. A version that has
//! been completed supersedes those before it; after a power cut only one that was durable by then does. What failed may have
//! happened, until something later is completed.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::testing::Journal;

pub(super) const SECTOR: usize = 512;

/// Not yet, and never for what failed.
const NEVER: usize = usize::MAX;

/// Stands for the content of a sector.
pub(super) fn hash(sector: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    sector.hash(&mut hasher);
    hasher.finish()
}

/// Stands for the content of every sector.
pub(super) fn hashes(content: &[u8]) -> Vec<u64> {
    content.chunks(SECTOR).map(hash).collect()
}

pub(super) fn zero_hash() -> u64 {
    hash(&[0; SECTOR])
}

/// A value, and when it came to be; times count events.
#[derive(Clone, Copy, Debug)]
struct Version {
    value: u64,
    issued: usize,
    completed: usize,
    /// It was durable on its own when so much had arrived at the disks.
    durable_at: usize,
    /// Who sees the length that was issued then sees this, too.
    shown_by: usize,
}

#[derive(Clone, Debug)]
struct Register(Vec<Version>);

impl Register {
    fn new(value: u64) -> Self {
        Self(vec![Version {
            value,
            issued: 0,
            completed: 0,
            durable_at: 0,
            shown_by: 0,
        }])
    }

    fn begin(&mut self, value: u64, issued: usize, shown_by: usize) {
        self.0.push(Version {
            value,
            issued,
            completed: NEVER,
            durable_at: NEVER,
            shown_by,
        });
    }

    fn end(&mut self, issued: usize, completed: usize, durable_at: usize) {
        for version in self.0.iter_mut().rev() {
            if version.issued < issued {
                break;
            }
            (version.completed, version.durable_at) = (completed, durable_at);
        }
    }

    /// The versions from the last on for which `counts` says so.
    fn since_last(&self, counts: impl Fn(&Version) -> bool) -> &[Version] {
        let last = self.0.iter().rfind(|version| counts(version));
        let completed = last.map_or(0, |version| version.completed);
        let first = self
            .0
            .iter()
            .position(|version| version.completed == completed);
        &self.0[first.unwrap_or(0)..]
    }

    fn may_be_now(&self, value: u64) -> bool {
        self.since_last(|version| version.completed != NEVER)
            .iter()
            .any(|version| version.value == value)
    }

    fn may_be_left(&self, value: u64, cut: &Cut) -> bool {
        self.since_last(|version| {
            version.completed <= cut.flushed
                || version.durable_at <= cut.arrived
                || version.shown_by <= cut.resized
        })
        .iter()
        .any(|version| version.issued <= cut.now && version.value == value)
    }
}

/// A moment at which the power goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    arrived: usize,
    /// The event up to which things were issued.
    now: usize,
    /// The event up to which things were completed that a flush covers.
    flushed: usize,
    /// The event at which the length that is found was issued.
    resized: usize,
}

/// A change under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    issued: usize,
    first: usize,
    count: usize,
}

#[derive(Debug)]
struct Flush {
    started: usize,
    /// How much had arrived at the disks when it was done.
    arrived: usize,
}

/// Everything that was done.
#[derive(Debug)]
pub(super) struct History {
    journal: Journal,
    now: usize,
    sectors: Vec<Register>,
    size: Register,
    flushes: Vec<Flush>,
    /// How much had arrived at the disks at each event.
    arrivals: Vec<usize>,
}

impl History {
    /// Begins with what is there; `journal` is that of the disks below.
    pub(super) fn new(content: &[u8], journal: &Journal) -> Self {
        Self {
            journal: journal.clone(),
            now: 0,
            sectors: hashes(content).into_iter().map(Register::new).collect(),
            size: Register::new(content.len() as u64),
            flushes: Vec::new(),
            arrivals: vec![journal.len()],
        }
    }

    fn tick(&mut self) -> usize {
        self.now += 1;
        self.arrivals.push(self.journal.len());
        self.now
    }

    fn reach(&mut self, end: usize) {
        if self.sectors.len() < end {
            self.sectors.resize(end, Register::new(zero_hash()));
        }
    }

    /// Sectors from `first` on are going to be these.
    pub(super) fn begin(&mut self, first: usize, hashes: &[u64]) -> Change {
        let issued = self.tick();
        self.reach(first + hashes.len());
        for (sector, &hash) in self.sectors[first..].iter_mut().zip(hashes) {
            sector.begin(hash, issued, NEVER);
        }
        Change {
            issued,
            first,
            count: hashes.len(),
        }
    }

    /// The same sectors may as well become these.
    pub(super) fn or(&mut self, change: Change, hashes: &[u64]) {
        let sectors = &mut self.sectors[change.first..change.first + change.count];
        for (sector, &hash) in sectors.iter_mut().zip(hashes) {
            sector.begin(hash, change.issued, NEVER);
        }
    }

    /// The length is going to be this, in bytes; what comes or goes reads as zeroes from then on.
    pub(super) fn begin_resize(&mut self, old: u64, new: u64) -> Change {
        let issued = self.tick();
        self.size.begin(new, issued, NEVER);
        let sector = |at: u64| usize::try_from(at / SECTOR as u64).expect("small");
        let (first, end) = (sector(old.min(new)), sector(old.max(new)));
        self.reach(end);
        // Once the new length shows, what was there before must not.
        let shown_by = if new > old { issued } else { NEVER };
        for sector in &mut self.sectors[first..end] {
            sector.begin(zero_hash(), issued, shown_by);
        }
        Change {
            issued,
            first,
            count: end - first,
        }
    }

    /// The change has been carried out; `durable` says that it is on disk, too.
    pub(super) fn end(&mut self, change: Change, durable: bool) {
        let completed = self.tick();
        let durable_at = if durable { self.journal.len() } else { NEVER };
        for sector in &mut self.sectors[change.first..change.first + change.count] {
            sector.end(change.issued, completed, durable_at);
        }
    }

    /// The length has changed.
    pub(super) fn end_resize(&mut self, change: Change) {
        self.end(change, false);
        self.size.end(change.issued, self.now, self.journal.len());
    }

    /// A flush begins; what it gives goes to `end_flush`.
    pub(super) fn begin_flush(&mut self) -> usize {
        self.tick()
    }

    pub(super) fn end_flush(&mut self, started: usize) {
        let arrived = self.journal.len();
        self.tick();
        self.flushes.push(Flush { started, arrived });
    }

    /// The moment when so much had arrived at the disks.
    pub(super) fn cut(&self, arrived: usize) -> Cut {
        let flushed = self
            .flushes
            .iter()
            .filter(|flush| flush.arrived <= arrived)
            .map(|flush| flush.started)
            .max()
            .unwrap_or(0);
        let now = self.arrivals.partition_point(|&at| at <= arrived);
        Cut {
            arrived,
            now: now.saturating_sub(1),
            flushed,
            resized: 0,
        }
    }

    /// Fails unless the content, from sector `first` on, is what may be read now.
    pub(super) fn assert_may_be_now(&self, first: usize, content: &[u8], what: &str) {
        self.assert_each(first, content, what, Register::may_be_now);
    }

    /// Fails unless content and length may be what a power cut left.
    pub(super) fn assert_may_be_left(&self, content: &[u8], cut: &Cut, what: &str) {
        let size = content.len() as u64;
        assert!(
            self.size.may_be_left(size, cut),
            "{what}: the length is {size}, which is neither what it was nor what it was to be: {:?}",
            self.size
        );
        let has_size = self.size.0.iter().find(|version| version.value == size);
        let cut = Cut {
            resized: has_size.map_or(0, |version| version.issued),
            ..*cut
        };
        self.assert_each(0, content, what, |sector, value| {
            sector.may_be_left(value, &cut)
        });
    }

    #[track_caller]
    fn assert_each(
        &self,
        first: usize,
        content: &[u8],
        what: &str,
        may_be: impl Fn(&Register, u64) -> bool,
    ) {
        let never_touched = Register::new(zero_hash());
        for (index, sector) in content.chunks(SECTOR).enumerate() {
            let register = self.sectors.get(first + index).unwrap_or(&never_touched);
            let value = hash(sector);
            if !may_be(register, value) {
                let kind = match register
                    .0
                    .iter()
                    .rposition(|version| version.value == value)
                {
                    Some(age) => format!("version {age} of {}", register.0.len()),
                    None => "never written there".to_owned(),
                };
                panic!(
                    "{what}: sector {:#x} holds {:x?}.. ({kind}), neither what is durable nor newer: {register:x?}",
                    first + index,
                    &sector[..8.min(sector.len())]
                );
            }
        }
    }
}
