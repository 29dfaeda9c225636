//! Power cuts: a workload runs over a disk that records what reaches it; the power is cut at random moments; what was not flushed
//! survives in random parts. QEMU must find no corruption then, and every sector must hold what was flushed last, or something newer.
//!
//! `STORD_CRASH_CUTS` sets how many cuts are made (500 by default).

use std::cell::RefCell;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use stord_aio::sync::RangeLock;
use stord_aio::{join_all, sim};

use super::harness::{Image, Setup};
use super::made::{Kind, Made, assert_consistent};
use crate::driver::ZeroFlags;
use crate::io;
use crate::testing::{MemoryDisk, Operation, Random};

const SECTOR: usize = 512;

fn hash(sector: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    sector.hash(&mut hasher);
    hasher.finish()
}

fn zero_hash() -> u64 {
    hash(&[0; SECTOR])
}

/// What a sector was made to hold, and when; times count events.
#[derive(Clone, Copy)]
struct Version {
    hash: u64,
    issued: usize,
    /// `usize::MAX` while it is under way.
    completed: usize,
}

struct Flush {
    started: usize,
    /// Operations that had arrived at the disk when it was done.
    arrived: usize,
}

#[derive(Default)]
struct History {
    now: usize,
    sectors: Vec<Vec<Version>>,
    flushes: Vec<Flush>,
    /// Event times by how much had arrived at the disk: what was issued by then.
    arrivals: Vec<(usize, usize)>,
}

impl History {
    fn tick(&mut self, arrived: usize) -> usize {
        self.now += 1;
        self.arrivals.push((arrived, self.now));
        self.now
    }

    fn begin(&mut self, first: usize, hashes: &[u64], arrived: usize) {
        let issued = self.tick(arrived);
        if self.sectors.len() < first + hashes.len() {
            let zero = Version {
                hash: zero_hash(),
                issued: 0,
                completed: 0,
            };
            self.sectors.resize(first + hashes.len(), vec![zero]);
        }
        for (sector, &hash) in self.sectors[first..].iter_mut().zip(hashes) {
            sector.push(Version {
                hash,
                issued,
                completed: usize::MAX,
            });
        }
    }

    fn end(&mut self, first: usize, count: usize, arrived: usize) {
        let completed = self.tick(arrived);
        for sector in &mut self.sectors[first..first + count] {
            for version in sector
                .iter_mut()
                .filter(|version| version.completed == usize::MAX)
            {
                version.completed = completed;
            }
        }
    }

    /// What a sector may hold after a cut when so much had arrived.
    fn allowed(&self, sector: usize, arrived: usize) -> HashSet<u64> {
        let flushed = self
            .flushes
            .iter()
            .filter(|flush| flush.arrived <= arrived)
            .map(|flush| flush.started)
            .max()
            .unwrap_or(0);
        let cut = self
            .arrivals
            .iter()
            .filter(|(at, _)| *at <= arrived)
            .map(|(_, now)| *now)
            .max()
            .unwrap_or(0);
        let versions = &self.sectors[sector];
        let last_durable = versions
            .iter()
            .filter(|version| version.completed <= flushed)
            .map(|version| version.completed)
            .max();
        versions
            .iter()
            .filter(|version| version.issued <= cut)
            .filter(|version| {
                version.completed > flushed || Some(version.completed) == last_durable
            })
            .map(|version| version.hash)
            .collect()
    }
}

#[derive(Clone)]
struct Guest {
    image: Image,
    disk: MemoryDisk,
    history: Rc<RefCell<History>>,
    ranges: Rc<RangeLock>,
}

