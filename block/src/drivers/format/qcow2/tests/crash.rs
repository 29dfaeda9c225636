//! Power cuts: a workload runs over disks that record what reaches them; the power is cut at random moments; what was not flushed
//! survives in random parts. QEMU must find no corruption then, and every sector must hold what was flushed last, or something newer.
//! From some of these states the work goes on, after the repair that a dirty image needs, and the power is cut again; others are
//! repaired by `check`, which is cut off, too. In every fourth run requests fail all the while.
//!
//! `STORD_CRASH_CUTS` sets how many cuts are made (500 by default), `STORD_FIRST_SEED` where to begin, and `STORD_KIND` picks the kinds
//! of images whose description contains it.

use std::cell::RefCell;
use std::rc::Rc;

use stord_aio::{Errno, sim};

use super::super::check::{Repair, check_children};
use super::harness::assert_same;
use super::history::History;
use super::made::{Files, Kind, MIXED, Made};
use super::workload::Guest;
use crate::driver::FILE;
use crate::graph::Children;
use crate::testing::{Journal, MemoryDisk, Operation, Random, after_power_cut, leaf};

/// The image's file, and its data file if it has one.
pub(super) type Contents = Vec<Vec<u8>>;

fn number(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value
        .and_then(|value| value.parse().ok())
        .unwrap_or(default)
}

/// Whether the dirty bit announces that refcounts are wrong.
pub(super) fn is_dirty(contents: &Contents) -> bool {
    let header = &contents[0];
    header[7] == 3 && header[79] & 1 != 0
}

/// A stretch of work between two losses of power.
struct Run<'a> {
    made: &'a Made,
    /// Nothing was lost before it: what a raw data file holds on its own is what the image reads as.
    is_first: bool,
    start: Contents,
    journal: Vec<(usize, Operation)>,
    history: History,
}

/// How a run goes.
#[derive(Clone, Copy)]
struct Plan {
    seed: u64,
    workers: u64,
    steps: u64,
    failing: bool,
    is_first: bool,
}

/// Fails some requests on and off.
fn disturb(disk: &MemoryDisk, seed: u64) {
    let mut random = Random::new(seed);
    disk.tear(Random::new(seed + 1));
    let mut left = 0;
    disk.fail(move |_, _, _| {
        if left == 0 && random.one_in(150) {
            left = 1 + random.below(12);
        }
        if left > 0 && random.one_in(3) {
            left -= 1;
            return Some(if random.one_in(2) {
                Errno::EIO
            } else {
                Errno::ENOSPC
            });
        }
        None
    });
}

/// Opens the image on these disks, checks what it reads against what may be `left`, works with it and closes it.
fn run<'a>(
    made: &'a Made,
    start: Contents,
    plan: Plan,
    left: impl FnOnce(&[u8]) + 'static,
    what: &str,
) -> (Run<'a>, Contents) {
    let journal = Journal::default();
    let disks: Vec<MemoryDisk> = start.iter().cloned().map(MemoryDisk::new).collect();
    for (number, disk) in disks.iter().enumerate() {
        disk.record(number, &journal);
    }
    let setup = made.setup_over(&disks[0], disks.get(1).cloned());
    let largest = 2 * made.kind.size;
    let (work, below, what) = (journal.clone(), disks.clone(), what.to_owned());
    let history = sim::run(plan.seed, || async move {
        let image = setup.open().await.expect("opens");
        let content = image.read_all().await.expect("reads");
        left(&content);
        let guest = Guest::new(image, History::new(&content, &work), largest);
        if plan.failing {
            below
                .iter()
                .zip(plan.seed..)
                .for_each(|(disk, seed)| disturb(disk, seed));
        }
        guest
            .work(plan.seed, plan.workers, plan.steps, plan.failing)
            .await;
        below.iter().for_each(MemoryDisk::heal);
        guest.assert_content(&what).await;
        if plan.seed.is_multiple_of(2) {
            // Then little is left to do for the end.
            guest.flush().await.expect("the disk is healthy");
        }
        let Guest { image, history, .. } = guest;
        image.close().await.expect("closes");
        Rc::try_unwrap(history)
            .expect("all work is done")
            .into_inner()
    });
    let run = Run {
        made,
        is_first: plan.is_first,
        start,
        journal: journal.operations(),
        history,
    };
    (run, disks.iter().map(MemoryDisk::bytes).collect())
}

