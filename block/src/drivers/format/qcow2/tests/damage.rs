//! Damaged images: the check finds what `qemu-img check` finds, and repairs as much.
//!
//! Images of every kind get a few words of their metadata changed, by a seed. `STORD_DAMAGED_IMAGES` says how many: by
//! default few, and in CI many.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use stord_aio::sim;
use stord_qmp::Error;

use super::super::check::{Repair, Report, check_children};
use super::super::header::Header;
use super::super::layout::OFFSET_MASK;
use super::harness::{qemu, text};
use crate::driver::FILE;
use crate::graph::Children;
use crate::testing::{MemoryDisk, Random, leaf};

/// Damaged images if the environment does not say otherwise.
const DEFAULT_IMAGES: u64 = 60;
/// The same in CI.
const CI_IMAGES: u64 = 200;

const SIZE: &str = "6M";

/// An image file, and how it was made.
pub(super) struct Base {
    pub(super) what: &'static str,
    pub(super) bytes: Vec<u8>,
}

/// Makes an image with `qemu-img create -o`, and lets `commands` of `qemu-io` and `qemu-img` work on it.
fn make(dir: &Path, options: &str, commands: &[&str]) -> Vec<u8> {
    let path = dir.join("image.qcow2");
    let _ = std::fs::remove_file(&path);
    let options = options.replace("DIR", text(dir));
    qemu(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            text(&path),
            SIZE,
        ],
    );
    for command in commands {
        match command.strip_prefix("img ") {
            Some(command) => {
                let words: Vec<&str> = command.split(' ').collect();
                let words: Vec<&str> = words
                    .iter()
                    .map(|word| if *word == "IMAGE" { text(&path) } else { word })
                    .collect();
                qemu("qemu-img", &words);
            }
            None => {
                let mut args: Vec<&str> = command.split(';').flat_map(|c| ["-c", c]).collect();
                args.push(text(&path));
                qemu("qemu-io", &args);
            }
        }
    }
    std::fs::read(path).expect("the image")
}

