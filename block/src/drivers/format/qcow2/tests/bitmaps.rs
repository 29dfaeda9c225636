//! Persistent bitmaps over a disk in memory: stored and loaded in all sizes, refused where they are broken, and, with the power cut at any
//! moment, never consistent without covering what has changed.

use std::sync::Arc;

use stord_aio::sim;

use super::harness::{Image, Setup, qemu, text};
use super::made::{Kind, Made, assert_consistent};
use crate::bitmap::{BitmapState, DirtyBitmap};
use crate::driver::ZeroFlags;
use crate::io;
use crate::testing::{Journal, MemoryDisk, Random, after_power_cut};

fn add(image: &Image, name: &str, granularity_bits: u32) {
    let state = BitmapState::PERSISTENT | BitmapState::ENABLED;
    let bitmap = DirtyBitmap::new(name.to_owned(), granularity_bits, image.0.size(), state);
    image.0.bitmaps().add(Arc::new(bitmap));
}

fn bitmap(image: &Image, name: &str) -> Arc<DirtyBitmap> {
    image.0.bitmaps().find(name).expect("the bitmap is there")
}

async fn remove(image: &Image, name: &str) {
    let store = image.format().bitmap_store().expect("qcow2 stores bitmaps");
    store.remove(name).await.expect("removes");
    image.0.bitmaps().remove(name);
}

fn kinds() -> Vec<Kind> {
    let kind = |options| Kind {
        options,
        size: (2 << 20) + 512,
        filled: &["write -q -P 7 0 400k"],
        ..Kind::default()
    };
    vec![
        kind("cluster_size=64k"),
        kind("cluster_size=4k"),
        kind("cluster_size=512"),
        kind("cluster_size=16k,extended_l2=on"),
        kind("cluster_size=4k,lazy_refcounts=on"),
        kind("cluster_size=2M"),
    ]
}

#[test]
fn bitmaps_survive_closing_and_opening() {
    for (seed, kind) in (0u64..).zip(kinds()) {
        let made = Made::new(&kind);
        let disk = made.file.clone();
        sim::run(seed, || async move {
            let mut random = Random::new(seed);
            let image = made.setup().open().await.expect("opens");
            for bits in [9, 12, 16, 22, 31] {
                add(&image, &format!("b{bits}"), bits);
            }
            let mut hashes: Vec<String> = Vec::new();
            let mut image = image;
            for round in 0..4 {
                for _ in 0..10 {
                    let at = random.below(image.0.size() / 512 - 64) * 512;
                    image.write(at, &[1; 5000]).await.expect("writes");
                    let zero = io::write_zeroes(&image.0, at / 2, 3000, ZeroFlags::MAY_UNMAP);
                    zero.await.expect("zeroes");
                }
                if round == 2 {
                    // All bits of it.
                    bitmap(&image, "b9").set(0, image.0.size());
                }
                let before = image.0.bitmaps().list();
                hashes = before.iter().map(|bitmap| bitmap.sha256()).collect();
                image.close().await.expect("closes");
                image = made.setup().open().await.expect("opens again");
                let after = image.0.bitmaps().list();
                let found: Vec<String> = after.iter().map(|bitmap| bitmap.sha256()).collect();
                assert_eq!(hashes, found, "{}, round {round}", made.kind.describe());
                assert!(after.iter().all(|bitmap| bitmap.is(BitmapState::ENABLED)));
                assert!(
                    !after
                        .iter()
                        .any(|bitmap| bitmap.is(BitmapState::INCONSISTENT))
                );
            }
            for bits in [9, 16, 31, 12, 22] {
                remove(&image, &format!("b{bits}")).await;
            }
            image.close().await.expect("closes");
            assert_eq!(hashes.len(), 5);
        });
        assert_consistent(&disk.bytes(), &kind.describe(), false);
    }
}

#[test]
fn reading_alone_changes_nothing_on_disk() {
    let made = Made::new(&kinds()[0]);
    let disk = made.file.clone();
    sim::run(1, || async move {
        let image = made.setup().open().await.expect("opens");
        add(&image, "b", 16);
        image.close().await.expect("closes");
        let before = made.file.bytes();
        let image = made.setup().open().await.expect("opens");
        image.read_all().await.expect("reads");
        image.flush().await.expect("flushes");
        image.close().await.expect("closes");
        assert!(
            before == made.file.bytes(),
            "the image has not been touched"
        );
    });
    assert_consistent(&disk.bytes(), "with a bitmap", false);
}

