//! What the mount shows equals what qemu-img reads, for every kind of qcow2 image that qemu-img makes.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rand::RngExt;

use crate::needs;
use crate::support::daemon::{Daemon, fuse_args};
use crate::support::disk::assert_holes_are_zero;
use crate::support::model::{assert_same, noise, rng};
use crate::support::{Scratch, direct, qemu};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Writes data, zeroes, discards and leaves holes, at sizes around the cluster and across its bounds.
fn fill(image: &Path, size: u64, cluster: u64, seed: u64) {
    let mut rng = rng(seed);
    let mut commands = Vec::new();
    for _ in 0..24 {
        let len = (rng.random_range(1..=3 * cluster).min(size / 4)).next_multiple_of(512);
        let at = rng.random_range(0..=(size - len) / 512) * 512;
        let pattern = rng.random_range(1..=255_u8);
        commands.push(match rng.random_range(0..6) {
            0 => format!("write -z {at} {len}"),
            1 => format!("write -z -u {at} {len}"),
            2 => format!("discard {at} {len}"),
            _ => format!("write -P {pattern} {at} {len}"),
        });
    }
    // The last sector and the first cluster always hold something.
    commands.push(format!("write -P 77 {} 512", size - 512));
    commands.push(format!("write -P 78 0 {}", cluster.min(size)));
    qemu::io(image, "qcow2", &commands);
}

/// Exports the image read-only and compares everything a reader can see with the oracle.
#[track_caller]
fn assert_reads_like_qemu_img(scratch: &Scratch, image: &Path) {
    let wanted = qemu::content(scratch, image, "qcow2");
    let mountpoint = scratch.empty_file("mount");
    let daemon = Daemon::start(
        scratch,
        &fuse_args(image, "qcow2", ",read-only=on", &mountpoint, ""),
    );
    let what = image.file_name().unwrap().to_string_lossy().into_owned();

    let mut got = Vec::new();
    File::open(&mountpoint)
        .unwrap()
        .read_to_end(&mut got)
        .unwrap();
    assert_same(&what, &got, &wanted);

    // Small and odd pieces, in no order, buffered and direct.
    let buffered = File::open(&mountpoint).unwrap();
    let past_cache = direct::open(&mountpoint, false);
    let mut rng = rng(wanted.len() as u64);
    for _ in 0..200 {
        let at = rng.random_range(0..wanted.len());
        let len = rng.random_range(1..=100_000).min(wanted.len() - at);
        let mut piece = vec![0; len];
        buffered.read_exact_at(&mut piece, at as u64).unwrap();
        assert_same(
            &format!("{what}: {len} bytes at {at}"),
            &piece,
            &wanted[at..at + len],
        );

        let at = at / 4096 * 4096;
        let mut piece = direct::Aligned::zeroed(8192);
        let count = past_cache.read_at(piece.as_mut(), at as u64).unwrap();
        let end = wanted.len().min(at + 8192);
        assert_same(
            &format!("{what}: direct at {at}"),
            &piece.as_ref()[..count],
            &wanted[at..end],
        );
    }

    assert_holes_are_zero(&what, &buffered, &wanted);
    daemon.stop();
}

fn every_cluster_size(options: &str) {
    for shift in 9..=21 {
        let cluster = 1_u64 << shift;
        let scratch = Scratch::in_memory();
        let image = scratch.path(&format!("{options},cluster_size={cluster}"));
        // Not a multiple of the cluster, and for small clusters more than one table.
        let size = (20 * cluster).clamp(3 * MIB, 24 * MIB) + 1536;
        qemu::create(&image, size, &format!("{options},cluster_size={cluster}"));
        fill(&image, size, cluster, shift);
        assert_reads_like_qemu_img(&scratch, &image);
    }
}

#[test]
fn version_3_of_every_cluster_size() {
    needs!(root, "qemu-img", "qemu-io");
    every_cluster_size("compat=1.1");
}

#[test]
fn version_2_of_every_cluster_size() {
    needs!(root, "qemu-img", "qemu-io");
    every_cluster_size("compat=0.10");
}

#[test]
fn extended_l2_entries() {
    needs!(root, "qemu-img", "qemu-io");
    for cluster in [16 * KIB, 64 * KIB, 128 * KIB, 2 * MIB] {
        let scratch = Scratch::in_memory();
        let base = scratch.path("base.qcow2");
        let image = scratch.path(&format!("extended-l2-{cluster}"));
        let size = (12 * cluster).max(3 * MIB) + 512;
        qemu::create(&base, size, "");
        qemu::io(&base, "qcow2", &[format!("write -P 9 0 {size}")]);
        qemu::create(
            &image,
            size,
            &format!(
                "extended_l2=on,cluster_size={cluster},backing_file={},backing_fmt=qcow2",
                base.display()
            ),
        );
        // Pieces of the size of a subcluster, so that one cluster holds data, zeroes and holes to the backing file.
        fill(&image, size, cluster / 32, cluster);
        fill(&image, size, cluster / 4, cluster + 1);
        assert_reads_like_qemu_img(&scratch, &image);
    }
}

#[test]
fn every_refcount_width() {
    needs!(root, "qemu-img", "qemu-io");
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let scratch = Scratch::in_memory();
        let image = scratch.path(&format!("refcount-bits-{bits}"));
        qemu::create(
            &image,
            4 * MIB,
            &format!("refcount_bits={bits},cluster_size=4096"),
        );
        fill(&image, 4 * MIB, 4096, bits);
        assert_reads_like_qemu_img(&scratch, &image);
    }
}