/// Sound images of every kind.
pub(super) fn bases() -> (tempfile::TempDir, Vec<Base>) {
    const DATA: &str = "write -q -P 1 0 64k;write -q -P 2 700k 300k;write -q -P 3 2M 1M;write -q -P 4 5M 100k;write -q -P 5 100k 5k";
    const MORE: &str = "write -q -P 6 2100k 64k;write -q -P 7 4M 128k;write -q -z 800k 64k;write -q -z -u 2600k 64k";
    const PACKED: &str =
        "write -q -c -P 8 3M 64k;write -q -c -P 9 3136k 64k;write -q -c -P 10 3200k 64k";
    const SNAPSHOT: &str = "img snapshot -c one IMAGE";
    let dir = tempfile::tempdir().expect("a directory");
    let list: &[(&'static str, &[&str])] = &[
        ("cluster_size=64k", &[DATA, MORE, PACKED]),
        ("cluster_size=4k", &[DATA, SNAPSHOT, MORE]),
        ("cluster_size=512", &[DATA, MORE]),
        ("cluster_size=512,refcount_bits=1", &[DATA]),
        ("cluster_size=4k,refcount_bits=2", &[DATA, SNAPSHOT, MORE]),
        ("cluster_size=4k,refcount_bits=64", &[DATA, MORE]),
        (
            "cluster_size=64k,refcount_bits=8,compression_type=zstd",
            &[
                DATA,
                PACKED,
                SNAPSHOT,
                MORE,
                "img snapshot -c two IMAGE",
                MORE,
            ],
        ),
        (
            "cluster_size=64k,extended_l2=on",
            &[DATA, MORE, SNAPSHOT, DATA],
        ),
        (
            "cluster_size=4k,compat=0.10",
            &[DATA, SNAPSHOT, "write -q -P 6 2100k 64k"],
        ),
        ("cluster_size=2k,preallocation=metadata", &[MORE]),
        (
            "cluster_size=4k,data_file=DIR/data,data_file_raw=on",
            &[DATA, MORE],
        ),
        (
            "cluster_size=4k",
            &[
                DATA,
                "img bitmap --add IMAGE b0",
                "img bitmap --add --disable -g 64k IMAGE b1",
                MORE,
            ],
        ),
        (
            "cluster_size=4k,lazy_refcounts=on",
            &[DATA, "write -q -P 9 3M 64k;abort"],
        ),
    ];
    let bases = list
        .iter()
        .map(|(options, commands)| {
            let (commands, aborts): (Vec<&str>, Vec<&str>) = commands
                .iter()
                .partition(|command| !command.ends_with("abort"));
            let mut bytes = make(dir.path(), options, &commands);
            if let Some(last) = aborts.first() {
                std::fs::write(dir.path().join("image.qcow2"), &bytes).expect("written");
                let mut args: Vec<&str> = last.split(';').flat_map(|c| ["-c", c]).collect();
                let path = dir.path().join("image.qcow2");
                args.push(text(&path));
                // Leaves the dirty bit behind.
                let _ = Command::new("qemu-io").args(args).output();
                bytes = std::fs::read(&path).expect("the image");
            }
            Base {
                what: options,
                bytes,
            }
        })
        .collect();
    (dir, bases)
}

/// A file in memory as an image's only child.
pub(super) fn children_of(disk: &MemoryDisk) -> Children {
    let children = Children::new(&["file"]);
    children.edges()[usize::from(FILE.0)].set_node(Some(leaf(disk)));
    children
}

/// Checks an image in memory. Gives also what became of it.
pub(super) fn check(bytes: &[u8], repair: Repair) -> (Result<Report, Error>, Vec<u8>) {
    let disk = MemoryDisk::new(bytes.to_vec());
    let on = disk.clone();
    let report = sim::run(1, move || async move {
        check_children(&children_of(&on), repair).await
    });
    (report, disk.bytes())
}

/// What `qemu-img check` says.
#[derive(Debug)]
struct Theirs {
    status: i32,
    counts: Option<Value>,
    said: String,
}

impl Theirs {
    fn of(path: &Path, repair: Repair) -> Self {
        let mut args = vec!["check", "--output=json", "-f", "qcow2"];
        match repair {
            Repair::Nothing => {}
            Repair::Leaks => args.extend(["-r", "leaks"]),
            Repair::All => args.extend(["-r", "all"]),
        }
        args.push(text(path));
        let output = Command::new("qemu-img")
            .args(args)
            .output()
            .expect("qemu-img is needed: install qemu-utils");
        Self {
            status: output.status.code().unwrap_or(-1),
            counts: serde_json::from_slice(&output.stdout).ok(),
            said: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    fn count(&self, name: &str) -> u64 {
        let counts = self
            .counts
            .as_ref()
            .expect("asked only where there are some");
        counts.get(name).and_then(Value::as_u64).unwrap_or(0)
    }
}

/// Changes some words of the image's metadata.
struct Damage {
    random: Random,
    log: Vec<String>,
}

/// Where the image has its metadata, as offsets of words.
fn metadata(bytes: &[u8]) -> Vec<Vec<u64>> {
    let disk = MemoryDisk::new(bytes.to_vec());
    let header = sim::run(
        1,
        move || async move { Header::read(&children_of(&disk)).await },
    )
    .expect("a sound image");
    let word = |at: u64| {
        let at = usize::try_from(at).expect("in the file");
        bytes.get(at..at + 8).map_or(0, |word| {
            u64::from_be_bytes(word.try_into().expect("8 bytes"))
        })
    };
    let raw = &header.raw;
    let cluster = header.geometry.cluster_size();
    let table = |offset: u64, entries: u64| -> Vec<u64> {
        (0..entries).map(|index| offset + index * 8).collect()
    };
    let used = |table: &[u64]| -> Vec<u64> {
        let mut used: Vec<u64> = table.iter().copied().filter(|&at| word(at) != 0).collect();
        // One that is empty, too.
        used.extend(table.iter().copied().find(|&at| word(at) == 0));
        used
    };
    let l1 = table(raw.l1_table_offset.get(), u64::from(raw.l1_size.get()));
    let l2: Vec<u64> = l1
        .iter()
        .map(|&at| word(at) & OFFSET_MASK)
        .filter(|&offset| offset != 0)
        .flat_map(|offset| used(&table(offset, cluster / 8)))
        .collect();
    let reftable = table(raw.refcount_table_offset.get(), cluster / 8);
    let blocks: Vec<u64> = reftable
        .iter()
        .map(|&at| word(at))
        .filter(|&offset| offset != 0)
        .flat_map(|offset| used(&table(offset, cluster / 8)))
        .collect();
    let mut kinds = vec![used(&l1), l2.clone(), l2, used(&reftable), blocks];
    if raw.nb_snapshots.get() > 0 {
        let at = raw.snapshots_offset.get();
        kinds.push(table(at, 8));
        kinds.push(used(&table(word(at), u64::from(raw.l1_size.get()))));
    }
    if let Some(bitmaps) = header.bitmaps {
        kinds.push(table(bitmaps.directory_offset, bitmaps.directory_size / 8));
        kinds.push(table(word(bitmaps.directory_offset), 2));
    }
    // Table places and incompatible features. Not autoclear features: qemu-img drops all snapshots when it meets an unknown one.
    kinds.push(vec![40, 48, 72]);
    kinds
}

impl Damage {
    fn apply(&mut self, bytes: &mut [u8], kinds: &[Vec<u64>]) {
        let count = 1 + self.random.below(4);
        for _ in 0..count {
            let kind = usize::try_from(self.random.below(kinds.len() as u64)).expect("small");
            let words = &kinds[kind];
            if words.is_empty() {
                continue;
            }
            let index = usize::try_from(self.random.below(words.len() as u64)).expect("small");
            let at = usize::try_from(words[index]).expect("in the file");
            let Some(place) = bytes.get(at..at + 8) else {
                continue;
            };
            let old = u64::from_be_bytes(place.try_into().expect("8 bytes"));
            let new = self.value(old, bytes, words);
            self.log
                .push(format!("kind {kind} at {at:#x}: {old:#x} -> {new:#x}"));
            bytes[at..at + 8].copy_from_slice(&new.to_be_bytes());
        }
    }

    fn value(&mut self, old: u64, bytes: &[u8], words: &[u64]) -> u64 {
        match self.random.below(8) {
            0 => 0,
            1 => old ^ 1 << 63,
            2 => old ^ 1 << self.random.below(64),
            3 => old ^ 1 << (9 + self.random.below(14)),
            4 => old.wrapping_add(self.random.below(4) << 16),
            5 => {
                let index = usize::try_from(self.random.below(words.len() as u64)).expect("small");
                let at = usize::try_from(words[index]).expect("in the file");
                bytes.get(at..at + 8).map_or(0, |word| {
                    u64::from_be_bytes(word.try_into().expect("8 bytes"))
                })
            }
            6 => old ^ 0xff << (8 * self.random.below(8)),
            _ => (self.random.below(bytes.len() as u64) & !511) | old & 1 << 63,
        }
    }
}

/// What came of a comparison.
enum Verdict {
    Same,
    /// Known to differ, and for good.
    Excused,
    Differs(String),
}

/// The beginning of what may be long.
fn beginning(text: &str) -> String {
    text.lines()
        .take(12)
        .map(|line| format!("    {line}\n"))
        .collect()
}

fn differ(what: &str, ours: &Result<Report, Error>, theirs: &Theirs) -> Verdict {
    let ours = match ours {
        Ok(ours) => {
            let counts = Report {
                notes: Vec::new(),
                ..ours.clone()
            };
            format!("{counts:?}\n{}", beginning(&ours.notes.join("\n")))
        }
        Err(error) => error.message.clone(),
    };
    Verdict::Differs(format!(
        "{what}\nours: {ours}\ntheirs: {} {:?}\n{}",
        theirs.status,
        theirs.counts.as_ref().map(Value::to_string),
        beginning(&theirs.said)
    ))
}

fn agree(ours: &Report, theirs: &Theirs, end_too: bool, what: &str) -> Verdict {
    let pairs = [
        ("corruptions", ours.corruptions),
        ("leaks", ours.leaks),
        ("check-errors", ours.check_errors),
        ("total-clusters", ours.total_clusters),
        ("allocated-clusters", ours.allocated_clusters),
        ("fragmented-clusters", ours.fragmented_clusters),
        ("compressed-clusters", ours.compressed_clusters),
        ("corruptions-fixed", ours.corruptions_fixed),
        ("leaks-fixed", ours.leaks_fixed),
        ("image-end-offset", ours.image_end_offset),
    ];
    let odd = pairs.iter().find(|(name, count)| {
        *count != theirs.count(name) && (end_too || *name != "image-end-offset")
    });
    match odd {
        Some((name, _)) => differ(&format!("{name}: {what}"), &Ok(ours.clone()), theirs),
        None => Verdict::Same,
    }
}

/// Checks without repair: the same counts, or an error where QEMU has one.
fn compare_check(bytes: &[u8], path: &Path, what: &str) -> Verdict {
    std::fs::write(path, bytes).expect("written");
    let theirs = Theirs::of(path, Repair::Nothing);
    let (ours, after) = check(bytes, Repair::Nothing);
    assert!(after == bytes, "a check changed the image: {what}");
    match (&ours, &theirs.counts) {
        (Ok(ours), Some(_)) => agree(ours, &theirs, true, what),
        (Ok(report), None) if report.corruptions + report.check_errors == 0 => {
            differ(&format!("found sound: {what}"), &ours, &theirs)
        }
        (Err(_), Some(_)) => differ(&format!("not checked: {what}"), &ours, &theirs),
        (_, None) => Verdict::Same,
    }
}

fn refused(report: &Report) -> bool {
    report
        .notes
        .iter()
        .any(|note| note.contains("more than to repair leaks"))
}

/// Whether a repair is known to differ from QEMU's, and for good.
fn is_better(ours: &Report, theirs: &Theirs) -> bool {
    // QEMU writes into tables although guest data or another table lies there, too.
    let left_alone = ours.notes.iter().any(|note| note.contains("left alone"));
    // QEMU makes the file as long as a wrong entry of the refcount table says, and counts the block that it so gets.
    let extended = theirs.said.contains("is outside image")
        && !theirs.said.contains("could not resize")
        && ours.corruptions == theirs.count("corruptions")
        && ours.corruptions_fixed < theirs.count("corruptions-fixed");
    left_alone || extended
}

/// Repairs: as much repaired as QEMU does, what is left is what we say, and the guest sees the same.
fn compare_repair(bytes: &[u8], path: &Path, repair: Repair, what: &str) -> Vec<Verdict> {
    std::fs::write(path, bytes).expect("written");
    let theirs = Theirs::of(path, repair);
    let (ours, after) = check(bytes, repair);
    let what = format!("{repair:?}: {what}");
    let first = match (&ours, &theirs.counts) {
        (Ok(report), Some(_)) => match agree(report, &theirs, false, &what) {
            Verdict::Differs(_) if is_better(report, &theirs) => Verdict::Excused,
            verdict => verdict,
        },
        (Err(_), Some(_)) => differ(&what, &ours, &theirs),
        (_, None) => Verdict::Same,
    };
    let by_them = path.with_extension("theirs");
    std::fs::rename(path, &by_them).expect("renamed");
    std::fs::write(path, &after).expect("written");
    let left = Theirs::of(path, Repair::Nothing);
    let what = format!("afterwards: {what}");
    let Ok(report) = &ours else {
        return vec![first];
    };
    let second = if left.counts.is_some() {
        let left_over = Report {
            corruptions_fixed: 0,
            leaks_fixed: 0,
            // To refuse a repair counts as an error of the check.
            check_errors: report.check_errors - u64::from(refused(report)),
            ..report.clone()
        };
        agree(&left_over, &left, true, &what)
    } else if report.corruptions + report.check_errors == 0 {
        differ(&what, &ours, &left)
    } else {
        Verdict::Same
    };
    let mut verdicts = vec![first, second];
    if left.status == 0 && theirs.status == 0 {
        let compared = Command::new("qemu-img")
            .args(["compare", "-q", text(path), text(&by_them)])
            .status()
            .expect("qemu-img is there");
        // 2 is an image that cannot be read in spite of all.
        if compared.code() == Some(1) {
            verdicts.push(differ(&format!("content: {what}"), &ours, &theirs));
        }
    }
    verdicts
}

/// Fails with what differs, and when more is excused than one in so many.
fn assert_all(verdicts: Vec<Verdict>, excused_one_in: usize) {
    let count = verdicts.len();
    let excused = verdicts
        .iter()
        .filter(|verdict| matches!(verdict, Verdict::Excused))
        .count();
    let bad: Vec<String> = verdicts
        .into_iter()
        .filter_map(|verdict| match verdict {
            Verdict::Differs(text) => Some(text),
            _ => None,
        })
        .collect();
    assert!(
        bad.is_empty(),
        "{} of {count} differ:\n{}",
        bad.len(),
        bad.join("\n")
    );
    assert!(
        excused * excused_one_in <= count,
        "{excused} of {count} excused"
    );
}

#[test]
fn sound_images_are_found_sound() {
    let (_dir, bases) = bases();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image.qcow2");
    let mut verdicts = Vec::new();
    for base in &bases {
        verdicts.push(compare_check(&base.bytes, &path, base.what));
        for repair in [Repair::Leaks, Repair::All] {
            verdicts.extend(compare_repair(&base.bytes, &path, repair, base.what));
        }
    }
    assert_all(verdicts, usize::MAX);
}

#[test]
fn damaged_images_are_judged_and_repaired_as_by_qemu() {
    let is_ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    let images = std::env::var("STORD_DAMAGED_IMAGES")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(if is_ci { CI_IMAGES } else { DEFAULT_IMAGES });
    let (_dir, bases) = bases();
    let metadata: Vec<_> = bases.iter().map(|base| metadata(&base.bytes)).collect();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image.qcow2");
    let mut verdicts = Vec::new();
    for seed in 0..images {
        let which = usize::try_from(seed % bases.len() as u64).expect("small");
        let mut bytes = bases[which].bytes.clone();
        let mut damage = Damage {
            random: Random::new(seed),
            log: Vec::new(),
        };
        damage.apply(&mut bytes, &metadata[which]);
        let what = format!("seed {seed}, {}: {:#?}", bases[which].what, damage.log);
        verdicts.push(compare_check(&bytes, &path, &what));
        for repair in [Repair::Leaks, Repair::All] {
            verdicts.extend(compare_repair(&bytes, &path, repair, &what));
        }
    }
    assert_all(verdicts, 20);
}
