//! Compressed writes over many kinds of images: mixed with all other changes, refused where they must be, cut off anywhere, failing
//! anywhere. QEMU checks the image and reads the content.

use stord_aio::{Errno, IoBuffer, sim};

use super::super::check::{Repair, check_children};
use super::harness::{Image, Setup, assert_same, created, qemu, text};
use crate::driver::{FILE, ZeroFlags};
use crate::graph::Children;
use crate::io;
use crate::testing::{Journal, MemoryDisk, Random, after_power_cut, leaf};

const KINDS: [&str; 9] = [
    "cluster_size=4k",
    "cluster_size=4k,compression_type=zstd",
    "cluster_size=512",
    "cluster_size=64k",
    "cluster_size=2M",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=4k,compat=0.10",
    "cluster_size=16k,extended_l2=on,lazy_refcounts=on",
];

fn cluster_of(options: &str) -> u64 {
    let value = options.trim_start_matches("cluster_size=");
    let digits: String = value.chars().take_while(char::is_ascii_digit).collect();
    let number: u64 = digits.parse().unwrap();
    match value.as_bytes().get(digits.len()) {
        Some(b'k') => number << 10,
        Some(b'M') => number << 20,
        _ => number,
    }
}

async fn write_compressed(image: &Image, offset: u64, data: &[u8]) -> Result<(), Errno> {
    io::write_compressed(&image.0, offset, IoBuffer::copy_of(data).into()).await
}

/// Content that gets smaller, or not, or much.
fn content(random: &mut Random, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let kind = random.below(4);
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = match kind {
            0 => 7,
            1 => (random.next() % 251).to_le_bytes()[0],
            _ if at % 3 == 0 => (random.next() % 7).to_le_bytes()[0],
            _ => 0x55,
        };
    }
    bytes
}

fn judged(bytes: &[u8], model: &[u8], what: &str) -> serde_json::Value {
    let dir = tempfile::tempdir().expect("a directory");
    let (image, raw) = (dir.path().join("image"), dir.path().join("raw"));
    std::fs::write(&image, bytes).expect("room");
    let convert = [
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        text(&image),
        text(&raw),
    ];
    qemu("qemu-img", &convert);
    assert_same(&std::fs::read(&raw).expect("the content"), model, what);
    let report = qemu(
        "qemu-img",
        &["check", "-f", "qcow2", "--output=json", text(&image)],
    );
    serde_json::from_str(&report).expect("JSON")
}

async fn step(image: &Image, random: &mut Random, model: &mut [u8], cluster: u64) {
    let size = model.len() as u64;
    let clusters = size.div_ceil(cluster);
    let first = random.below(clusters);
    let count = 1 + random.below(5.min(clusters - first));
    let (start, end) = (first * cluster, size.min((first + count) * cluster));
    let range =
        |start: u64, end: u64| usize::try_from(start).unwrap()..usize::try_from(end).unwrap();
    match random.below(8) {
        0..=3 => {
            let data = content(random, usize::try_from(end - start).unwrap());
            write_compressed(image, start, &data).await.unwrap();
            model[range(start, end)].copy_from_slice(&data);
        }
        4 | 5 => {
            let from = start + random.below(end - start);
            let to = from + 1 + random.below(end - from);
            let data = content(random, usize::try_from(to - from).unwrap());
            image.write(from, &data).await.unwrap();
            model[range(from, to)].copy_from_slice(&data);
        }
        6 => {
            let flags = [ZeroFlags::empty(), ZeroFlags::MAY_UNMAP];
            let flags = flags[usize::from(random.one_in(2))];
            io::write_zeroes(&image.0, start, end - start, flags)
                .await
                .unwrap();
            model[range(start, end)].fill(0);
        }
        _ => image.flush().await.unwrap(),
    }
}

#[test]
fn mixed_with_all_other_changes() {
    for (seed, options) in (1..).zip(KINDS) {
        let cluster = cluster_of(options);
        let size = (cluster * 40 + 1536).min((1 << 20).max(cluster * 3 + 512));
        let start = created(options, &size.to_string());
        let (bytes, model, compressed) = sim::run(seed, || async move {
            let disk = MemoryDisk::new(start);
            let image = Setup::new(&disk).open().await.unwrap();
            let mut random = Random::new(seed);
            let mut model = vec![0; usize::try_from(size).unwrap()];
            let steps = if cluster > 65536 { 12 } else { 40 };
            for _ in 0..steps {
                step(&image, &mut random, &mut model, cluster).await;
            }
            assert_same(&image.read_all().await.unwrap(), &model, options);
            image.close().await.unwrap();
            let compressed = judged(&disk.bytes(), &model, options);
            // The same once more on what is there.
            let image = Setup::new(&disk).open().await.unwrap();
            for _ in 0..steps / 2 {
                step(&image, &mut random, &mut model, cluster).await;
            }
            assert_same(&image.read_all().await.unwrap(), &model, options);
            image.close().await.unwrap();
            (disk.bytes(), model, compressed)
        });
        assert!(
            compressed["compressed-clusters"].as_u64() > Some(0),
            "{options}"
        );
        judged(&bytes, &model, options);
    }
}

