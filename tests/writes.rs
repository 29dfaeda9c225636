//! After any writes, discards and zero writes through the mount the disk holds what a plain model of it holds, and the
//! image is sound: seeded random operations by one writer and by several, and fio with its own verification.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::fcntl::{FallocateFlags, fallocate};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::needs;
use crate::support::daemon::{Daemon, fuse_args, is_qemu};
use crate::support::direct::Aligned;
use crate::support::model::{assert_same, noise, rng};
use crate::support::{Scratch, direct, qemu, run_ok};

const MIB: usize = 1 << 20;

/// What is exported and how.
#[derive(Clone, Copy)]
struct Setup {
    /// Options of `qemu-img create`.
    create: &'static str,
    /// Whether the image lies over two others full of data.
    backing: bool,
    /// Further options of the format node.
    node: &'static str,
    /// Further options of the protocol node.
    protocol: &'static str,
    size: usize,
}

const PLAIN: Setup = Setup {
    create: "",
    backing: false,
    node: ",discard=unmap",
    protocol: "",
    size: 8 * MIB,
};

/// The image with the content that a reader has to find in it.
struct Disk {
    image: PathBuf,
    model: Vec<u8>,
}

impl Setup {
    fn make(&self, scratch: &Scratch) -> Disk {
        let image = scratch.path("disk.qcow2");
        let mut options: Vec<String> = Vec::new();
        let mut model = vec![0; self.size];
        if !self.create.is_empty() {
            options.push(self.create.to_owned());
        }
        if self.create.contains("data_file") {
            options.push(format!("data_file={}", scratch.path("data.raw").display()));
        }
        if self.backing {
            model = noise(17, self.size);
            // The middle image holds every other 200,000 bytes, so that both are read through the chain.
            let base = scratch.file("base.raw", &model);
            let middle = scratch.path("middle.qcow2");
            qemu::create(
                &middle,
                self.size as u64,
                &format!(
                    "cluster_size=4096,backing_file={},backing_fmt=raw",
                    base.display()
                ),
            );
            let mut commands = Vec::new();
            for at in (0..self.size).step_by(400_384) {
                let len = 200_192.min(self.size - at);
                commands.push(format!("write -P {} {at} {len}", at % 251));
                model[at..at + len].fill(u8::try_from(at % 251).unwrap());
            }
            qemu::io(&middle, "qcow2", &commands);
            options.push(format!(
                "backing_file={},backing_fmt=qcow2",
                middle.display()
            ));
        }
        qemu::create(&image, self.size as u64, &options.join(","));
        Disk { image, model }
    }

    fn start(&self, scratch: &Scratch, disk: &Disk, export: &str) -> (Daemon, PathBuf) {
        let mount = scratch.empty_file("mount");
        let mut args = fuse_args(&disk.image, "qcow2", self.node, &mount, export);
        args[1].push_str(self.protocol);
        args[1].push_str(",discard=unmap");
        (Daemon::start(scratch, &args), mount)
    }
}

/// One open mount with the means to do random things to a part of it.
struct Writer {
    buffered: File,
    past_cache: File,
    rng: StdRng,
}

impl Writer {
    fn open(mount: &Path, seed: u64) -> Writer {
        Writer {
            buffered: OpenOptions::new()
                .read(true)
                .write(true)
                .open(mount)
                .unwrap(),
            past_cache: direct::open(mount, true),
            rng: rng(seed),
        }
    }

