//! Images damaged at random, from a seed. Header fields, tables, blocks and everything that they point to get values that are likely to
//! hurt. Nothing may panic or hang, and nothing may cost much memory: that is why the work is done in a process of its own.
//!
//! `STORD_FUZZ_CASES` sets how many images are tried, `STORD_FIRST_SEED` the first; an image that fails is kept, and its name told.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::harness::{qemu, text};
use super::untrusted::use_untrusted;
use crate::testing::Random;

/// A small image may cost this much at most, in KiB.
const MEMORY: u64 = 48 << 10;
/// No image may take longer, on a busy machine.
const LONGEST: Duration = Duration::from_secs(20);

fn number(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value
        .and_then(|value| value.parse().ok())
        .unwrap_or(default)
}

/// Images with a bit of everything, as small as they can be.
fn bases() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a directory");
    let (path, data) = (dir.path().join("image"), dir.path().join("data"));
    let with_data = format!("cluster_size=512,data_file={}", text(&data));
    let kinds = [
        ("cluster_size=512", "64k"),
        ("cluster_size=512,compat=0.10", "64k"),
        ("cluster_size=512,refcount_bits=1,lazy_refcounts=on", "40k"),
        (
            "cluster_size=512,refcount_bits=64,compression_type=zstd",
            "64k",
        ),
        ("cluster_size=16k,extended_l2=on", "128k"),
        (&with_data, "64k"),
        (
            "cluster_size=512,backing_file=json:{\"driver\":\"null-co\"},backing_fmt=raw",
            "64k",
        ),
        ("", "1M"),
        ("cluster_size=2M", "4M"),
    ];
    let mut images = Vec::new();
    for (options, size) in kinds {
        let mut args = vec!["create", "-q", "-u", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([text(&path), size]);
        qemu("qemu-img", &args);
        images.push(std::fs::read(&path).expect("the image"));
        if options.contains("backing") || size == "4M" {
            continue;
        }
        let mut fill = vec!["-c", "write -q -P 1 0 20k", "-c", "write -q -z 24k 4k"];
        if !options.contains("data_file") {
            let compressed = match options {
                "" => "write -q -c -P 2 64k 64k",
                options if options.contains("16k") => "write -q -c -P 2 32k 16k",
                _ => "write -q -c -P 2 32k 8k",
            };
            fill.extend(["-c", compressed]);
        }
        fill.push(text(&path));
        qemu("qemu-io", &fill);
        if !options.contains("compat") && !options.contains("refcount_bits=1,") {
            qemu(
                "qemu-img",
                &["bitmap", "--add", "-g", "512", text(&path), "b0"],
            );
            qemu("qemu-io", &["-c", "write -q -P 3 4k 4k", text(&path)]);
        }
        if !options.contains("refcount_bits=1,") && !options.contains("data_file") {
            qemu("qemu-img", &["snapshot", "-c", "s", text(&path)]);
        }
        images.push(std::fs::read(&path).expect("the image"));
    }
    images.push(boastful(&images[0]));
    let coarse: Vec<_> = images.iter().filter_map(|image| coarse(image)).collect();
    images.extend(coarse);
    images
}

/// With a bitmap that is coarser than any number can say.
fn coarse(image: &[u8]) -> Option<Vec<u8>> {
    const BITMAPS: u64 = 0x2385_2875_0000_0018;
    let extension = (104..504)
        .step_by(8)
        .find(|&at| word(image, at) == BITMAPS)?;
    let directory = usize::try_from(word(image, extension + 24)).ok()?;
    let mut image = image.to_vec();
    *image.get_mut(directory + 17)? = 200;
    Some(image)
}

/// Less than a KiB, with snapshots in the header's cluster that claim gigabytes of extra data.
fn boastful(image: &[u8]) -> Vec<u8> {
    let mut image = image[..877].to_vec();
    image[7] = 2;
    image[60..64].copy_from_slice(&128u32.to_be_bytes());
    image[64..].fill(0);
    image[538..800].fill(1);
    image
}

fn word(image: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    let bytes = at.checked_add(8).and_then(|end| image.get(at..end));
    bytes.map_or(0, |bytes| {
        u64::from_be_bytes(bytes.try_into().expect("eight"))
    })
}

/// Offsets of structures: what the header and the tables name.
fn structures(image: &[u8]) -> Vec<u64> {
    const MASK: u64 = 0x00ff_ffff_ffff_fe00;
    let (l1, reftable, snapshots) = (word(image, 40), word(image, 48), word(image, 64));
    let mut found = vec![0, 72, 96, 104, l1, l1 + 8, reftable, snapshots];
    found.extend((0..4).map(|index| word(image, l1 + 8 * index) & MASK));
    found.push(word(image, reftable) & MASK);
    found.push(word(image, snapshots) & MASK);
    // The extensions, and what they point to: the bitmap directory and its tables.
    for at in (104..504).step_by(8) {
        let directory = word(image, at);
        if directory > 0 && directory.is_multiple_of(512) && directory < image.len() as u64 {
            found.extend([at, directory, word(image, directory) & MASK]);
        }
    }
    found.retain(|&offset| offset < image.len() as u64);
    found
}

