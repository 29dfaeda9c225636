//! Reading what `qemu-img` and `qemu-io` wrote: every cluster size, both versions, compressed, zero, subclusters, backing chains,
//! snapshots, external data files.

use std::path::Path;

use stord_aio::sim;

use super::harness::{Image, Setup, assert_same, qemu, text};
use crate::testing::{MemoryDisk, Random, node_options};

const SIZE: u64 = 5 * 1024 * 1024 + 512;

/// Makes an image and writes a bit of everything to it.
fn make(path: &Path, options: &str, backing: Option<&Path>) {
    let size = SIZE.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if let Some(backing) = backing {
        args.extend(["-b", text(backing), "-F", "qcow2"]);
    }
    args.extend([text(path), &size]);
    qemu("qemu-img", &args);
    let version_2 = options.contains("compat=0.10");
    let large = ["524288", "1048576", "2097152", "131072", "262144"]
        .iter()
        .any(|size| options.contains(size));
    let mut commands = vec![
        "write -q -P 1 0 4k",
        "write -q -P 2 70k 3k",
        "write -q -P 3 1M 300k",
        "write -q -P 4 2M 1M",
        if version_2 {
            "write -q -P 0 1100k 64k"
        } else {
            "write -q -z 1100k 64k"
        },
        if version_2 {
            "write -q -P 9 0 1k"
        } else {
            "write -q -z -u 2200k 128k"
        },
        "discard -q 2500k 128k",
        "write -q -P 7 5242000 1k",
        "write -q -P 8 1090k 30k",
    ];
    if !large && !options.contains("data_file") {
        commands.extend(["write -q -c -P 5 3M 64k", "write -q -c -P 6 3200k 256k"]);
    }
    let mut args: Vec<&str> = commands
        .iter()
        .flat_map(|command| ["-c", command])
        .collect();
    args.push(text(path));
    qemu("qemu-io", &args);
}

fn raw_content(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("out");
    qemu(
        "qemu-img",
        &["convert", "-O", "raw", text(path), text(&raw)],
    );
    std::fs::read(raw).expect("the converted image")
}

fn disk(path: &Path) -> MemoryDisk {
    MemoryDisk::new(std::fs::read(path).expect("the image"))
}

async fn opened(setup: Setup) -> Image {
    let mut common = node_options();
    common.read_only = true;
    Setup {
        common: Some(common),
        ..setup
    }
    .open()
    .await
    .expect("opens")
}

#[test]
fn reads_every_cluster_size_and_version() {
    let dir = tempfile::tempdir().expect("a directory");
    for bits in 9..=21 {
        for kind in [
            "compat=0.10",
            "compat=1.1",
            "compat=1.1,compression_type=zstd",
            "compat=1.1,extended_l2=on",
        ] {
            if kind.contains("extended_l2") && bits < 14 {
                continue;
            }
            let path = dir.path().join("image.qcow2");
            let options = format!("{kind},cluster_size={}", 1u64 << bits);
            make(&path, &options, None);
            let expected = raw_content(&path);
            let file = disk(&path);
            let ours = sim::run(bits, || async move {
                opened(Setup::new(&file))
                    .await
                    .read_all()
                    .await
                    .expect("reads")
            });
            assert_same(&ours, &expected, &options);
        }
    }
}

/// Bytes that compress, but not to nothing.
fn words(len: usize) -> Vec<u8> {
    let mut random = Random::new(len as u64);
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let word = random.next().to_le_bytes();
        let repeat = usize::try_from(1 + random.below(40)).expect("small");
        bytes.extend(std::iter::repeat_n(word, repeat).flatten());
    }
    bytes.truncate(len);
    bytes
}