impl Run<'_> {
    /// A moment, and what the disks hold when the power goes then.
    fn cut(&self, random: &mut Random) -> (usize, Contents) {
        let at = self.moment(random);
        (at, after_power_cut(&self.start, &self.journal, at, random))
    }

    /// A moment at which much can go wrong, or any.
    fn moment(&self, random: &mut Random) -> usize {
        let len = self.journal.len();
        let below = |random: &mut Random, n: usize| {
            usize::try_from(random.below(n.max(1) as u64)).expect("an index")
        };
        let is_flush =
            |(_, operation): &(usize, Operation)| matches!(operation, Operation::Flush { .. });
        let at = below(random, len + 1);
        match random.below(9) {
            0..=2 => at,
            // What comes soon after a flush relies on it.
            3 => {
                let start = below(random, len + 1);
                let flush = self.journal[start..].iter().position(is_flush);
                flush.map_or(at, |flush| (start + flush + 2 + below(random, 5)).min(len))
            }
            // Most is lost just before a flush.
            4 | 5 => at + self.journal[at..].iter().position(is_flush).unwrap_or(0),
            // The header decides about everything.
            6 | 7 => match self.header_changes(below(random, 4)) {
                changes if changes.is_empty() => at,
                changes => {
                    let change = changes[below(random, changes.len())];
                    (change + 1 + [0, 0, 1, 3][below(random, 4)]).min(len)
                }
            },
            // The image is repaired, if need be, at the beginning.
            8 if !self.is_first => below(random, 16).min(len),
            // The image is closed at the end.
            _ => len - below(random, 8).min(len),
        }
    }

    /// Where in the journal the header is written with another L1 table, refcount table, length or feature bits.
    fn header_changes(&self, field: usize) -> Vec<usize> {
        let place = [40..48, 48..56, 24..32, 72..80][field].clone();
        let mut last = self.start[0][place.clone()].to_vec();
        let mut found = Vec::new();
        for (index, (disk, operation)) in self.journal.iter().enumerate() {
            if let Operation::Write { offset: 0, data } = operation
                && *disk == 0
                && data.len() >= 80
                && data[place.clone()] != last
            {
                found.push(index);
                last = data[place.clone()].to_vec();
            }
        }
        found
    }

    fn files(&self, contents: &Contents) -> Files {
        let data = contents.get(1).map(Vec::as_slice);
        Files::new(&contents[0], self.made.backing.as_deref(), data)
    }

    /// Has QEMU check and read what a cut has left.
    fn judge_with_qemu(&self, at: usize, left: &Contents, what: &str, random: &mut Random) {
        let files = self.files(left);
        if !is_dirty(left) {
            files.assert_consistent(what, true);
        }
        if random.one_in(4) {
            let content = files.content(None);
            let what = format!("{what}, read by QEMU");
            self.history
                .assert_may_be_left(&content, &self.history.cut(at), &what);
            // Where neither is durable, one may have what is new and the other what is old.
            if self.is_first && self.made.kind.options.contains("data_file_raw=on") {
                let size = content.len();
                let mut raw = left[1].clone();
                raw.resize(raw.len().max(size), 0);
                let what = format!("{what}, the data file");
                self.history
                    .assert_may_be_left(&raw[..size], &self.history.cut(at), &what);
            }
        }
        if self.made.kind.snapshot && random.one_in(3) {
            let content = files.content(Some("before"));
            let what = format!("{what}, the snapshot");
            // QEMU shows it at the length that the image has now.
            let len = content.len().min(self.made.content.len());
            assert_same(&content[..len], &self.made.content[..len], &what);
        }
    }

    /// Repairs what a cut has left, and cuts that off, too.
    fn repair(&self, at: usize, left: &Contents, what: &str, random: &mut Random) {
        let what = format!("{what}, repaired");
        let (journal, seed) = (Journal::default(), random.next());
        let disks: Vec<MemoryDisk> = left.iter().cloned().map(MemoryDisk::new).collect();
        disks[0].record(0, &journal);
        let file = disks[0].clone();
        let report = sim::run(seed, || async move {
            let children = Children::new(&["file"]);
            children.edges()[usize::from(FILE.0)].set_node(Some(leaf(&file)));
            check_children(&children, Repair::All)
                .await
                .expect("checks")
        });
        assert_eq!(report.corruptions, 0, "{what}");
        assert_eq!(report.leaks, 0, "{what}");
        let repair = journal.operations();
        let moments = [
            repair.len(),
            usize::try_from(random.below(repair.len() as u64 + 1)).expect("an index"),
        ];
        for moment in moments {
            let what = format!("{what}, cut at {moment} of {}", repair.len());
            let after = after_power_cut(left, &repair, moment, random);
            let files = self.files(&after);
            if !is_dirty(&after) {
                files.assert_consistent(&what, moment < repair.len());
            }
            self.history
                .assert_may_be_left(&files.content(None), &self.history.cut(at), &what);
        }
    }
}

