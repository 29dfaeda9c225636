//! Races: requests that meet in one cluster, with the disk holding chosen requests back so that they meet in the worst moment.

use std::cell::Cell;
use std::rc::Rc;

use stord_aio::{Errno, sim, spawn_local, yield_now};
use stord_qmp::schema::create::PreallocMode;

use super::harness::{Image, Setup, assert_same, created};
use super::made::{Kind, Made, assert_consistent, check};
use crate::driver::ZeroFlags;
use crate::io;
use crate::testing::{Fault, MemoryDisk};

const CLUSTER: u64 = 4096;
const CLUSTER_BYTES: usize = 4096;
const SIZE: usize = 1 << 20;
const SEEDS: u64 = 10;

fn disk() -> MemoryDisk {
    MemoryDisk::new(created("cluster_size=4k", &SIZE.to_string()))
}

async fn opened(disk: &MemoryDisk) -> Image {
    Setup::new(disk).open().await.expect("opens")
}

/// Runs `work` as a task; the flag says whether it has ended.
fn start(work: impl Future<Output = ()> + 'static) -> Rc<Cell<bool>> {
    let ended = Rc::new(Cell::new(false));
    let flag = Rc::clone(&ended);
    spawn_local(async move {
        work.await;
        flag.set(true);
    });
    ended
}

async fn until(ended: &Cell<bool>) {
    while !ended.get() {
        yield_now().await;
    }
}

async fn a_while() {
    for _ in 0..200 {
        yield_now().await;
    }
}

async fn closed(image: Image, disk: &MemoryDisk, what: &str) {
    let content = image.read_all().await.expect("reads");
    image.close().await.expect("closes");
    check(&disk.bytes(), &content, what);
}

#[test]
fn write_to_reused_cluster_hides_old_data() {
    for seed in 0..SEEDS {
        sim::run(seed, || async move {
            let disk = disk();
            let image = opened(&disk).await;
            image
                .write(0, &[0xaa; 8 * CLUSTER_BYTES])
                .await
                .expect("writes");
            image.flush().await.expect("flushes");
            io::discard(&image.0, 0, 8 * CLUSTER)
                .await
                .expect("discards");
            image.flush().await.expect("flushes");
            let before = disk.len();
            for cluster in 0..8 {
                image
                    .write(SIZE as u64 / 2 + cluster * CLUSTER + 512, &[0xbb; 512])
                    .await
                    .expect("writes");
            }
            let mut expected = vec![0; CLUSTER_BYTES];
            expected[512..1024].fill(0xbb);
            for cluster in 0..8 {
                let read = image
                    .read(SIZE as u64 / 2 + cluster * CLUSTER, CLUSTER_BYTES)
                    .await
                    .expect("reads");
                assert_same(&read, &expected, "a reused cluster");
            }
            assert!(
                disk.len() <= before + CLUSTER,
                "the discarded space was not used again"
            );
            closed(image, &disk, "after reuse").await;
        });
    }
}

#[test]
fn read_in_flight_never_sees_who_got_its_cluster() {
    for seed in 0..SEEDS {
        sim::run(seed, || async move {
            let disk = disk();
            let image = opened(&disk).await;
            image
                .write(0, &[0xaa; CLUSTER_BYTES])
                .await
                .expect("writes");
            image.flush().await.expect("flushes");
            disk.hold(|kind, _, len| kind == Fault::Read && len == CLUSTER);
            let reader = image.clone();
            let ended = start(async move {
                let read = reader.read(0, CLUSTER_BYTES).await.expect("reads");
                assert!(
                    read.iter().all(|&byte| byte == 0xaa || byte == 0),
                    "other data shows"
                );
            });
            disk.wait_held(1).await;
            io::discard(&image.0, 0, CLUSTER).await.expect("discards");
            image.flush().await.expect("flushes");
            image
                .write(SIZE as u64 / 2, &[0xbb; 4 * CLUSTER_BYTES])
                .await
                .expect("writes");
            disk.release();
            until(&ended).await;
            closed(image, &disk, "after the read").await;
        });
    }
}

