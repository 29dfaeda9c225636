//! Random requests against a model that is a vector of bytes, over every kind of image, in many interleavings; afterwards QEMU checks
//! the image and reads it.

use std::cell::RefCell;
use std::rc::Rc;

use stord_aio::sync::RangeLock;
use stord_aio::{Errno, join_all, sim, yield_now};

use super::harness::Image;
use super::made::{Kind, Made, kinds};
use crate::driver::ZeroFlags;
use crate::io;
use crate::testing::{MemoryDisk, Random};

/// A range of bytes of the model.
type Span = std::ops::Range<usize>;

/// The guest's view of an image in a test.
#[derive(Clone)]
pub(super) struct Guest {
    pub(super) image: Image,
    pub(super) content: Rc<RefCell<Vec<u8>>>,
    pub(super) ranges: Rc<RangeLock>,
    /// Requests may fail; what they were to change is then unknown.
    pub(super) unsure: Rc<RefCell<Vec<Span>>>,
}

impl Guest {
    pub(super) fn new(image: Image, content: Vec<u8>) -> Self {
        Self {
            image,
            content: Rc::new(RefCell::new(content)),
            ranges: Rc::default(),
            unsure: Rc::default(),
        }
    }

    fn range(&self, random: &mut Random) -> Span {
        let size = self.content.borrow().len() as u64;
        let unit = [1, 512, 4096, 65536][usize::try_from(random.below(4)).expect("small")];
        let start = random.below(size) / unit * unit;
        let len = match random.below(8) {
            0 => 1 + random.below(size - start),
            1..=3 => (1 + random.below(8)) * unit,
            _ => 1 + random.below(70_000),
        };
        let end = (start + len).min(size);
        let index = |at: u64| usize::try_from(at).expect("fits into memory");
        index(start)..index(end)
    }

    /// One random request.
    pub(super) async fn step(&self, random: &mut Random) -> Result<(), Errno> {
        let range = self.range(random);
        let (start, end) = (range.start as u64, range.end as u64);
        let node = &self.image.0;
        match random.below(20) {
            0..=8 => {
                let _held = self.ranges.lock(start..end).await;
                let fill = random.next();
                let data: Vec<u8> = range
                    .clone()
                    .map(|at| (at as u64 ^ fill).wrapping_mul(0x9e37_79b9).to_le_bytes()[1])
                    .collect();
                let result = self.image.write(start, &data).await;
                self.done(range, result, |content| content.copy_from_slice(&data))?;
            }
            9..=11 => {
                let _held = self.ranges.lock(start..end).await;
                let flags = if random.one_in(2) {
                    ZeroFlags::MAY_UNMAP
                } else {
                    ZeroFlags::empty()
                };
                let result = io::write_zeroes(node, start, end - start, flags).await;
                self.done(range, result, |content| content.fill(0))?;
            }
            12..=13 => {
                let _held = self.ranges.lock(start..end).await;
                let result = io::discard(node, start, end - start).await;
                // Anything may have become of it: ask.
                let was_unsure = self.unsure.borrow().clone();
                self.unsure.borrow_mut().push(range.clone());
                self.learn(&range, result.is_ok().then_some(&was_unsure))
                    .await?;
                result?;
            }
            14..=17 => {
                let _held = self.ranges.lock_shared(start..end).await;
                let read = self.image.read(start, range.len()).await?;
                self.compare(&range, &read);
            }
            18 => self.image.flush().await?,
            _ => yield_now().await,
        }
        Ok(())
    }

