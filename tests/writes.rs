//! After any writes, discards and zero writes through the mount the disk holds what a plain model of it holds, and the
//! image is sound: seeded random operations by one writer.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use rand::RngExt;

use crate::needs;
use crate::support::direct::Aligned;
use crate::support::disk::{Disk, MIB, PLAIN, Setup, Writer, assert_image_is, assert_mount_is};
use crate::support::model::{assert_same, noise};
use crate::support::{Scratch, qemu};

/// Random operations by one writer; the daemon is restarted in between, so that nothing hides in its memory.
fn one_writer(setup: &Setup, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let scratch = Scratch::in_memory();
        let mut disk = setup.make(&scratch);
        for part in 0..3 {
            let (daemon, mount) = setup.start(&scratch, &disk, ",writable=on");
            let mut writer = Writer::open(&mount, seed * 10 + part);
            for _ in 0..120 {
                let largest =
                    [600, 5000, 70_000, 300_000, 2_500_000][writer.rng.random_range(0..5)];
                let size = disk.model.len();
                writer.act(&mut disk.model, 0..size, largest);
            }
            assert_mount_is(&mount, &disk.model);
            drop(writer);
            daemon.stop();
            assert_image_is(&scratch, &disk);
        }
    }
}

#[test]
fn one_writer_default_image() {
    needs!(root, "qemu-img", "qemu-io");
    one_writer(&PLAIN, 0..3);
}

#[test]
fn one_writer_smallest_clusters_version_2() {
    needs!(root, "qemu-img", "qemu-io");
    one_writer(
        &Setup {
            create: "compat=0.10,cluster_size=512",
            size: 3 * MIB,
            ..PLAIN
        },
        10..12,
    );
}

#[test]
fn one_writer_largest_clusters() {
    needs!(root, "qemu-img", "qemu-io");
    one_writer(
        &Setup {
            create: "cluster_size=2M",
            size: 21 * MIB,
            ..PLAIN
        },
        20..21,
    );
}

#[test]
fn one_writer_over_backing_files() {
    needs!(root, "qemu-img", "qemu-io");
    one_writer(
        &Setup {
            backing: true,
            ..PLAIN
        },
        30..32,
    );
    one_writer(
        &Setup {
            backing: true,
            create: "compat=0.10,cluster_size=4096",
            ..PLAIN
        },
        32..33,
    );
}

#[test]
fn one_writer_subclusters_over_backing_files() {
    needs!(root, "qemu-img", "qemu-io");
    one_writer(
        &Setup {
            backing: true,
            create: "extended_l2=on,cluster_size=128k",
            ..PLAIN
        },
        40..42,
    );
    one_writer(
        &Setup {
            create: "extended_l2=on,cluster_size=16k",
            ..PLAIN
        },
        42..43,
    );
}

#[test]
fn one_writer_refcount_widths() {
    needs!(root, "qemu-img", "qemu-io");
    for (create, seed) in [
        ("refcount_bits=1,cluster_size=4096", 50),
        ("refcount_bits=4,cluster_size=1024", 51),
        ("refcount_bits=64,cluster_size=4096", 52),
    ] {
        one_writer(
            &Setup {
                create,
                size: 4 * MIB,
                ..PLAIN
            },
            seed..seed + 1,
        );
    }
}

#[test]
fn one_writer_lazy_refcounts_and_zero_detection() {
    needs!(root, "qemu-img", "qemu-io");
    one_writer(
        &Setup {
            create: "lazy_refcounts=on",
            node: ",discard=unmap,detect-zeroes=unmap",
            ..PLAIN
        },
        60..61,
    );
    one_writer(
        &Setup {
            node: ",detect-zeroes=on",
            backing: true,
            ..PLAIN
        },
        61..62,
    );
}

#[test]
fn one_writer_past_the_host_cache() {
    needs!(root, "qemu-img", "qemu-io");
    // The disk and not memory, whose file system may lack O_DIRECT.
    for (protocol, seed) in [
        (",cache.direct=on", 70),
        (",cache.direct=on,aio=native", 71),
        (",cache.direct=on,aio=io_uring", 72),
        (",aio=io_uring", 73),
    ] {
        let setup = Setup {
            protocol,
            size: 4 * MIB,
            ..PLAIN
        };
        let scratch = Scratch::new();
        let mut disk = setup.make(&scratch);
        let (daemon, mount) = setup.start(&scratch, &disk, ",writable=on");
        let mut writer = Writer::open(&mount, seed);
        for _ in 0..150 {
            let size = disk.model.len();
            writer.act(&mut disk.model, 0..size, 100_000);
        }
        assert_mount_is(&mount, &disk.model);
        drop(writer);
        daemon.stop();
        assert_image_is(&scratch, &disk);
    }
}