#[test]
fn small_clusters_share_clusters_of_the_file() {
    let start = created("cluster_size=64k", "4M");
    let used = sim::run(1, || async move {
        let disk = MemoryDisk::new(start);
        let image = Setup::new(&disk).open().await.unwrap();
        let before = disk.len();
        write_compressed(&image, 0, &vec![3; 4 << 20])
            .await
            .unwrap();
        image.close().await.unwrap();
        let report = judged(&disk.bytes(), &vec![3; 4 << 20], "packed");
        assert_eq!(report["compressed-clusters"], 64);
        disk.len() - before
    });
    // An L2 table and one cluster with all of it.
    assert!(used <= 3 << 16, "{used:#x}");
}

#[test]
fn parts_of_clusters_and_data_files_are_refused() {
    let start = created("cluster_size=4k", "10240");
    let with_data = {
        let dir = tempfile::tempdir().expect("a directory");
        let (image, data) = (dir.path().join("image"), dir.path().join("data"));
        let option = format!("data_file={}", text(&data));
        qemu(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &option,
                text(&image),
                "1M",
            ],
        );
        std::fs::read(&image).expect("the image")
    };
    sim::run(1, || async move {
        let disk = MemoryDisk::new(start);
        let image = Setup::new(&disk).open().await.unwrap();
        let data = vec![1; 8192];
        let refused = [(512, 4096), (0, 512), (4096, 2048), (8192, 4096)];
        for (offset, len) in refused {
            let result = write_compressed(&image, offset, &data[..len]).await;
            assert_eq!(result, Err(Errno::EINVAL), "{offset} {len}");
        }
        write_compressed(&image, 8192, &data[..2048]).await.unwrap();
        image.close().await.unwrap();
        let disk = MemoryDisk::new(with_data);
        let setup = Setup {
            data_file: Some(MemoryDisk::new(vec![0; 1 << 20])),
            ..Setup::new(&disk)
        };
        let image = setup.open().await.unwrap();
        let result = write_compressed(&image, 0, &vec![1; 65536]).await;
        assert_eq!(result, Err(Errno::ENOTSUP));
        image.close().await.unwrap();
    });
}

#[test]
fn snapshots_keep_what_is_overwritten() {
    let start = created("cluster_size=4k", "64k");
    sim::run(1, || async move {
        let disk = MemoryDisk::new(start);
        let image = Setup::new(&disk).open().await.unwrap();
        write_compressed(&image, 0, &vec![3; 65536]).await.unwrap();
        image.close().await.unwrap();
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("image");
        std::fs::write(&path, disk.bytes()).unwrap();
        qemu("qemu-img", &["snapshot", "-c", "s", text(&path)]);
        let disk = MemoryDisk::new(std::fs::read(&path).unwrap());
        let image = Setup::new(&disk).open().await.unwrap();
        write_compressed(&image, 4096, &vec![4; 32768])
            .await
            .unwrap();
        image.write(40960, &[5; 4096]).await.unwrap();
        image.close().await.unwrap();
        let mut model = vec![3; 65536];
        model[4096..36864].fill(4);
        model[40960..45056].fill(5);
        judged(&disk.bytes(), &model, "active");
        std::fs::write(&path, disk.bytes()).unwrap();
        qemu("qemu-img", &["snapshot", "-a", "s", text(&path)]);
        judged(&std::fs::read(&path).unwrap(), &[3; 65536], "snapshot");
    });
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed() {
    for seed in 1..=12 {
        let start = created("cluster_size=4k", "96k");
        let (journal, base, flushed) = sim::run(seed, || {
            let start = start.clone();
            async move {
                let disk = MemoryDisk::new(start);
                let image = Setup::new(&disk).open().await.unwrap();
                let mut random = Random::new(seed);
                let mut model = vec![0; 96 << 10];
                for _ in 0..20 {
                    step(&image, &mut random, &mut model, 4096).await;
                }
                image.flush().await.unwrap();
                let journal = Journal::default();
                let base = disk.bytes();
                disk.record(0, &journal);
                // Only the second half changes from now on.
                for _ in 0..20 {
                    let at = 48 * 1024 + 4096 * random.below(11);
                    let data = content(&mut random, 4096);
                    if random.one_in(2) {
                        write_compressed(&image, at, &data).await.unwrap();
                    } else {
                        image.write(at, &data).await.unwrap();
                    }
                }
                image.close().await.unwrap();
                (journal, base, model)
            }
        });
        let mut random = Random::new(seed);
        let operations = journal.operations();
        for _ in 0..6 {
            let at = usize::try_from(random.below(operations.len() as u64 + 1)).unwrap();
            let start = std::slice::from_ref(&base);
            let left = after_power_cut(start, &operations, at, &mut random);
            let disk = MemoryDisk::new(left.into_iter().next().unwrap());
            let head = sim::run(seed, || async move {
                let children = Children::new(&["file"]);
                children.edges()[usize::from(FILE.0)].set_node(Some(leaf(&disk)));
                let report = check_children(&children, Repair::Nothing).await.unwrap();
                assert_eq!(
                    (report.corruptions, report.check_errors),
                    (0, 0),
                    "{report:?}"
                );
                let image = Setup::new(&disk).open().await.unwrap();
                let head = image.read(0, 48 << 10).await.unwrap();
                image.read_all().await.unwrap();
                head
            });
            assert_same(&head, &flushed[..48 << 10], "what was flushed");
        }
    }
}