impl Guest {
    async fn step(&self, random: &mut Random) {
        let size = self.image.0.size();
        let sectors = size / SECTOR as u64;
        let unit = [1, 8, 32, 128][usize::try_from(random.below(4)).expect("small")];
        let start = random.below(sectors) / unit * unit;
        let len = match random.below(8) {
            0 => 1 + random.below(sectors - start),
            1..=4 => (1 + random.below(4)) * unit,
            _ => 1 + random.below(100),
        };
        let end = (start + len).min(sectors);
        let (first, count) = (
            usize::try_from(start).expect("small"),
            usize::try_from(end - start).expect("small"),
        );
        let (offset, bytes) = (start * SECTOR as u64, (end - start) * SECTOR as u64);
        let choice = random.below(24);
        if choice >= 22 {
            return self.resize(random).await;
        }
        if (18..22).contains(&choice) {
            return self.flush().await;
        }
        let _held = self.ranges.lock(offset..offset + bytes).await;
        if self.image.0.size() < offset + bytes {
            return;
        }
        match choice {
            0..=9 => {
                let mut data = vec![0; count * SECTOR];
                data.chunks_mut(8)
                    .for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
                let hashes: Vec<u64> = data.chunks(SECTOR).map(hash).collect();
                self.history
                    .borrow_mut()
                    .begin(first, &hashes, self.disk.journal_len());
                self.image
                    .write(offset, &data)
                    .await
                    .expect("the disk is healthy");
            }
            10..=13 => {
                let flags = if random.one_in(2) {
                    ZeroFlags::MAY_UNMAP
                } else {
                    ZeroFlags::empty()
                };
                self.history.borrow_mut().begin(
                    first,
                    &vec![zero_hash(); count],
                    self.disk.journal_len(),
                );
                io::write_zeroes(&self.image.0, offset, bytes, flags)
                    .await
                    .expect("the disk is healthy");
            }
            _ => {
                self.history.borrow_mut().begin(
                    first,
                    &vec![zero_hash(); count],
                    self.disk.journal_len(),
                );
                io::discard(&self.image.0, offset, bytes)
                    .await
                    .expect("the disk is healthy");
                // Sectors that it left as they were.
                let read = self
                    .image
                    .read(offset, count * SECTOR)
                    .await
                    .expect("the disk is healthy");
                let hashes: Vec<u64> = read.chunks(SECTOR).map(hash).collect();
                self.history
                    .borrow_mut()
                    .begin(first, &hashes, self.disk.journal_len());
            }
        }
        self.history
            .borrow_mut()
            .end(first, count, self.disk.journal_len());
    }

    async fn flush(&self) {
        let started = self.history.borrow_mut().tick(self.disk.journal_len());
        self.image.flush().await.expect("the disk is healthy");
        let arrived = self.disk.journal_len();
        self.history
            .borrow_mut()
            .flushes
            .push(Flush { started, arrived });
    }

    async fn resize(&self, random: &mut Random) {
        let _held = self.ranges.lock(0..u64::MAX).await;
        let old = self.image.0.size();
        let size = (old / 2 + random.below(old)).max(64 * 1024) & !511;
        let (from, to) = (old.min(size), old.max(size));
        let first = usize::try_from(from / 512).expect("small");
        let count = usize::try_from((to - from) / 512).expect("small");
        self.history
            .borrow_mut()
            .begin(first, &vec![zero_hash(); count], self.disk.journal_len());
        io::truncate(&self.image.0, size, true)
            .await
            .expect("the disk is healthy");
        self.history
            .borrow_mut()
            .end(first, count, self.disk.journal_len());
    }
}

struct Run {
    start: Vec<u8>,
    journal: Vec<Operation>,
    history: History,
    backing: Option<Vec<u8>>,
}