#[test]
fn overwrite_in_flight_does_not_hit_who_got_its_cluster() {
    for seed in 0..SEEDS {
        sim::run(seed, || async move {
            let disk = disk();
            let image = opened(&disk).await;
            image
                .write(0, &[0xaa; CLUSTER_BYTES])
                .await
                .expect("writes");
            image.flush().await.expect("flushes");
            disk.hold(|kind, _, len| kind == Fault::Write && len == 512);
            let writer = image.clone();
            let ended = start(async move { writer.write(0, &[0xcc; 512]).await.expect("writes") });
            disk.wait_held(1).await;
            io::discard(&image.0, 0, CLUSTER).await.expect("discards");
            image.flush().await.expect("flushes");
            image
                .write(SIZE as u64 / 2, &[0xbb; 4 * CLUSTER_BYTES])
                .await
                .expect("writes");
            disk.release();
            until(&ended).await;
            let read = image
                .read(SIZE as u64 / 2, 4 * CLUSTER_BYTES)
                .await
                .expect("reads");
            assert_same(&read, &[0xbb; 4 * CLUSTER_BYTES], "who got the cluster");
            closed(image, &disk, "after the overwrite").await;
        });
    }
}

#[test]
fn discard_in_flight_does_not_hit_who_got_its_cluster() {
    for seed in 0..SEEDS {
        for unmap in [false, true] {
            sim::run(seed, || async move {
                let disk = disk();
                let image = opened(&disk).await;
                image
                    .write(0, &[0xaa; CLUSTER_BYTES])
                    .await
                    .expect("writes");
                image.flush().await.expect("flushes");
                disk.hold(|kind, _, _| kind == Fault::Discard);
                let discarder = image.clone();
                let ended = start(async move {
                    if unmap {
                        io::write_zeroes(&discarder.0, 0, CLUSTER, ZeroFlags::MAY_UNMAP)
                            .await
                            .expect("zeroes");
                    } else {
                        io::discard(&discarder.0, 0, CLUSTER)
                            .await
                            .expect("discards");
                    }
                });
                disk.wait_held(1).await;
                // Something that a flush has to bring to disk.
                image
                    .write(10 * CLUSTER, &[0xcc; 512])
                    .await
                    .expect("writes");
                image.flush().await.expect("flushes");
                image
                    .write(SIZE as u64 / 2, &[0xbb; 4 * CLUSTER_BYTES])
                    .await
                    .expect("writes");
                disk.release();
                until(&ended).await;
                let read = image
                    .read(SIZE as u64 / 2, 4 * CLUSTER_BYTES)
                    .await
                    .expect("reads");
                assert_same(&read, &[0xbb; 4 * CLUSTER_BYTES], "who got the cluster");
                closed(image, &disk, "after the discard").await;
            });
        }
    }
}

/// The rest of a cluster that is copied for a small write must not undo another write to it.
#[test]
fn copies_around_a_write_do_not_undo_writes_beside_it() {
    // Compressed, so that the first write copies the whole cluster.
    let compressed = compressed_image();
    for seed in 0..SEEDS {
        let disk = MemoryDisk::new(compressed.clone());
        sim::run(seed, || async move {
            let image = opened(&disk).await;
            disk.hold(|kind, _, _| kind == Fault::Read);
            let writers: Vec<_> = (0..8u8)
                .map(|part| {
                    let image = image.clone();
                    start(async move {
                        image
                            .write(u64::from(part) * 512, &[part + 1; 100])
                            .await
                            .expect("writes");
                    })
                })
                .collect();
            disk.wait_held(1).await;
            disk.release();
            for ended in &writers {
                until(ended).await;
            }
            let expected: Vec<u8> = (0..8u8)
                .flat_map(|part| [vec![part + 1; 100], vec![0x77; 412]].concat())
                .collect();
            assert_same(
                &image.read(0, CLUSTER_BYTES).await.expect("reads"),
                &expected,
                "the cluster",
            );
            image.close().await.expect("closes");
        });
    }
}

/// An image whose first cluster is compressed.
fn compressed_image() -> Vec<u8> {
    let kind = Kind {
        options: "cluster_size=4k",
        size: SIZE as u64,
        filled: &["write -q -c -P 0x77 0 4k"],
        ..Kind::default()
    };
    Made::new(&kind).file.bytes()
}

