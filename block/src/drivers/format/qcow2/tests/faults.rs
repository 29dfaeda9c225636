//! Requests to the disk fail, in all the ways in which they do: the guest is told, nothing that was acknowledged is lost, and when the
//! disk is healthy again everything goes on. A request that fails may have been carried out, wholly or in part.
//!
//! `STORD_SEEDS` and `STORD_FIRST_SEED` choose how many seeds are tried, and which.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stord_aio::{Errno, sim};

use super::crash::{is_dirty, kinds};
use super::history::History;
use super::made::{Files, Kind, Made};
use super::model::seeds;
use super::workload::Guest;
use crate::testing::{Fault, Journal, MemoryDisk, Random};

/// What is wrong with the disks for a while.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    /// One in so many requests fails, of whatever kind.
    Anything(u64),
    /// All requests of a kind fail.
    All(Fault),
    /// One in so many requests of a kind fails.
    Some(Fault, u64),
    /// Nothing may be written beyond this many bytes.
    Full(u64),
}

impl Trouble {
    fn choose(random: &mut Random) -> Self {
        let kinds = [
            Fault::Read,
            Fault::Write,
            Fault::Flush,
            Fault::Discard,
            Fault::Truncate,
        ];
        let kind = kinds[usize::try_from(random.below(5)).expect("small")];
        match random.below(8) {
            0..=2 => Self::Anything(3 + random.below(60)),
            3 => Self::All(kind),
            4..=6 => Self::Some(kind, 2 + random.below(10)),
            _ => Self::Full(random.below(1 << 20)),
        }
    }

    fn cause(self, disk: &MemoryDisk, seed: u64) {
        let mut random = Random::new(seed);
        disk.tear(Random::new(seed + 1));
        disk.fail(move |kind, offset, len| {
            let fails = match self {
                Self::Anything(n) => random.one_in(n),
                Self::All(bad) => bad == kind,
                Self::Some(bad, n) => bad == kind && random.one_in(n),
                Self::Full(end) => kind == Fault::Write && offset + len > end,
            };
            let errno = match self {
                Self::Full(_) => Errno::ENOSPC,
                _ if random.one_in(3) => Errno::ENOSPC,
                _ => Errno::EIO,
            };
            fails.then_some(errno)
        });
    }
}

fn disks(made: &Made) -> Vec<MemoryDisk> {
    std::iter::once(&made.file)
        .chain(&made.data_file)
        .cloned()
        .collect()
}

/// Opens what is on the disks at this moment, as another daemon would after this one was killed, and checks the content.
async fn check_as_it_is(made: &Made, guest: &Guest, what: &str) {
    let copies: Vec<MemoryDisk> = disks(made)
        .iter()
        .map(|disk| MemoryDisk::new(disk.bytes()))
        .collect();
    let setup = made.setup_over(&copies[0], copies.get(1).cloned());
    let image = setup.open().await.expect("opens");
    let content = image.read_all().await.expect("reads");
    image.close().await.expect("closes");
    assert_eq!(content.len() as u64, guest.image.0.size(), "{what}");
    let history = guest.history.borrow();
    history.assert_may_be_now(0, &content, &format!("{what}, opened anew"));
}

fn check_with_qemu(made: &Made, what: &str) {
    let bytes: Vec<Vec<u8>> = disks(made).iter().map(MemoryDisk::bytes).collect();
    let data = bytes.get(1).map(Vec::as_slice);
    if !is_dirty(&bytes) {
        Files::new(&bytes[0], made.backing.as_deref(), data).assert_consistent(what, true);
    }
}

#[test]
fn keeps_its_word_on_failing_disks() {
    for kind in kinds() {
        for seed in seeds(1) {
            let made = Arc::new(Made::new(&kind));
            let what = format!("{} seed {seed}", kind.describe());
            let (shared, largest) = (Arc::clone(&made), 2 * kind.size);
            sim::run(seed, || async move {
                let made = shared;
                let journal = Journal::default();
                let image = made.setup().open().await.expect("opens");
                let content = image.read_all().await.expect("reads");
                let guest = Guest::new(image, History::new(&content, &journal), largest);
                let mut random = Random::new(seed);
                for round in 0..6 {
                    let trouble = Trouble::choose(&mut random);
                    let what = format!("{what}, round {round} ({trouble:?})");
                    for disk in disks(&made) {
                        trouble.cause(&disk, random.next());
                    }
                    guest.work(random.next(), 4, 12, true).await;
                    disks(&made).iter().for_each(MemoryDisk::heal);
                    guest.assert_content(&what).await;
                    guest.flush().await.expect("the disk is healthy again");
                    check_as_it_is(&made, &guest, &what).await;
                    check_with_qemu(&made, &what);
                    guest.work(random.next(), 4, 6, false).await;
                }
                guest.assert_content(&what).await;
                guest.image.clone().close().await.expect("closes");
                check_as_it_is(&made, &guest, &what).await;
                check_with_qemu(&made, &what);
            });
        }
    }
}

/// A short life of an image, in which request number `bad` fails; `once`, or with all after it until the disk is mended. Gives how
/// many requests there were until then.
fn live(made: &Made, start: &[Vec<u8>], bad: u64, once: bool, what: &str) -> u64 {
    let count = Arc::new(AtomicU64::new(0));
    let copies: Vec<MemoryDisk> = start.iter().cloned().map(MemoryDisk::new).collect();
    let (disks, counter, what) = (copies.clone(), Arc::clone(&count), what.to_owned());
    let setup = made.setup_over(&copies[0], copies.get(1).cloned());
    let largest = 2 * made.kind.size;
    sim::run(7, || async move {
        let image = setup.open().await.expect("opens");
        let content = image.read_all().await.expect("reads");
        let journal = Journal::default();
        let guest = Guest::new(image, History::new(&content, &journal), largest);
        for disk in &disks {
            let count = Arc::clone(&counter);
            disk.tear(Random::new(bad));
            disk.fail(move |_, _, _| {
                let number = count.fetch_add(1, Ordering::Relaxed);
                let fails = number == bad || (!once && number > bad && number < bad + 30);
                fails.then_some(Errno::EIO)
            });
        }
        guest.work(7, 2, 12, true).await;
        disks.iter().for_each(MemoryDisk::heal);
        guest.assert_content(&what).await;
        guest.flush().await.expect("the disk is healthy again");
        guest.work(8, 2, 4, false).await;
        guest.assert_content(&what).await;
        guest.image.clone().close().await.expect("closes");
    });
    if bad.is_multiple_of(10) {
        let data = copies.get(1).map(MemoryDisk::bytes);
        Files::new(&copies[0].bytes(), made.backing.as_deref(), data.as_deref())
            .assert_consistent(&format!("request {bad} failed"), true);
    }
    count.load(Ordering::Relaxed)
}

#[test]
fn any_one_request_may_fail() {
    for (number, kind) in kinds().into_iter().enumerate() {
        let kind = Kind {
            // Short lives.
            size: kind.size / 2,
            filled: &[],
            snapshot: false,
            ..kind
        };
        let made = Made::new(&kind);
        let start: Vec<Vec<u8>> = disks(&made).iter().map(MemoryDisk::bytes).collect();
        let all = live(&made, &start, u64::MAX, true, "nothing fails");
        // Neither the same requests in every kind, nor all of them in a run.
        for bad in (number as u64 % 7..all).step_by(7) {
            let once = bad % 3 != 0;
            let what = format!("{}, request {bad} fails", kind.describe());
            live(&made, &start, bad, once, &what);
        }
    }
}
