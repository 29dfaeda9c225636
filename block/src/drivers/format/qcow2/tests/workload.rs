//! What guests do to an image, for crash and fault tests: several workers at once, each request at random from [`OPERATIONS`], with a
//! [`History`] of what may be read afterwards.
//!
//! A new operation is a line in [`OPERATIONS`] and a function: it tells the history what it is about to change, does it, and tells the
//! history that it is done; after a failure it just returns, since nobody knows then.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;

use stord_aio::sync::{RangeGuard, RangeLock};
use stord_aio::{Errno, IoBuffer, join_all};
use stord_qmp::schema::create::PreallocMode;

use super::harness::Image;
use super::history::{History, SECTOR, hashes, zero_hash};
use crate::driver::{Driver, ZeroFlags};
use crate::io;
use crate::testing::Random;

type Done<'a> = Pin<Box<dyn Future<Output = Result<(), Errno>> + 'a>>;

/// Something that a guest does.
pub(super) struct Operation {
    /// How often it is done, compared with the others.
    pub(super) weight: u64,
    pub(super) run: for<'a> fn(&'a Guest, &'a mut Random) -> Done<'a>,
}

/// What guests do.
pub(super) const OPERATIONS: &[Operation] = &[
    operation(9, |guest, random| Box::pin(guest.write(random, false))),
    operation(1, |guest, random| Box::pin(guest.write(random, true))),
    operation(3, |guest, random| Box::pin(guest.write_compressed(random))),
    operation(2, |guest, random| {
        Box::pin(guest.zero(random, ZeroFlags::empty()))
    }),
    operation(2, |guest, random| {
        Box::pin(guest.zero(random, ZeroFlags::MAY_UNMAP))
    }),
    operation(1, |guest, random| {
        Box::pin(guest.zero(random, ZeroFlags::DURABLE))
    }),
    operation(4, |guest, random| Box::pin(guest.discard(random))),
    operation(2, |guest, random| Box::pin(guest.read(random))),
    operation(4, |guest, _| Box::pin(guest.flush())),
    operation(2, |guest, random| Box::pin(guest.resize(random))),
];

const fn operation(
    weight: u64,
    run: for<'a> fn(&'a Guest, &'a mut Random) -> Done<'a>,
) -> Operation {
    Operation { weight, run }
}

/// The user of an image in a test; clones are the same user.
#[derive(Clone)]
pub(super) struct Guest {
    pub(super) image: Image,
    pub(super) history: Rc<RefCell<History>>,
    /// Keeps requests apart that touch the same bytes; operations on the whole image lock everything.
    pub(super) ranges: Rc<RangeLock>,
    /// The image is never made longer, in bytes.
    pub(super) largest: u64,
    /// Steps done, and to be done, so far.
    progress: Rc<Cell<(u64, u64)>>,
}

/// Sectors of a request.
struct Part {
    first: usize,
    count: usize,
}

impl Part {
    fn offset(&self) -> u64 {
        (self.first * SECTOR) as u64
    }

    fn bytes(&self) -> u64 {
        (self.count * SECTOR) as u64
    }
}

impl Guest {
    pub(super) fn new(image: Image, history: History, largest: u64) -> Self {
        Self {
            image,
            history: Rc::new(RefCell::new(history)),
            ranges: Rc::default(),
            largest,
            progress: Rc::default(),
        }
    }

    /// Something at random.
    pub(super) async fn step(&self, random: &mut Random) -> Result<(), Errno> {
        let all = OPERATIONS.iter().map(|operation| operation.weight).sum();
        let mut choice = random.below(all);
        for operation in OPERATIONS {
            match choice.checked_sub(operation.weight) {
                Some(rest) => choice = rest,
                None => return (operation.run)(self, random).await,
            }
        }
        Ok(())
    }

    /// Several workers at once, each with so many steps; `may_fail` where the disk is not healthy.
    ///
    /// They begin at the start of the disk and spread, so that tables are made when there is space that has been used before.
    pub(super) async fn work(&self, seed: u64, workers: u64, steps: u64, may_fail: bool) {
        let (done, planned) = self.progress.get();
        self.progress.set((done, planned + workers * steps));
        let workers = (0..workers).map(|worker| {
            let guest = self.clone();
            async move {
                let mut random = Random::new(seed.wrapping_mul(1000) + worker);
                for _ in 0..steps {
                    let (done, planned) = guest.progress.get();
                    guest.progress.set((done + 1, planned));
                    let result = guest.step(&mut random).await;
                    assert!(may_fail || result.is_ok(), "on a healthy disk: {result:?}");
                }
            }
        });
        join_all(workers.collect()).await;
    }

    /// Fails unless everything reads as it may.
    pub(super) async fn assert_content(&self, what: &str) {
        let _held = self.ranges.lock(0..u64::MAX).await;
        let content = self.image.read_all().await.expect("the disk is healthy");
        self.history.borrow().assert_may_be_now(0, &content, what);
    }

    fn part(&self, random: &mut Random) -> Part {
        let sectors = self.image.0.size() / SECTOR as u64;
        let unit = [1, 8, 32, 128][usize::try_from(random.below(4)).expect("small")];
        let (done, planned) = self.progress.get();
        let reach = match random.below(40) {
            0 => sectors,
            // Some places are busier than others.
            1..=15 => sectors.div_ceil(8),
            _ => (sectors * (done + 5) / (planned + 5)).clamp(1, sectors),
        };
        let start = random.below(reach) / unit * unit;
        let len = match random.below(12) {
            0 => 1 + random.below(reach.saturating_sub(start).max(1)),
            1..=6 => (1 + random.below(4)) * unit,
            _ => 1 + random.below(100),
        };
        let end = (start + len).min(sectors);
        Part {
            first: usize::try_from(start).expect("small"),
            count: usize::try_from(end - start).expect("small"),
        }
    }