#[test]
fn writes_go_on_while_the_image_changes_its_length() {
    for seed in 0..SEEDS {
        sim::run(seed, || async move {
            let disk = disk();
            let image = opened(&disk).await;
            image
                .write(0, &[0xaa; 16 * CLUSTER_BYTES])
                .await
                .expect("writes");
            // Metadata and header of the resize wait for the writes, which come in between.
            disk.hold(|kind, _, _| kind == Fault::Flush);
            let (resizer, to) = (image.clone(), 8 * SIZE as u64 * (seed % 2) + 64 * 1024);
            let resized = start(async move {
                io::truncate(&resizer.0, to, true, PreallocMode::Off)
                    .await
                    .expect("resizes");
            });
            disk.wait_held(1).await;
            for cluster in 0..16 {
                let fill = [u8::try_from(cluster).expect("a byte"); 700];
                image
                    .write(cluster * CLUSTER + 100, &fill)
                    .await
                    .expect("writes");
            }
            disk.release();
            until(&resized).await;
            for cluster in 0..16 {
                let read = image
                    .read(cluster * CLUSTER + 100, 700)
                    .await
                    .expect("reads");
                assert!(read.iter().all(|&byte| u64::from(byte) == cluster));
            }
            closed(image, &disk, "after the resize").await;
        });
    }
}

#[test]
fn writes_to_one_new_cluster_allocate_it_once() {
    for seed in 0..SEEDS {
        sim::run(seed, || async move {
            let disk = disk();
            let image = opened(&disk).await;
            image
                .write(SIZE as u64 / 2, &[1; 512])
                .await
                .expect("writes");
            let before = disk.len();
            let writers: Vec<_> = (0..8u8)
                .map(|part| {
                    let image = image.clone();
                    start(async move {
                        image
                            .write(u64::from(part) * 512, &[part + 1; 512])
                            .await
                            .expect("writes");
                    })
                })
                .collect();
            for ended in &writers {
                until(ended).await;
            }
            let expected: Vec<u8> = (0..8u8).flat_map(|part| [part + 1; 512]).collect();
            assert_same(
                &image.read(0, CLUSTER_BYTES).await.expect("reads"),
                &expected,
                "the cluster",
            );
            assert!(disk.len() <= before + 2 * CLUSTER);
            closed(image, &disk, "after the writes").await;
        });
    }
}

#[test]
fn discard_and_zeroes_wait_for_an_allocation_in_flight() {
    for seed in 0..SEEDS {
        for discard in [true, false] {
            sim::run(seed, || async move {
                let disk = disk();
                let image = opened(&disk).await;
                disk.hold(|kind, offset, _| kind == Fault::Write && offset >= CLUSTER);
                let writer = image.clone();
                let written = start(async move {
                    writer
                        .write(0, &[0xaa; CLUSTER_BYTES])
                        .await
                        .expect("writes");
                });
                disk.wait_held(1).await;
                let other = image.clone();
                let gone = start(async move {
                    if discard {
                        io::discard(&other.0, 0, CLUSTER).await.expect("discards");
                    } else {
                        io::write_zeroes(&other.0, 0, CLUSTER, ZeroFlags::MAY_UNMAP)
                            .await
                            .expect("zeroes");
                    }
                });
                a_while().await;
                assert!(!gone.get(), "it did not wait");
                disk.release();
                until(&written).await;
                until(&gone).await;
                closed(image, &disk, "after both").await;
            });
        }
    }
}

#[test]
fn failed_write_gives_its_cluster_back() {
    for seed in 0..SEEDS {
        sim::run(seed, || async move {
            let disk = disk();
            let image = opened(&disk).await;
            image
                .write(SIZE as u64 / 2, &[1; 512])
                .await
                .expect("writes");
            disk.fail(|kind, _, _| (kind == Fault::Write).then_some(Errno::EIO));
            assert_eq!(
                image.write(0, &[0xaa; 3 * CLUSTER_BYTES]).await,
                Err(Errno::EIO)
            );
            disk.heal();
            assert_same(
                &image.read(0, CLUSTER_BYTES).await.expect("reads"),
                &[0; CLUSTER_BYTES],
                "nothing was written",
            );
            closed(image, &disk, "after the failure").await;
        });
    }
}

