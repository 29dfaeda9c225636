//! Uses an image that may be anything, in every way: whatever it holds, nothing panics or hangs, and requests get an answer. An image
//! in which the check finds nothing must work: what is written reads back, and nothing is wrong with it afterwards.

use std::collections::BTreeMap;

use stord_aio::{Errno, sim};
use stord_qmp::Error;
use stord_qmp::schema::create::PreallocMode;

use super::super::check::{Repair, Report, check_children};
use super::opened::{Image, Setup};
use crate::driver::{FILE, ZeroFlags};
use crate::graph::Children;
use crate::io;
use crate::testing::{MemoryDisk, Random, leaf, node_options};

const SECTOR: u64 = 512;
/// How long a disk below may become, in bytes.
const ROOM: u64 = 8 << 20;

/// Opens, reads, checks, changes and repairs the image, each on a copy of its own; `seed` chooses the requests and their order.
pub fn use_untrusted(seed: u64, image: &[u8]) {
    let image = image.to_vec();
    sim::run(seed, move || async move {
        let found = checked(&disk(&image), Repair::Nothing).await;
        let is_sound =
            found.is_ok_and(|report| report.check_errors + report.corruptions + report.leaks == 0);
        look(&image, &mut Random::new(seed)).await;
        change(&image, &mut Random::new(seed), is_sound).await;
        for repair in [Repair::Leaks, Repair::All] {
            let mended = disk(&image);
            if let Ok(report) = checked(&mended, repair).await {
                let _ = (report, checked(&mended, Repair::Nothing).await);
                look(&mended.bytes(), &mut Random::new(seed)).await;
            }
        }
    });
}

fn disk(bytes: &[u8]) -> MemoryDisk {
    let disk = MemoryDisk::new(bytes.to_vec());
    disk.limit(ROOM);
    disk
}

async fn checked(disk: &MemoryDisk, repair: Repair) -> Result<Report, Error> {
    let children = Children::new(&["file"]);
    children.edges()[usize::from(FILE.0)].set_node(Some(leaf(disk)));
    check_children(&children, repair).await
}

async fn opened(file: &MemoryDisk, data: &MemoryDisk, read_only: bool) -> Result<Image, Error> {
    let mut common = node_options();
    common.read_only = read_only;
    let setup = Setup {
        data_file: Some(data.clone()),
        common: Some(common),
        ..Setup::new(file)
    };
    setup.open().await
}

/// Somewhere within `size` bytes, on a sector, and how far from there.
fn place(size: u64, random: &mut Random) -> (u64, u64) {
    let sectors = size / SECTOR;
    if sectors == 0 {
        return (0, 0);
    }
    let start = match random.below(4) {
        0 | 1 => random.below(sectors.min(256)),
        2 => sectors - 1 - random.below(sectors.min(64)),
        _ => random.below(sectors),
    };
    let count = 1 + random.below((sectors - start).min(96));
    (start * SECTOR, count * SECTOR)
}

async fn look(bytes: &[u8], random: &mut Random) {
    let file = disk(bytes);
    let Ok(image) = opened(&file, &disk(&[]), true).await else {
        return;
    };
    let size = image.0.size();
    let mut at = 0;
    for _ in 0..50 {
        if at >= size {
            break;
        }
        let Ok(status) = io::block_status(&image.0, at, size - at).await else {
            break;
        };
        assert!(status.len > 0 && status.len <= size - at, "{status:?}");
        at += status.len;
    }
    for _ in 0..12 {
        let (offset, len) = place(size, random);
        let _ = image
            .read(offset, usize::try_from(len).expect("small"))
            .await;
    }
    let _ = image.format().info();
    let _ = image.close().await;
    assert_eq!(file.bytes(), bytes, "it was opened read-only");
}

/// What is known of the content, by sector.
type Known = BTreeMap<u64, u8>;

async fn change(bytes: &[u8], random: &mut Random, is_sound: bool) {
    let (file, data) = (disk(bytes), disk(&[]));
    let Ok(image) = opened(&file, &data, false).await else {
        return;
    };
    let mut known = Known::new();
    let mut all_done = true;
    for _ in 0..24 {
        all_done &= step(&image, random, &mut known).await.is_ok();
    }
    let flushed = image.flush().await;
    if is_sound {
        compare(&image, &known).await;
    }
    let closed = image.close().await;
    if !is_sound {
        return;
    }
    // Refcounts of clusters beyond the end of the file are not looked at until the file has grown.
    let mut longer = bytes.to_vec();
    longer.resize(bytes.len().max(file.bytes().len()), 0);
    let hidden = checked(&disk(&longer), Repair::Nothing)
        .await
        .map_or(0, |report| report.leaks);
    let report = checked(&file, Repair::Nothing).await.expect("it was sound");
    assert_eq!(report.corruptions, 0, "{report:?}");
    if all_done && flushed.is_ok() && closed.is_ok() {
        // What loses its autoclear bit, since nobody here keeps it up to date, is nobody's from then on.
        let cleared = file.bytes().get(88..96) != bytes.get(88..96);
        assert_eq!(report.check_errors, 0, "{report:?}");
        assert!(report.leaks <= hidden || cleared, "{report:?}");
        let image = opened(&file, &data, false).await.expect("it was sound");
        compare(&image, &known).await;
        let _ = image.close().await;
    }
}

async fn step(image: &Image, random: &mut Random, known: &mut Known) -> Result<(), Errno> {
    let size = image.0.size();
    let (offset, len) = place(size, random);
    let sectors = offset / SECTOR..(offset + len) / SECTOR;
    let mut forget = || {
        for sector in sectors.clone() {
            known.remove(&sector);
        }
    };
    if len == 0 {
        return Ok(());
    }
    let fill = match random.below(10) {
        0..=4 => {
            forget();
            let fill = u8::try_from(random.below(256)).expect("a byte");
            let data = vec![fill; usize::try_from(len).expect("small")];
            image.write(offset, &data).await?;
            fill
        }
        5 | 6 => {
            forget();
            let flags = [ZeroFlags::empty(), ZeroFlags::MAY_UNMAP];
            let flags = flags[usize::from(random.one_in(2))];
            io::write_zeroes(&image.0, offset, len, flags).await?;
            0
        }
        7 => {
            forget();
            return io::discard(&image.0, offset, len).await;
        }
        8 => return image.flush().await,
        _ => {
            let size = match random.below(3) {
                0 => size / 2 / SECTOR * SECTOR,
                1 => (size / 2 + random.below(size)) / SECTOR * SECTOR,
                _ => size.saturating_add(SECTOR * random.below(4096)),
            };
            known.retain(|&sector, _| (sector + 1) * SECTOR <= size);
            return io::truncate(&image.0, size, true, PreallocMode::Off).await;
        }
    };
    known.extend(sectors.map(|sector| (sector, fill)));
    Ok(())
}

async fn compare(image: &Image, known: &Known) {
    for (&sector, &fill) in known {
        let Ok(read) = image.read(sector * SECTOR, 512).await else {
            continue;
        };
        assert!(
            read.iter().all(|&byte| byte == fill),
            "sector {sector:#x} holds {:x?}, not {fill:#x}",
            &read[..8]
        );
    }
}