    fn done(
        &self,
        range: Span,
        result: Result<(), Errno>,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<(), Errno> {
        if result.is_err() {
            self.unsure.borrow_mut().push(range);
            return result;
        }
        self.is_sure(&range);
        change(&mut self.content.borrow_mut()[range]);
        Ok(())
    }

    fn is_sure(&self, range: &Span) {
        let mut unsure = self.unsure.borrow_mut();
        let old = std::mem::take(&mut *unsure);
        for other in old {
            unsure.extend(
                [
                    other.start..other.end.min(range.start),
                    other.start.max(range.end)..other.end,
                ]
                .into_iter()
                .filter(|part| !part.is_empty()),
            );
        }
    }

    /// Takes over what is there in a range whose content is unknown.
    async fn learn(&self, range: &Span, was_unsure: Option<&Vec<Span>>) -> Result<(), Errno> {
        let read = self.image.read(range.start as u64, range.len()).await?;
        let was = self.content.borrow()[range.clone()].to_vec();
        let is_unsure = |at: usize| {
            was_unsure.is_none_or(|unsure| unsure.iter().any(|other| other.contains(&at)))
        };
        for ((at, now), was) in range.clone().zip(&read).zip(&was) {
            let fits = now == was || *now == 0;
            assert!(
                fits || is_unsure(at),
                "a discard left other content than zeroes"
            );
        }
        self.content.borrow_mut()[range.clone()].copy_from_slice(&read);
        self.is_sure(range);
        Ok(())
    }

    fn compare(&self, range: &Span, read: &[u8]) {
        let content = self.content.borrow();
        let unsure = self.unsure.borrow();
        for (at, (ours, theirs)) in range.clone().zip(read.iter().zip(&content[range.clone()])) {
            if ours != theirs && !unsure.iter().any(|range| range.contains(&at)) {
                panic!("byte {at:#x} reads as {ours:#x}, not {theirs:#x} (request {range:x?})");
            }
        }
    }
}

/// Several workers at once.
pub(super) async fn work(guest: &Guest, seed: u64, workers: u64, steps: u64) {
    let workers = (0..workers).map(|worker| {
        let guest = guest.clone();
        async move {
            let mut random = Random::new(seed * 1000 + worker);
            for _ in 0..steps {
                guest.step(&mut random).await.expect("the disk is healthy");
            }
        }
    });
    join_all(workers.collect()).await;
}

/// The kinds to run over; `STORD_KIND` picks those whose description contains it.
fn chosen_kinds() -> Vec<Kind> {
    let wanted = std::env::var("STORD_KIND").unwrap_or_default();
    kinds()
        .into_iter()
        .filter(|kind| kind.describe().contains(&wanted))
        .collect()
}

pub(super) fn seeds(default: u64) -> std::ops::Range<u64> {
    let count = std::env::var("STORD_SEEDS")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(default);
    let first = std::env::var("STORD_FIRST_SEED")
        .ok()
        .and_then(|first| first.parse().ok())
        .unwrap_or(0);
    first..first + count
}

/// Fails one in `n` requests, of all kinds.
fn fail_sometimes(disk: &MemoryDisk, seed: u64, n: u64) {
    let mut random = Random::new(seed);
    disk.fail(move |_, _, _| {
        let errno = if random.one_in(2) {
            Errno::EIO
        } else {
            Errno::ENOSPC
        };
        random.one_in(n).then_some(errno)
    });
}

#[test]
fn survives_a_failing_disk() {
    for kind in chosen_kinds() {
        for seed in seeds(1) {
            let made = Made::new(&kind);
            let setup = made.setup();
            let (content, disk) = (made.content.clone(), made.file.clone());
            let what = format!("{} seed {seed}, failing", kind.describe());
            let content = sim::run(seed, || async move {
                let guest = Guest::new(setup.open().await.expect("opens"), content);
                for round in 0..3 {
                    fail_sometimes(&disk, seed + round, 4 + 20 * round);
                    let workers = (0..4).map(|worker| {
                        let guest = guest.clone();
                        async move {
                            let mut random = Random::new(seed * 1000 + 10 * round + worker);
                            for _ in 0..20 {
                                // Requests fail; what is there afterwards is what counts.
                                let _ = guest.step(&mut random).await;
                            }
                        }
                    });
                    join_all(workers.collect()).await;
                    disk.heal();
                    let read = guest
                        .image
                        .read_all()
                        .await
                        .expect("the disk is healthy again");
                    guest.compare(&(0..read.len()), &read);
                }
                guest
                    .image
                    .flush()
                    .await
                    .expect("the disk is healthy again");
                let read = guest.image.read_all().await.expect("reads");
                guest.compare(&(0..read.len()), &read);
                guest.image.clone().close().await.expect("closes");
                read
            });
            made.check(&content, &what, true);
        }
    }
}

#[test]
fn agrees_with_a_vector_of_bytes() {
    for kind in chosen_kinds() {
        for seed in seeds(1) {
            let made = Made::new(&kind);
            let setup = made.setup();
            let content = made.content.clone();
            let what = format!("{} seed {seed}", kind.describe());
            eprintln!("{what}");
            let content = sim::run(seed, || async move {
                let guest = Guest::new(setup.open().await.expect("opens"), content);
                work(&guest, seed, 6, 40).await;
                let read = guest.image.read_all().await.expect("reads");
                guest.compare(&(0..read.len()), &read);
                guest.image.clone().close().await.expect("closes");
                guest.content.take()
            });
            made.check(&content, &what, false);
        }
    }
}