/// Cuts a run off, judges what is left, and goes on from there, to be cut off again `depth` times.
fn cut(run_before: &Run<'_>, seed: u64, depth: u32, what: &str, random: &mut Random) -> u64 {
    let (at, left) = run_before.cut(random);
    let what = format!("{what}, cut at {at} of {}", run_before.journal.len());
    let mut cuts = 1;
    run_before.judge_with_qemu(at, &left, &what, random);
    if random.one_in(6) {
        run_before.repair(at, &left, &what, random);
        cuts += 1;
    }
    let goes_on = depth > 0 && random.one_in(3);
    let (workers, steps) = if goes_on { (3, 8) } else { (1, 3) };
    let plan = Plan {
        seed: seed + u64::from(depth),
        workers,
        steps,
        failing: false,
        is_first: false,
    };
    let moment = run_before.history.cut(at);
    let found = Rc::new(RefCell::new(Vec::new()));
    let (keep, next) = (found.clone(), format!("{what}, used afterwards"));
    let (next_run, end) = run(
        run_before.made,
        left,
        plan,
        move |content| *keep.borrow_mut() = content.to_vec(),
        &next,
    );
    let content = found.take();
    run_before
        .history
        .assert_may_be_left(&content, &moment, &what);
    next_run.files(&end).assert_consistent(&next, true);
    if goes_on {
        for _ in 0..2 {
            cuts += cut(&next_run, seed, depth - 1, &next, random);
        }
    }
    cuts
}

/// The kinds of images that power cuts are tried on.
pub(super) fn kinds() -> Vec<Kind> {
    const MIB: u64 = 1 << 20;
    let kind = |options, size| Kind {
        options,
        size,
        ..Kind::default()
    };
    let backed = |options, size| Kind {
        backing: true,
        ..kind(options, size)
    };
    let filled = |options| Kind {
        filled: MIXED,
        ..kind(options, 2 * MIB)
    };
    let snapshot = |options| Kind {
        snapshot: true,
        ..filled(options)
    };
    let data_file = |options| Kind {
        data_file: true,
        ..kind(options, 2 * MIB)
    };
    vec![
        kind("cluster_size=4k", 2 * MIB),
        kind("cluster_size=512", MIB),
        backed("cluster_size=512,refcount_bits=64", MIB / 2),
        // Both the L1 and the refcount table outgrow their first place.
        kind("cluster_size=512,refcount_bits=64", 3 * MIB / 2),
        kind("cluster_size=4k,compat=0.10", 2 * MIB),
        backed("cluster_size=16k,extended_l2=on", 2 * MIB),
        backed("cluster_size=64k", 4 * MIB),
        kind("cluster_size=4k,lazy_refcounts=on", 2 * MIB),
        backed("cluster_size=512,lazy_refcounts=on", MIB),
        Kind {
            small_cache: true,
            ..kind("cluster_size=512,refcount_bits=1", MIB)
        },
        filled("cluster_size=4k"),
        snapshot("cluster_size=4k"),
        Kind {
            driver_options: Some(|options| options.pass_discard_other = Some(true)),
            ..snapshot("cluster_size=16k,extended_l2=on")
        },
        snapshot("cluster_size=512,lazy_refcounts=on"),
        data_file("cluster_size=4k"),
        data_file("cluster_size=16k,extended_l2=on,lazy_refcounts=on"),
        data_file("cluster_size=64k,data_file_raw=on"),
        Kind {
            driver_options: Some(|options| options.discard_no_unref = Some(true)),
            ..filled("cluster_size=4k")
        },
    ]
}

#[test]
fn survives_power_cuts() {
    let cuts = number("STORD_CRASH_CUTS", 500);
    let first = number("STORD_FIRST_SEED", 0);
    let wanted = std::env::var("STORD_KIND").unwrap_or_default();
    let mut kinds = kinds();
    kinds.retain(|kind| kind.describe().contains(&wanted));
    let per_run = 8;
    let mut made = 0;
    for seed in first.. {
        if made >= cuts {
            break;
        }
        let kind = &kinds[usize::try_from(seed).expect("small") % kinds.len()];
        let image = Made::new(kind);
        let failing = (seed / kinds.len() as u64 + seed) % 4 == 3;
        let what = format!("seed {seed}, {}", kind.describe());
        let plan = Plan {
            seed,
            workers: 5,
            steps: 30,
            failing,
            is_first: true,
        };
        let start = std::iter::once(&image.file)
            .chain(&image.data_file)
            .map(MemoryDisk::bytes)
            .collect();
        let (run, end) = run(&image, start, plan, |_| {}, &what);
        run.files(&end).assert_consistent(&what, failing);
        let mut random = Random::new(seed);
        let enough = made + per_run;
        while made < enough {
            made += cut(&run, seed, 2, &what, &mut random);
        }
    }
}