#[test]
fn resizing_keeps_bitmaps() {
    let made = Made::new(&kinds()[1]);
    let disk = made.file.clone();
    sim::run(1, || async move {
        let image = made.setup().open().await.expect("opens");
        add(&image, "b", 12);
        image.write(0, &[1; 4096]).await.expect("writes");
        image.write(1 << 20, &[1; 4096]).await.expect("writes");
        let mode = stord_qmp::schema::create::PreallocMode::Off;
        let resize = async |image: &Image, size: u64| {
            io::truncate(&image.0, size, true, mode)
                .await
                .expect("resizes");
        };
        resize(&image, 1 << 20).await;
        resize(&image, 3 << 20).await;
        image
            .write((3 << 20) - 512, &[1; 512])
            .await
            .expect("writes");
        image.close().await.expect("closes");
        let image = made.setup().open().await.expect("opens");
        let bitmap = bitmap(&image, "b");
        assert_eq!((bitmap.size(), bitmap.dirty_bytes()), (3 << 20, 8192));
        image.close().await.expect("closes");
    });
    assert_consistent(&disk.bytes(), "resized with a bitmap", false);
}

/// An image with one bitmap, and where its directory entry is.
fn with_bitmap() -> (Vec<u8>, usize) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image.qcow2");
    qemu(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&path), "1M"],
    );
    qemu("qemu-img", &["bitmap", "--add", text(&path), "name"]);
    qemu("qemu-io", &["-c", "write -q 0 64k", text(&path)]);
    let bytes = std::fs::read(&path).expect("reads");
    let magic = 0x2385_2875u32.to_be_bytes();
    let at = bytes
        .windows(4)
        .position(|word| word == magic)
        .expect("the extension");
    let directory = u64::from_be_bytes(bytes[at + 24..at + 32].try_into().expect("8 bytes"));
    (bytes, usize::try_from(directory).expect("small"))
}

fn opened(bytes: Vec<u8>) -> Result<Option<(bool, u64)>, String> {
    let setup = Setup::new(&MemoryDisk::new(bytes));
    sim::run(1, || async move {
        match setup.open().await {
            Ok(image) => {
                let bitmap = image.0.bitmaps().find("name");
                Ok(bitmap
                    .map(|bitmap| (bitmap.is(BitmapState::INCONSISTENT), bitmap.dirty_bytes())))
            }
            Err(error) => Err(error.message),
        }
    })
}

#[test]
fn broken_bitmaps_are_refused_in_the_references_words() {
    let (image, entry) = with_bitmap();
    assert_eq!(opened(image.clone()), Ok(Some((false, 65536))));
    let changed = |at: usize, bytes: &[u8]| {
        let mut image = image.clone();
        image[entry + at..entry + at + bytes.len()].copy_from_slice(bytes);
        opened(image)
    };
    assert_eq!(changed(15, &[3]), Ok(Some((true, 0))), "in use");
    let constraints = Err("Bitmap 'name' doesn't satisfy the constraints".to_owned());
    for (at, bytes) in [
        (7, &[1][..]),
        (15, &[8]),
        (16, &[2]),
        (17, &[8]),
        (17, &[32]),
        (8, &[0xff]),
    ] {
        assert_eq!(changed(at, bytes), constraints, "byte {at}: {bytes:?}");
    }
    assert_eq!(
        changed(18, &[0xff, 0xff]),
        Err("Broken bitmap directory".to_owned())
    );
    let table = usize::try_from(u64::from_be_bytes(
        image[entry..entry + 8].try_into().expect("8 bytes"),
    ))
    .expect("small");
    let mut broken = image.clone();
    broken[table + 7] = 3;
    let words = "Could not read bitmap_table table from image for bitmap 'name': Invalid argument";
    assert_eq!(opened(broken), Err(words.to_owned()));
}

#[test]
fn bitmaps_with_extra_data_are_kept_and_used_only_if_declared_harmless() {
    for (flags, is_used) in [(0b10u8, false), (0b110, true)] {
        let (mut image, entry) = with_bitmap();
        image[entry + 15] = flags;
        image.resize(image.len().max(entry + 40), 0);
        image[entry + 20..entry + 24].copy_from_slice(&8u32.to_be_bytes());
        image[entry + 24..entry + 36].copy_from_slice(b"EXTRA!!!name");
        let magic = 0x2385_2875u32.to_be_bytes();
        let at = image
            .windows(4)
            .position(|word| word == magic)
            .expect("the extension");
        image[at + 16..at + 24].copy_from_slice(&40u64.to_be_bytes());
        let disk = MemoryDisk::new(image);
        let setup = Setup::new(&disk);
        sim::run(1, || async move {
            let image = setup.open().await.expect("opens");
            assert_eq!(image.0.bitmaps().find("name").is_some(), is_used);
            add(&image, "other", 16);
            image.write(0, &[1; 512]).await.expect("writes");
            image.close().await.expect("closes");
        });
        let bytes = disk.bytes();
        let kept = bytes.windows(12).any(|part| part == b"EXTRA!!!name");
        assert!(kept, "flags {flags:#b}");
        let setup = Setup::new(&disk);
        sim::run(1, || async move {
            let image = setup.open().await.expect("opens again");
            let list = image.format().info().specific.expect("there is more");
            let shown = format!("{list:?}");
            assert!(shown.contains("other") && shown.contains("name"), "{shown}");
            assert_eq!(shown.contains("InUse"), !is_used, "{shown}");
        });
    }
}