    /// Takes the sectors for itself, unless the image has become shorter meanwhile.
    async fn take(&self, part: &Part) -> Option<RangeGuard<'_>> {
        let end = part.offset() + part.bytes();
        let held = self.ranges.lock(part.offset()..end).await;
        (end <= self.image.0.size()).then_some(held)
    }

    async fn write(&self, random: &mut Random, durable: bool) -> Result<(), Errno> {
        let part = self.part(random);
        let Some(_held) = self.take(&part).await else {
            return Ok(());
        };
        let mut data = vec![0; part.count * SECTOR];
        data.chunks_mut(8)
            .for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
        let change = self.history.borrow_mut().begin(part.first, &hashes(&data));
        let src = IoBuffer::copy_of(&data).into();
        io::write(&self.image.0, part.offset(), src, durable).await?;
        self.history.borrow_mut().end(change, durable);
        Ok(())
    }

    /// Whole clusters, the last as far as the disk has it; no image but one with a data file refuses them.
    async fn write_compressed(&self, random: &mut Random) -> Result<(), Errno> {
        let part = self.part(random);
        let Driver::Format(format) = self.image.0.driver() else {
            return Err(Errno::EINVAL);
        };
        let cluster = format.info().cluster_size.ok_or(Errno::EINVAL)?;
        let start = part.offset() / cluster * cluster;
        let end = (part.offset() + part.bytes()).next_multiple_of(cluster);
        let _held = self.ranges.lock(start..end).await;
        let end = end.min(self.image.0.size());
        if start >= end {
            return Ok(());
        }
        let mut data = vec![0; usize::try_from(end - start).expect("small")];
        // From what gets much smaller to what does not.
        let noise = 32 * usize::try_from(random.below(17)).expect("small");
        for sector in data.chunks_mut(SECTOR) {
            let word = random.next().to_le_bytes();
            for (at, place) in sector.chunks_mut(8).enumerate() {
                let is_noise = at * 8 < noise;
                let fresh = if is_noise {
                    random.next().to_le_bytes()
                } else {
                    word
                };
                place.copy_from_slice(&fresh);
            }
        }
        let first = usize::try_from(start).expect("small") / SECTOR;
        let change = self.history.borrow_mut().begin(first, &hashes(&data));
        let src = IoBuffer::copy_of(&data).into();
        match io::write_compressed(&self.image.0, start, src).await {
            // Nothing has been done.
            Err(Errno::ENOTSUP) => {
                let content = self.image.read(start, data.len()).await?;
                let mut history = self.history.borrow_mut();
                history.or(change, &hashes(&content));
                history.end(change, false);
                Ok(())
            }
            Err(errno) => Err(errno),
            Ok(()) => {
                self.history.borrow_mut().end(change, false);
                Ok(())
            }
        }
    }

    async fn zero(&self, random: &mut Random, flags: ZeroFlags) -> Result<(), Errno> {
        let part = self.part(random);
        let Some(_held) = self.take(&part).await else {
            return Ok(());
        };
        let zeroes = vec![zero_hash(); part.count];
        let change = self.history.borrow_mut().begin(part.first, &zeroes);
        io::write_zeroes(&self.image.0, part.offset(), part.bytes(), flags).await?;
        let durable = flags.contains(ZeroFlags::DURABLE);
        self.history.borrow_mut().end(change, durable);
        Ok(())
    }

    async fn discard(&self, random: &mut Random) -> Result<(), Errno> {
        let part = self.part(random);
        let Some(_held) = self.take(&part).await else {
            return Ok(());
        };
        let zeroes = vec![zero_hash(); part.count];
        let change = self.history.borrow_mut().begin(part.first, &zeroes);
        io::discard(&self.image.0, part.offset(), part.bytes()).await?;
        // What is not a whole cluster stays as it was.
        let content = self.image.read(part.offset(), part.count * SECTOR).await?;
        let mut history = self.history.borrow_mut();
        history.assert_may_be_now(part.first, &content, "after a discard");
        history.or(change, &hashes(&content));
        history.end(change, false);
        Ok(())
    }

    async fn read(&self, random: &mut Random) -> Result<(), Errno> {
        let part = self.part(random);
        let Some(_held) = self.take(&part).await else {
            return Ok(());
        };
        let content = self.image.read(part.offset(), part.count * SECTOR).await?;
        self.history
            .borrow()
            .assert_may_be_now(part.first, &content, "read");
        Ok(())
    }

    pub(super) async fn flush(&self) -> Result<(), Errno> {
        let started = self.history.borrow_mut().begin_flush();
        self.image.flush().await?;
        self.history.borrow_mut().end_flush(started);
        Ok(())
    }

    async fn resize(&self, random: &mut Random) -> Result<(), Errno> {
        let old = self.image.0.size();
        let size = (old / 2 + random.below(old)).clamp(64 * 1024, self.largest) & !511;
        // Requests on what is there before and after go on meanwhile.
        let _held = self.ranges.lock(old.min(size)..u64::MAX).await;
        if self.image.0.size() != old {
            return Ok(());
        }
        let change = self.history.borrow_mut().begin_resize(old, size);
        io::truncate(&self.image.0, size, true, PreallocMode::Off).await?;
        self.history.borrow_mut().end_resize(change);
        Ok(())
    }
}
