//! Many requests at once: writers that share clusters and tables, and fio with its own verification.

use std::thread;

use rand::RngExt;

use crate::needs;
use crate::support::daemon::is_qemu;
use crate::support::disk::{MIB, PLAIN, Setup, Writer, assert_image_is, assert_mount_is};
use crate::support::{Scratch, run_ok};

/// Several writers, each with stripes of its own that share clusters, pages of tables and refcounts with the others'.
fn many_writers(setup: &Setup, stripe: usize, seed: u64) {
    const WRITERS: usize = 4;
    let scratch = Scratch::in_memory();
    let mut disk = setup.make(&scratch);
    let (daemon, mount) = setup.start(&scratch, &disk, ",writable=on");
    let stripes = disk.model.len() / stripe;
    let models = thread::scope(|scope| {
        let threads: Vec<_> = (0..WRITERS)
            .map(|number| {
                let mut model = disk.model.clone();
                let mount = &mount;
                scope.spawn(move || {
                    let mut writer = Writer::open(mount, seed + number as u64);
                    for _ in 0..500 {
                        let own = writer.rng.random_range(0..stripes / WRITERS) * WRITERS + number;
                        writer.act(&mut model, own * stripe..(own + 1) * stripe, stripe);
                    }
                    model
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("the writer found no fault"))
            .collect::<Vec<_>>()
    });
    for index in 0..stripes / WRITERS * WRITERS {
        let range = index * stripe..(index + 1) * stripe;
        disk.model[range.clone()].copy_from_slice(&models[index % WRITERS][range]);
    }
    assert_mount_is(&mount, &disk.model);
    daemon.stop();
    assert_image_is(&scratch, &disk);
}

#[test]
fn many_writers_share_clusters() {
    needs!(root, "qemu-img", "qemu-io");
    if is_qemu() {
        return; // Its parallel writes corrupt data.
    }
    many_writers(&PLAIN, 4096, 200);
    many_writers(
        &Setup {
            create: "cluster_size=2M",
            ..PLAIN
        },
        64 << 10,
        210,
    );
    many_writers(
        &Setup {
            create: "cluster_size=512",
            ..PLAIN
        },
        20 << 10,
        220,
    );
}

#[test]
fn many_writers_of_a_raw_image() {
    needs!(root, "qemu-img");
    if is_qemu() {
        return; // Its parallel writes corrupt data.
    }
    many_writers(
        &Setup {
            format: "raw",
            ..PLAIN
        },
        4096,
        200,
    );
    many_writers(
        &Setup {
            format: "raw",
            protocol: ",aio=io_uring",
            ..PLAIN
        },
        20 << 10,
        205,
    );
}

#[test]
fn many_writers_share_clusters_over_backing_files() {
    needs!(root, "qemu-img", "qemu-io");
    if is_qemu() {
        return; // Its parallel writes corrupt data.
    }
    many_writers(
        &Setup {
            backing: true,
            ..PLAIN
        },
        4096,
        230,
    );
    many_writers(
        &Setup {
            backing: true,
            create: "extended_l2=on",
            ..PLAIN
        },
        4096,
        240,
    );
    many_writers(
        &Setup {
            backing: true,
            node: ",discard=unmap,detect-zeroes=unmap",
            ..PLAIN
        },
        12 << 10,
        250,
    );
}

/// fio's own verification, 16 requests in flight.
fn fio_verifies(setup: &Setup, load: &[&str]) {
    let scratch = Scratch::in_memory();
    let mut disk = setup.make(&scratch);
    let (daemon, mount) = setup.start(&scratch, &disk, ",writable=on");
    let filename = format!("--filename={}", mount.display());
    let size = format!("--size={}", setup.size);
    let mut args = vec![
        "--name=verify",
        "--ioengine=libaio",
        "--iodepth=16",
        "--direct=1",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--verify_dump=0",
        "--verify_state_save=0",
        "--fallocate=none",
        "--randseed=4711",
        &filename,
        &size,
    ];
    args.extend(load);
    run_ok("fio", &args);
    disk.model = std::fs::read(&mount).unwrap();
    daemon.stop();
    assert_image_is(&scratch, &disk);
}

#[test]
fn fio_random_writes_are_verified() {
    needs!(root, "qemu-img", "qemu-io", "fio");
    if is_qemu() {
        return; // Its parallel writes corrupt data.
    }
    let large = Setup {
        size: 64 * MIB,
        ..PLAIN
    };
    fio_verifies(&large, &["--rw=randwrite", "--bs=4k"]);
    fio_verifies(
        &large,
        &["--rw=randwrite", "--bsrange=512-256k", "--bs_unaligned=0"],
    );
    fio_verifies(&large, &["--rw=write", "--bs=1m"]);
    let small_clusters = Setup {
        create: "cluster_size=4096",
        ..large
    };
    fio_verifies(&small_clusters, &["--rw=randwrite", "--bs=16k"]);
}

#[test]
fn fio_random_writes_to_a_raw_image_are_verified() {
    needs!(root, "qemu-img", "fio");
    if is_qemu() {
        return; // Its parallel writes corrupt data.
    }
    let raw = Setup {
        format: "raw",
        size: 64 * MIB,
        ..PLAIN
    };
    fio_verifies(&raw, &["--rw=randwrite", "--bs=4k"]);
    fio_verifies(
        &raw,
        &["--rw=randwrite", "--bsrange=512-256k", "--bs_unaligned=0"],
    );
    fio_verifies(&raw, &["--rw=write", "--bs=1m"]);
}

#[test]
fn fio_random_writes_over_backing_files_are_verified() {
    needs!(root, "qemu-img", "qemu-io", "fio");
    if is_qemu() {
        return; // Its parallel writes corrupt data.
    }
    let backed = Setup {
        backing: true,
        size: 32 * MIB,
        ..PLAIN
    };
    fio_verifies(&backed, &["--rw=randwrite", "--bs=4k"]);
    let subclusters = Setup {
        create: "extended_l2=on,cluster_size=128k",
        ..backed
    };
    fio_verifies(&subclusters, &["--rw=randwrite", "--bs=4k"]);
}

#[test]
fn fio_buffered_and_past_the_cache_is_verified() {
    needs!(root, "qemu-img", "qemu-io", "fio");
    if is_qemu() {
        return; // Its parallel writes corrupt data.
    }
    let setup = Setup {
        size: 32 * MIB,
        ..PLAIN
    };
    fio_verifies(
        &setup,
        &[
            "--rw=randwrite",
            "--bs=8k",
            "--direct=0",
            "--ioengine=psync",
        ],
    );
    fio_verifies(
        &setup,
        &[
            "--rw=randwrite",
            "--bs=4k",
            "--numjobs=4",
            "--thread",
            "--offset_increment=25%",
            "--size=25%",
        ],
    );
}