fn value(image: &[u8], random: &mut Random) -> u64 {
    let len = image.len() as u64;
    let clusters = len / 512 * 512;
    match random.below(12) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << random.below(64),
        3 => (1 << random.below(64)) - 1,
        4 => random.next(),
        5 => random.below(len + 1024) / 512 * 512,
        6 => (random.below(len + 1024) / 512 * 512) | 1 << 63,
        7 => (random.below(len + 1024) / 512 * 512) | 1 << 62 | random.below(1 << 20) << 42,
        8 => clusters,
        9 => len,
        10 => random.below(16),
        _ => random.below(1 << 20),
    }
}

fn damage(image: &mut Vec<u8>, random: &mut Random) {
    let places = structures(image);
    for _ in 0..1 + random.below(4) {
        let place = places[usize::try_from(random.below(places.len() as u64)).expect("an index")];
        let at = match random.below(3) {
            0 => place + 4 * random.below(2),
            1 => place + 4 * random.below(32),
            _ => place + random.below(512),
        };
        let new = value(image, random).to_be_bytes();
        let width = [1, 2, 4, 8][usize::try_from(random.below(4)).expect("small")];
        let at = usize::try_from(at).expect("small");
        match random.below(10) {
            0 => {
                if let Some(byte) = image.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            1 => image.truncate(
                usize::try_from(random.below(image.len() as u64))
                    .expect("small")
                    .max(600),
            ),
            2 => {
                let from =
                    usize::try_from(random.below(image.len() as u64) / 512 * 512).expect("small");
                let to = at / 512 * 512;
                if from + 512 <= image.len() && to + 512 <= image.len() {
                    image.copy_within(from..from + 512, to);
                }
            }
            _ => {
                if let Some(field) = image.get_mut(at..at + width) {
                    field.copy_from_slice(&new[8 - width..]);
                }
            }
        }
    }
}

fn memory_kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the kernel tells");
    let line = status.lines().find(|line| line.starts_with(field));
    let digits = line.and_then(|line| line.split_whitespace().nth(1));
    digits
        .and_then(|digits| digits.parse().ok())
        .expect("a number")
}

fn work() {
    let bases = bases();
    let (first, cases) = (
        number("STORD_FIRST_SEED", 0),
        number("STORD_FUZZ_CASES", 2500),
    );
    let enough = Instant::now() + Duration::from_secs(number("STORD_FUZZ_SECONDS", 12));
    for seed in first..first + cases {
        if Instant::now() > enough {
            break;
        }
        let mut random = Random::new(seed);
        let mut image = bases[usize::try_from(seed).expect("small") % bases.len()].clone();
        if seed >= bases.len() as u64 {
            damage(&mut image, &mut random);
        }
        let keep = |why: &str| {
            let path = std::env::temp_dir().join(format!("stord-fuzz-{seed}.qcow2"));
            std::fs::write(&path, &image).expect("writes");
            eprintln!("seed {seed}: {why}; the image is {}", path.display());
        };
        // Forgets the highest use of memory so far.
        std::fs::write("/proc/self/clear_refs", "5").expect("the kernel allows it");
        let (before, begun) = (memory_kib("VmRSS:"), Instant::now());
        let result = catch_unwind(AssertUnwindSafe(|| use_untrusted(seed, &image)));
        if let Err(panic) = result {
            keep("it panicked");
            resume_unwind(panic);
        }
        let cost = memory_kib("VmHWM:").saturating_sub(before);
        if cost > MEMORY + 6 * image.len() as u64 / 1024 || begun.elapsed() > LONGEST {
            keep("it cost too much");
            panic!("{cost} KiB of memory, {:?}", begun.elapsed());
        }
    }
}

#[test]
fn damaged_images_do_no_harm() {
    const CHILD: &str = "STORD_FUZZ_CHILD";
    if std::env::var_os(CHILD).is_some() {
        return work();
    }
    let (_, module) = module_path!()
        .split_once("::")
        .expect("a module of the crate");
    let mut child = Command::new(std::env::current_exe().expect("the test program"))
        .args(["--exact", "--nocapture"])
        .arg(format!("{module}::damaged_images_do_no_harm"))
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .spawn()
        .expect("starts");
    let limit = Instant::now() + Duration::from_secs(number("STORD_FUZZ_SECONDS", 12) + 100);
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        if Instant::now() > limit {
            child.kill().expect("a child");
            panic!("an image keeps it busy for ever");
        }
        std::thread::park_timeout(Duration::from_millis(50));
    };
    assert!(status.success(), "see above");
}