#[test]
fn reads_compressed_images() {
    let dir = tempfile::tempdir().expect("a directory");
    let raw = dir.path().join("raw");
    let expected = words(3 * 1024 * 1024 + 4096);
    std::fs::write(&raw, &expected).expect("writes");
    for bits in 9..=21 {
        for kind in ["zlib", "zstd"] {
            let path = dir.path().join("image.qcow2");
            let options = format!("compression_type={kind},cluster_size={}", 1u64 << bits);
            qemu(
                "qemu-img",
                &[
                    "convert",
                    "-c",
                    "-f",
                    "raw",
                    "-O",
                    "qcow2",
                    "-o",
                    &options,
                    text(&raw),
                    text(&path),
                ],
            );
            let file = disk(&path);
            let ours = sim::run(bits, || async move {
                opened(Setup::new(&file))
                    .await
                    .read_all()
                    .await
                    .expect("reads")
            });
            assert_same(&ours, &expected, &options);
        }
    }
}

#[test]
fn reads_a_chain_of_three() {
    let dir = tempfile::tempdir().expect("a directory");
    let paths: Vec<_> = ["base", "middle", "top"]
        .iter()
        .map(|name| dir.path().join(name))
        .collect();
    make(&paths[0], "compat=1.1", None);
    make(&paths[1], "compat=0.10,cluster_size=4k", Some(&paths[0]));
    make(
        &paths[2],
        "compat=1.1,cluster_size=32k,extended_l2=on",
        Some(&paths[1]),
    );
    let expected = raw_content(&paths[2]);
    let files: Vec<_> = paths.iter().map(|path| disk(path)).collect();
    let ours = sim::run(1, || async move {
        let mut backing = None;
        for file in files {
            let setup = Setup {
                backing: backing.take(),
                ..Setup::new(&file)
            };
            backing = Some(opened(setup).await.0);
        }
        Image(backing.expect("three images"))
            .read_all()
            .await
            .expect("reads")
    });
    assert_same(&ours, &expected, "chain");
}

#[test]
fn reads_beside_internal_snapshots() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image.qcow2");
    make(&path, "compat=1.1", None);
    qemu("qemu-img", &["snapshot", "-c", "first", text(&path)]);
    qemu(
        "qemu-io",
        &[
            "-c",
            "write -q -P 17 100k 300k",
            "-c",
            "write -q -c -P 18 4M 64k",
            text(&path),
        ],
    );
    qemu("qemu-img", &["snapshot", "-c", "second", text(&path)]);
    qemu("qemu-io", &["-c", "write -q -P 19 0 30k", text(&path)]);
    let expected = raw_content(&path);
    let file = disk(&path);
    let (ours, names) = sim::run(1, || async move {
        let image = opened(Setup::new(&file)).await;
        let snapshots = image.format().info().snapshots.expect("two snapshots");
        let names: Vec<_> = snapshots
            .into_iter()
            .map(|snapshot| (snapshot.id, snapshot.name))
            .collect();
        (image.read_all().await.expect("reads"), names)
    });
    assert_same(&ours, &expected, "beside snapshots");
    let expected =
        [("1", "first"), ("2", "second")].map(|(id, name)| (id.to_owned(), name.to_owned()));
    assert_eq!(names, expected);
}

#[test]
fn reads_an_external_data_file() {
    let dir = tempfile::tempdir().expect("a directory");
    for raw in ["off", "on"] {
        let path = dir.path().join("image.qcow2");
        let data = dir.path().join("data");
        let _ = std::fs::remove_file(&data);
        let options = format!("data_file={},data_file_raw={raw}", text(&data));
        make(&path, &options, None);
        let expected = raw_content(&path);
        let file = disk(&path);
        let data = disk(&data);
        let ours = sim::run(1, || async move {
            let setup = Setup {
                data_file: Some(data),
                ..Setup::new(&file)
            };
            opened(setup).await.read_all().await.expect("reads")
        });
        assert_same(&ours, &expected, &options);
    }
}

#[test]
fn reads_with_a_cache_of_one_set() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image.qcow2");
    make(&path, "cluster_size=512", None);
    let expected = raw_content(&path);
    let file = disk(&path);
    let ours = sim::run(1, || async move {
        let mut options = super::harness::defaults();
        options.l2_cache_size = Some(512);
        options.l2_cache_entry_size = Some(512);
        let setup = Setup {
            options: Some(options),
            ..Setup::new(&file)
        };
        opened(setup).await.read_all().await.expect("reads")
    });
    assert_same(&ours, &expected, "small cache");
}