#[test]
fn one_writer_external_data_file() {
    needs!(root, "qemu-img", "qemu-io");
    one_writer(
        &Setup {
            create: "data_file_raw=off",
            ..PLAIN
        },
        80..81,
    );
    one_writer(
        &Setup {
            create: "data_file_raw=on",
            ..PLAIN
        },
        81..82,
    );
}

#[test]
fn one_writer_raw_image() {
    needs!(root, "qemu-img");
    one_writer(
        &Setup {
            format: "raw",
            ..PLAIN
        },
        90..92,
    );
}

#[test]
fn compressed_clusters_are_written_over() {
    needs!(root, "qemu-img", "qemu-io");
    for compression in ["zlib", "zstd"] {
        let scratch = Scratch::in_memory();
        let model: Vec<u8> = (0..1_200_000_u32)
            .flat_map(|n| format!("{n} ").into_bytes())
            .take(8 * MIB)
            .collect();
        let raw = scratch.file("content.raw", &model);
        let image = scratch.path("disk.qcow2");
        let options = format!("compression_type={compression}");
        let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
        qemu::img(&[&args[..], &[raw.to_str().unwrap(), image.to_str().unwrap()]].concat());
        let mut disk = Disk::of(image, model);
        for part in 0..2 {
            let (daemon, mount) = PLAIN.start(&scratch, &disk, ",writable=on");
            let mut writer = Writer::open(&mount, 100 + part);
            for _ in 0..60 {
                let size = disk.model.len();
                writer.act(&mut disk.model, 0..size, 100_000);
            }
            assert_mount_is(&mount, &disk.model);
            drop(writer);
            daemon.stop();
            assert_image_is(&scratch, &disk);
        }
    }
}

#[test]
fn internal_snapshots_keep_their_content() {
    needs!(root, "qemu-img", "qemu-io");
    for create in ["", "extended_l2=on", "compat=0.10,cluster_size=4096"] {
        let setup = Setup { create, ..PLAIN };
        let scratch = Scratch::in_memory();
        let mut disk = setup.make(&scratch);
        let mut snapshots = Vec::new();
        for part in 0..3 {
            let (daemon, mount) = setup.start(&scratch, &disk, ",writable=on");
            let mut writer = Writer::open(&mount, 110 + part);
            for _ in 0..60 {
                let size = disk.model.len();
                writer.act(&mut disk.model, 0..size, 300_000);
            }
            drop(writer);
            daemon.stop();
            assert_image_is(&scratch, &disk);
            let name = format!("snapshot-{part}");
            qemu::img(&["snapshot", "-c", &name, disk.image.to_str().unwrap()]);
            snapshots.push((name, disk.model.clone()));
        }
        let (daemon, mount) = setup.start(&scratch, &disk, ",writable=on");
        let overwrite = noise(119, disk.model.len());
        OpenOptions::new()
            .write(true)
            .open(&mount)
            .unwrap()
            .write_all_at(&overwrite, 0)
            .unwrap();
        daemon.stop();
        disk.model = overwrite;
        assert_image_is(&scratch, &disk);
        for (name, content) in snapshots {
            let raw = scratch.path("snapshot.raw");
            let image = disk.image.to_str().unwrap();
            qemu::img(&[
                "convert",
                "-l",
                &name,
                "-f",
                "qcow2",
                "-O",
                "raw",
                image,
                raw.to_str().unwrap(),
            ]);
            assert_same(&name, &std::fs::read(&raw).unwrap(), &content);
        }
    }
}

#[test]
fn growing_while_writing() {
    needs!(root, "qemu-img", "qemu-io");
    let setup = Setup {
        create: "cluster_size=4096",
        ..PLAIN
    };
    let scratch = Scratch::in_memory();
    let mut disk = setup.make(&scratch);
    let (daemon, mount) = setup.start(&scratch, &disk, ",writable=on,growable=on");
    let mut writer = Writer::open(&mount, 130);
    for round in 0..40_usize {
        let size = disk.model.len();
        writer.act(&mut disk.model, 0..size, 50_000);
        let size = (8 * MIB + (round * 777_777) % (12 * MIB)) / 512 * 512;
        writer.buffered.set_len(size as u64).unwrap();
        disk.model.resize(size, 0);
        let data = noise(round as u64, 4096);
        writer
            .past_cache
            .write_all_at(Aligned::copy_of(&data).as_ref(), size as u64)
            .unwrap();
        disk.model.extend(data);
    }
    assert_mount_is(&mount, &disk.model);
    drop(writer);
    daemon.stop();
    assert_image_is(&scratch, &disk);
}