#[test]
fn small_images_with_large_claims_cost_little() {
    // All ones, over and over, in clusters of 2 MiB.
    let (mut image, entry) = with_bitmap();
    let table = usize::try_from(u64::from_be_bytes(
        image[entry..entry + 8].try_into().expect("8 bytes"),
    ))
    .expect("small");
    let entries = 8000usize;
    image[24..32].copy_from_slice(&(1u64 << 40).to_be_bytes());
    image[36..40].copy_from_slice(&2048u32.to_be_bytes());
    image[entry + 8..entry + 12]
        .copy_from_slice(&u32::try_from(entries).expect("small").to_be_bytes());
    image[entry + 17] = 9;
    image.resize(image.len().max(table + entries * 8), 0);
    for number in 0..entries {
        image[table + number * 8..table + number * 8 + 8].copy_from_slice(&1u64.to_be_bytes());
    }
    let found = opened(image);
    assert_eq!(found, Ok(Some((false, 1 << 40))));
}

/// Sectors that differ.
fn changed(before: &[u8], after: &[u8]) -> Vec<u64> {
    let sectors = before.chunks(512).zip(after.chunks(512));
    (0u64..)
        .zip(sectors)
        .filter(|(_, (before, after))| before != after)
        .map(|(sector, _)| sector)
        .collect()
}

#[test]
fn after_power_cuts_consistent_bitmaps_cover_all_changes() {
    let cuts: u64 = std::env::var("STORD_CRASH_CUTS")
        .ok()
        .and_then(|cuts| cuts.parse().ok())
        .unwrap_or(500)
        / 5;
    const PER_RUN: u64 = 10;
    let kinds = kinds();
    let mut consistent = 0;
    for seed in 0..cuts.div_ceil(PER_RUN) {
        let kind = &kinds[usize::try_from(seed).expect("small") % (kinds.len() - 1)];
        let made = Made::new(kind);
        let start = [made.file.bytes()];
        let content = made.content.clone();
        let journal = Journal::default();
        made.file.record(0, &journal);
        sim::run(seed, || async move {
            let mut random = Random::new(seed);
            for session in 0..4 {
                let image = made.setup().open().await.expect("opens");
                match session {
                    0 => add(&image, "kept", 12),
                    1 => add(&image, "gone", 9),
                    2 => remove(&image, "gone").await,
                    _ => {}
                }
                for _ in 0..random.below(6) {
                    let at = random.below(image.0.size() / 512 - 64) * 512;
                    let fill = random.next().to_le_bytes()[0];
                    image.write(at, &[fill; 9000]).await.expect("writes");
                    if random.one_in(2) {
                        image.flush().await.expect("flushes");
                    }
                }
                image.close().await.expect("closes");
            }
        });
        let journal = journal.operations();
        let mut random = Random::new(seed);
        for _ in 0..PER_RUN {
            let at = usize::try_from(random.below(journal.len() as u64 + 1)).expect("an index");
            let left = after_power_cut(&start, &journal, at, &mut random).remove(0);
            let what = format!(
                "{}, seed {seed}, cut at {at} of {}",
                kind.describe(),
                journal.len()
            );
            if left[79] & 1 == 0 {
                assert_consistent(&left, &what, true);
            }
            let setup = Setup::new(&MemoryDisk::new(left));
            let (found, bitmap) = sim::run(1, || async move {
                let image = setup.open().await.expect("opens");
                let found = image.read_all().await.expect("reads");
                (found, image.0.bitmaps().find("kept"))
            });
            let Some(bitmap) = bitmap.filter(|bitmap| !bitmap.is(BitmapState::INCONSISTENT)) else {
                continue;
            };
            consistent += 1;
            for sector in changed(&content, &found) {
                let byte = sector >> 3 >> 3;
                let piece = bitmap.piece(usize::try_from(byte / 4096).expect("small"));
                let bits = piece[usize::try_from(byte % 4096).expect("small")];
                assert!(
                    bits >> (sector >> 3 & 7) & 1 == 1,
                    "{what}: sector {sector:#x}"
                );
            }
        }
    }
    assert!(
        consistent > 0,
        "cuts between sessions leave bitmaps in order"
    );
}