/// A chain of `base`, `middle` and `top`; each is longer than the one below and holds data of its own.
fn chain(scratch: &Scratch, base_format: &str) -> PathBuf {
    let base = scratch.path("base");
    let middle = scratch.path("middle.qcow2");
    let top = scratch.path("top.qcow2");
    let size = 6 * MIB + 512;
    let base_size = (2 * MIB + 1024).to_string();
    qemu::img(&[
        "create",
        "-q",
        "-f",
        base_format,
        base.to_str().unwrap(),
        &base_size,
    ]);
    qemu::io(&base, base_format, &[format!("write -P 1 0 {base_size}")]);
    let backing = |file: &str, format: &str| format!("backing_file={file},backing_fmt={format}");
    // Names relative to the directory of the image that mentions them.
    qemu::create(
        &middle,
        4 * MIB,
        &(backing("base", base_format) + ",cluster_size=4096"),
    );
    fill(&middle, 4 * MIB, 4096, 11);
    qemu::create(&top, size, &backing("middle.qcow2", "qcow2"));
    let holes = [
        "write -P 3 64k 64k",
        "write -z 192k 256k",
        "discard 1M 128k",
        "write -P 4 1000k 1k",
    ];
    qemu::io(&top, "qcow2", &holes.map(str::to_owned));
    top
}

#[test]
fn backing_chain_of_three() {
    needs!(root, "qemu-img", "qemu-io");
    for base_format in ["raw", "qcow2"] {
        let scratch = Scratch::in_memory();
        let top = chain(&scratch, base_format);
        assert_reads_like_qemu_img(&scratch, &top);
    }
}

#[test]
fn compressed_clusters() {
    needs!(root, "qemu-img", "qemu-io");
    for compression in ["zlib", "zstd"] {
        for cluster in [512, 4 * KIB, 64 * KIB, 2 * MIB] {
            let scratch = Scratch::in_memory();
            // Text packs well, noise does not pack at all and is then stored as it is, zeroes become a hole.
            let mut content: Vec<u8> = (0..400_000)
                .flat_map(|n: u32| format!("{n} ").into_bytes())
                .collect();
            content.extend(noise(5, 300_000));
            content.resize(content.len() + 500_000, 0);
            content.extend(noise(6, 1000).repeat(500));
            content.truncate(content.len() / 512 * 512);
            let raw = scratch.file("content.raw", &content);
            let image = scratch.path(&format!("{compression}-{cluster}"));
            let options = format!("compression_type={compression},cluster_size={cluster}");
            qemu::img(&[
                "convert",
                "-c",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                &options,
                raw.to_str().unwrap(),
                image.to_str().unwrap(),
            ]);
            // Plain clusters between the packed ones.
            qemu::io(&image, "qcow2", &[format!("write -P 5 {} 3k", 100 * KIB)]);
            assert_reads_like_qemu_img(&scratch, &image);
        }
    }
}

#[test]
fn internal_snapshots() {
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::in_memory();
    let image = scratch.path("snapshots.qcow2");
    qemu::create(&image, 8 * MIB, "");
    for round in 0..3 {
        fill(&image, 8 * MIB, 64 * KIB, round);
        qemu::img(&[
            "snapshot",
            "-c",
            &format!("snapshot {round}"),
            image.to_str().unwrap(),
        ]);
    }
    fill(&image, 8 * MIB, 64 * KIB, 99);
    assert_reads_like_qemu_img(&scratch, &image);
}

#[test]
fn external_data_file() {
    needs!(root, "qemu-img", "qemu-io");
    for raw in ["on", "off"] {
        let scratch = Scratch::in_memory();
        let image = scratch.path("metadata.qcow2");
        let data = scratch.path("data.raw");
        let options = format!("data_file={},data_file_raw={raw}", data.display());
        qemu::create(&image, 5 * MIB, &options);
        fill(&image, 5 * MIB, 64 * KIB, 21);
        assert_reads_like_qemu_img(&scratch, &image);
    }
}

#[test]
fn preallocated_images() {
    needs!(root, "qemu-img", "qemu-io");
    for preallocation in ["metadata", "falloc", "full"] {
        let scratch = Scratch::in_memory();
        let image = scratch.path(preallocation);
        qemu::create(&image, 5 * MIB, &format!("preallocation={preallocation}"));
        qemu::io(&image, "qcow2", &["write -P 8 1M 100k".to_owned()]);
        assert_reads_like_qemu_img(&scratch, &image);
    }
}

#[test]
fn raw_image_with_offset_and_size() {
    needs!(root);
    let scratch = Scratch::in_memory();
    let content = noise(3, 3 << 20);
    let image = scratch.file("disk.raw", &content);
    let mountpoint = scratch.empty_file("mount");
    let daemon = Daemon::start(
        &scratch,
        &fuse_args(&image, "raw", ",offset=512,size=1049088", &mountpoint, ""),
    );
    let mut got = Vec::new();
    File::open(&mountpoint)
        .unwrap()
        .read_to_end(&mut got)
        .unwrap();
    assert_same("the window", &got, &content[512..512 + 1_049_088]);
    daemon.stop();
}