#[test]
fn change_during_a_flush_is_not_lost() {
    for seed in 0..SEEDS {
        sim::run(seed, || async move {
            let disk = disk();
            let image = opened(&disk).await;
            image.write(0, &[0xaa; 512]).await.expect("writes");
            let flushes = Cell::new(0);
            // Metadata is written between two flushes.
            disk.hold(move |kind, _, _| {
                flushes.set(flushes.get() + u32::from(kind == Fault::Flush));
                kind == Fault::Write && flushes.get() > 0
            });
            let flusher = image.clone();
            let flushed = start(async move { flusher.flush().await.expect("flushes") });
            a_while().await;
            let writer = image.clone();
            let written =
                start(async move { writer.write(CLUSTER, &[0xbb; 512]).await.expect("writes") });
            a_while().await;
            disk.release();
            until(&flushed).await;
            until(&written).await;
            image.flush().await.expect("flushes");
            let reopened = opened(&MemoryDisk::new(disk.bytes())).await;
            assert_same(
                &reopened.read(0, 512).await.expect("reads"),
                &[0xaa; 512],
                "before the flush",
            );
            assert_same(
                &reopened.read(CLUSTER, 512).await.expect("reads"),
                &[0xbb; 512],
                "during the flush",
            );
            closed(image, &disk, "after both").await;
        });
    }
}

#[test]
fn failed_flush_can_be_repeated() {
    for seed in 0..SEEDS {
        sim::run(seed, || async move {
            let disk = disk();
            let image = opened(&disk).await;
            for cluster in 0..100 {
                image
                    .write(cluster * 2 * CLUSTER, &[0xaa; 512])
                    .await
                    .expect("writes");
            }
            let mut left = seed % 4;
            disk.fail(move |kind, _, _| {
                let fails = kind != Fault::Read && left == 0;
                left = left.saturating_sub(1);
                fails.then_some(Errno::EIO)
            });
            assert_eq!(image.flush().await, Err(Errno::EIO));
            disk.heal();
            image.flush().await.expect("flushes");
            let reopened = opened(&MemoryDisk::new(disk.bytes())).await;
            for cluster in 0..100 {
                let read = reopened
                    .read(cluster * 2 * CLUSTER, 512)
                    .await
                    .expect("reads");
                assert_same(&read, &[0xaa; 512], "flushed at last");
            }
            closed(image, &disk, "after the failure").await;
        });
    }
}

/// The header that names the new refcount table is late: nothing may be written to where the old one is.
#[test]
fn old_refcount_table_stays_until_the_header_names_the_new_one() {
    let empty = created("cluster_size=512,refcount_bits=64", "4M");
    for seed in 0..3 {
        let disk = MemoryDisk::new(empty.clone());
        sim::run(seed, || async move {
            let image = opened(&disk).await;
            disk.hold(|kind, offset, _| kind == Fault::Write && offset == 0);
            // More than a table of one cluster can count.
            let fillers: Vec<_> = (0..9)
                .map(|part| {
                    let filler = image.clone();
                    start(async move {
                        let fill = vec![0xaa; 256 << 10];
                        filler
                            .write(part * (256 << 10), &fill)
                            .await
                            .expect("writes");
                        filler.flush().await.expect("flushes");
                    })
                })
                .collect();
            disk.wait_held(1).await;
            for _ in 0..20 {
                a_while().await;
            }
            // All has arrived but the header.
            assert_consistent(&disk.bytes(), "without the header", true);
            disk.release();
            for filled in &fillers {
                until(filled).await;
            }
            closed(image, &disk, "with the header").await;
        });
    }
}

/// The L1 table moves, and then the header cannot be written: the length that is tried next must find room in the table that is there.
#[test]
fn change_of_length_that_failed_can_be_repeated() {
    let empty = created("cluster_size=512", "64k");
    for seed in 0..SEEDS {
        let disk = MemoryDisk::new(empty.clone());
        sim::run(seed, || async move {
            let image = opened(&disk).await;
            image.write(0, &[0xaa; 4096]).await.expect("writes");
            disk.fail(|kind, offset, _| {
                (kind == Fault::Write && offset == 0).then_some(Errno::EIO)
            });
            let grow = |size| io::truncate(&image.0, size, true, PreallocMode::Off);
            assert_eq!(grow(1 << 20).await, Err(Errno::EIO));
            assert_eq!(image.0.size(), 64 << 10);
            disk.heal();
            image.write(8192, &[0xbb; 4096]).await.expect("writes");
            grow(1 << 19).await.expect("resizes");
            image
                .write((1 << 19) - 512, &[0xcc; 512])
                .await
                .expect("writes");
            let content = image.read_all().await.expect("reads");
            image.close().await.expect("closes");
            // The place that the table was to move to is lost.
            assert_consistent(&disk.bytes(), "after the second attempt", true);
            let reopened = opened(&disk).await;
            assert_same(
                &reopened.read_all().await.expect("reads"),
                &content,
                "opened anew",
            );
        });
    }
}