    /// Does one thing within `part` of the disk, to the mount and to the model; `part` begins and ends at sectors.
    fn act(&mut self, model: &mut [u8], part: std::ops::Range<usize>, largest: usize) {
        // QEMU's daemon corrupts data when the kernel splits a write into several requests.
        let largest = if is_qemu() {
            largest.min(30_000)
        } else {
            largest
        };
        let len = self.rng.random_range(1..=largest.min(part.len()));
        let start = self.rng.random_range(part.start..=part.end - len);
        let range = start..start + len;
        let sectors = start / 512 * 512..range.end.next_multiple_of(512);
        let what = format!("{range:?}");
        match self.rng.random_range(0..100) {
            0..25 => {
                let data = noise(self.rng.random(), len);
                self.buffered
                    .write_all_at(&data, start as u64)
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                model[range].copy_from_slice(&data);
            }
            25..50 => {
                let data = noise(self.rng.random(), sectors.len());
                let aligned = Aligned::copy_of(&data);
                let written = self
                    .past_cache
                    .write_all_at(aligned.as_ref(), sectors.start as u64);
                written.unwrap_or_else(|error| panic!("{sectors:?}: {error}"));
                model[sectors].copy_from_slice(&data);
            }
            50..55 => {
                // Zeroes as data, which the format may store in another way.
                let zeroes = Aligned::zeroed(sectors.len());
                self.past_cache
                    .write_all_at(zeroes.as_ref(), sectors.start as u64)
                    .unwrap();
                model[sectors].fill(0);
            }
            55..70 => {
                let mode = if self.rng.random() {
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE
                } else {
                    FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE
                };
                // Mostly whole blocks as file systems do, sometimes odd bytes.
                let range = if !is_qemu() && self.rng.random_bool(0.3) {
                    range
                } else {
                    let unit = 4096;
                    start.next_multiple_of(unit)..range.end / unit * unit
                };
                if range.start < range.end {
                    let at = i64::try_from(range.start).unwrap();
                    let done = fallocate(
                        &self.buffered,
                        mode,
                        at,
                        i64::try_from(range.len()).unwrap(),
                    );
                    if is_qemu() && done.is_err() {
                        return;
                    }
                    done.unwrap_or_else(|error| panic!("{mode:?} of {range:?}: {error}"));
                    model[range].fill(0);
                }
            }
            70..73 => self.buffered.sync_data().unwrap(),
            73..75 => self.past_cache.sync_all().unwrap(),
            75..88 => {
                let mut got = vec![0; len];
                self.buffered.read_exact_at(&mut got, start as u64).unwrap();
                assert_same(&what, &got, &model[range]);
            }
            _ => {
                let mut got = Aligned::zeroed(sectors.len());
                self.past_cache
                    .read_exact_at(got.as_mut(), sectors.start as u64)
                    .unwrap();
                assert_same(&what, got.as_ref(), &model[sectors]);
            }
        }
    }
}

#[track_caller]
fn assert_mount_is(mount: &Path, model: &[u8]) {
    let file = File::open(mount).unwrap();
    let mut got = vec![0; model.len()];
    file.read_exact_at(&mut got, 0).unwrap();
    assert_same("the mount", &got, model);
    crate::content::assert_holes_are_zero("the mount", &file, model);
}

#[track_caller]
fn assert_image_is(scratch: &Scratch, disk: &Disk) {
    assert_same(
        "the image",
        &qemu::content(scratch, &disk.image, "qcow2"),
        &disk.model,
    );
    qemu::assert_clean(&disk.image);
}

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
    needs!(root);
    let scratch = Scratch::in_memory();
    let mut model = noise(90, 6 * MIB);
    let image = scratch.file("disk.raw", &model);
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(
        &scratch,
        &fuse_args(&image, "raw", ",discard=unmap", &mount, ",writable=on"),
    );
    let mut writer = Writer::open(&mount, 90);
    for _ in 0..400 {
        writer.act(&mut model, 0..6 * MIB, 200_000);
    }
    assert_mount_is(&mount, &model);
    drop(writer);
    daemon.stop();
    assert_same("the image", &std::fs::read(&image).unwrap(), &model);
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
        let mut disk = Disk { image, model };
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
fn fio_verifies(setup: &Setup, export: &str, load: &[&str]) {
    let scratch = Scratch::in_memory();
    let disk = setup.make(&scratch);
    let (daemon, mount) = setup.start(&scratch, &disk, export);
    let filename = format!("--filename={}", mount.display());
    let size = format!("--size={}", setup.size);
    let mut args = vec![
        "--name=verify",
        "--ioengine=libaio",
        "--iodepth=16",
        "--direct=1",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_dump=0",
        "--fallocate=none",
        "--randseed=4711",
        &filename,
        &size,
    ];
    args.extend(load);
    run_ok("fio", &args);
    let through_mount = std::fs::read(&mount).unwrap();
    daemon.stop();
    assert_same(
        "the image",
        &qemu::content(&scratch, &disk.image, "qcow2"),
        &through_mount,
    );
    qemu::assert_clean(&disk.image);
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
    fio_verifies(&large, ",writable=on", &["--rw=randwrite", "--bs=4k"]);
    fio_verifies(
        &large,
        ",writable=on",
        &["--rw=randwrite", "--bsrange=512-256k", "--bs_unaligned=0"],
    );
    fio_verifies(&large, ",writable=on", &["--rw=write", "--bs=1m"]);
    let small_clusters = Setup {
        create: "cluster_size=4096",
        ..large
    };
    fio_verifies(
        &small_clusters,
        ",writable=on",
        &["--rw=randwrite", "--bs=16k"],
    );
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
    fio_verifies(&backed, ",writable=on", &["--rw=randwrite", "--bs=4k"]);
    let subclusters = Setup {
        create: "extended_l2=on,cluster_size=128k",
        ..backed
    };
    fio_verifies(&subclusters, ",writable=on", &["--rw=randwrite", "--bs=4k"]);
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
        ",writable=on",
        &[
            "--rw=randwrite",
            "--bs=8k",
            "--direct=0",
            "--ioengine=psync",
        ],
    );
    fio_verifies(
        &setup,
        ",writable=on",
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