fn run(kind: &Kind, seed: u64) -> Run {
    let made = Made::new(kind);
    let start = made.file.bytes();
    let setup = made.setup();
    let content = made.content.clone();
    let disk = made.file.clone();
    disk.record();
    let history = sim::run(seed, || async move {
        let first = content.chunks(SECTOR).map(|sector| {
            vec![Version {
                hash: hash(sector),
                issued: 0,
                completed: 0,
            }]
        });
        let guest = Guest {
            history: Rc::new(RefCell::new(History {
                sectors: first.collect(),
                ..History::default()
            })),
            image: setup.open().await.expect("opens"),
            disk,
            ranges: Rc::default(),
        };
        let workers = (0..5).map(|worker| {
            let guest = guest.clone();
            async move {
                let mut random = Random::new(seed * 100 + worker);
                for _ in 0..30 {
                    guest.step(&mut random).await;
                }
            }
        });
        join_all(workers.collect()).await;
        guest.image.clone().close().await.expect("closes");
        guest.history.take()
    });
    Run {
        journal: made.file.journal(),
        start,
        history,
        backing: made.backing,
    }
}

fn cut(run: &Run, seed: u64, random: &mut Random) {
    let at = usize::try_from(random.below(run.journal.len() as u64 + 1)).expect("an index");
    let what = format!("seed {seed}, cut at {at} of {}", run.journal.len());
    let left = MemoryDisk::after_power_cut(&run.start, &run.journal, at, random);
    // The dirty bit announces that refcounts are wrong; they are put right when the image is opened.
    if left[79] & 1 == 0 {
        assert_consistent(&left, &what, true);
    }
    let disk = MemoryDisk::new(left);
    let setup = Setup {
        backing: run
            .backing
            .as_ref()
            .map(|bytes| crate::testing::leaf(&MemoryDisk::new(bytes.clone()))),
        ..Setup::new(&disk)
    };
    let content = sim::run(seed, || async move {
        let image = setup.open().await.expect("opens");
        let content = image.read_all().await.expect("reads");
        // The image must be fit for use.
        for at in [0, content.len() / 2] {
            image
                .write((at & !511) as u64, &[0x5a; 512])
                .await
                .expect("writes");
        }
        image.close().await.expect("closes");
        content
    });
    for (index, sector) in content
        .chunks_exact(SECTOR)
        .enumerate()
        .take(run.history.sectors.len())
    {
        let found = hash(sector);
        assert!(
            run.history.allowed(index, at).contains(&found),
            "{what}: sector {index:#x} holds {:x?}.., which is neither what was flushed nor newer",
            &sector[..8]
        );
    }
    assert_consistent(&disk.bytes(), &format!("{what}, used afterwards"), true);
}

fn kinds() -> Vec<Kind> {
    const MIB: u64 = 1 << 20;
    let kind = |options, size, backing| Kind {
        options,
        size,
        backing,
        ..Kind::default()
    };
    vec![
        kind("cluster_size=4k", 2 * MIB, false),
        kind("cluster_size=512", MIB, false),
        kind("cluster_size=512,refcount_bits=64", MIB / 2, true),
        kind("cluster_size=4k,compat=0.10", 2 * MIB, false),
        kind("cluster_size=16k,extended_l2=on", 2 * MIB, true),
        kind("cluster_size=64k", 4 * MIB, true),
        kind("cluster_size=4k,lazy_refcounts=on", 2 * MIB, false),
        kind("cluster_size=512,lazy_refcounts=on", MIB, true),
        Kind {
            small_cache: true,
            ..kind("cluster_size=512,refcount_bits=1", MIB, false)
        },
    ]
}

#[test]
fn survives_power_cuts() {
    let cuts: u64 = std::env::var("STORD_CRASH_CUTS")
        .ok()
        .and_then(|cuts| cuts.parse().ok())
        .unwrap_or(500);
    const PER_RUN: u64 = 12;
    let first: u64 = std::env::var("STORD_FIRST_SEED")
        .ok()
        .and_then(|first| first.parse().ok())
        .unwrap_or(0);
    let kinds = kinds();
    for number in 0..cuts.div_ceil(PER_RUN) {
        let seed = first + number;
        let kind = &kinds[usize::try_from(seed).expect("small") % kinds.len()];
        let run = run(kind, seed);
        let mut random = Random::new(seed);
        for _ in 0..PER_RUN {
            cut(&run, seed, &mut random);
        }
    }
}
