//! Damaged images: refused in the reference's words, or read as far as they go; never a panic, never much memory.

use stord_aio::{Errno, sim};
use stord_qmp::schema::block::{Qcow2OverlapCheckFlags, Qcow2OverlapCheckMode, Qcow2OverlapChecks};

use super::super::links;
use super::harness::{Image, Setup, created, defaults};
use super::made::{Kind, MIXED, Made};
use crate::driver::FILE;
use crate::graph::Children;
use crate::testing::{MemoryDisk, Random, leaf, node_options};

fn patched(image: &[u8], patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut image = image.to_vec();
    for (at, bytes) in patches {
        image[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    image
}

/// What opening says, as the graph does it: links first, then the image.
fn refusal(image: Vec<u8>, read_only: bool) -> Option<String> {
    sim::run(1, || async move {
        let disk = MemoryDisk::new(image);
        let children = Children::new(&["file", "backing", "data-file"]);
        children.edges()[usize::from(FILE.0)].set_node(Some(leaf(&disk)));
        if let Err(error) = links(&children).await {
            return Some(error.message);
        }
        let mut common = node_options();
        common.read_only = read_only;
        let setup = Setup {
            common: Some(common),
            ..Setup::new(&disk)
        };
        setup.open().await.err().map(|error| error.message)
    })
}

#[test]
fn refuses_headers_in_the_words_of_the_reference() {
    let good = created("", "64M");
    let u32 = |value: u32| value.to_be_bytes().to_vec();
    let u64 = |value: u64| value.to_be_bytes().to_vec();
    let extension = |kind: u32, len: u32, data: &[u8]| {
        [&kind.to_be_bytes()[..], &len.to_be_bytes(), data].concat()
    };
    let bitmaps = |count: u32, reserved: u32, size: u64, offset: u64| {
        let data = [
            &count.to_be_bytes()[..],
            &reserved.to_be_bytes(),
            &size.to_be_bytes(),
            &offset.to_be_bytes(),
        ]
        .concat();
        extension(0x2385_2875, 24, &data)
    };
    let autoclear = (88, u64(1));
    type Patches = Vec<(usize, Vec<u8>)>;
    let cases: Vec<(Patches, Option<&str>)> = vec![
        (vec![], None),
        (vec![(0, u32(1))], Some("Image is not in qcow2 format")),
        (vec![(4, u32(1))], Some("Unsupported qcow2 version 1")),
        (vec![(4, u32(4))], Some("Unsupported qcow2 version 4")),
        (vec![(20, u32(8))], Some("Unsupported cluster size: 2^8")),
        (vec![(20, u32(22))], Some("Unsupported cluster size: 2^22")),
        (vec![(100, u32(100))], Some("qcow2 header too short")),
        (vec![(100, u32(108))], Some("Header extension too large")),
        (
            vec![(100, u32(70_000))],
            Some("qcow2 header exceeds cluster size"),
        ),
        (vec![(100, u32(65_536))], None),
        (
            vec![(8, u64(70_000)), (16, u32(5))],
            Some("Invalid backing file offset"),
        ),
        (
            vec![(8, u64(0x300)), (16, u32(1024))],
            Some("Backing file name too long"),
        ),
        (
            vec![(8, u64(65_530)), (16, u32(20))],
            Some("Backing file name too long"),
        ),
        (vec![(32, u32(3))], Some("Unsupported encryption method 3")),
        (
            vec![(36, u32(0x7fff_ffff))],
            Some("Active L1 table too large"),
        ),
        (
            vec![(36, u32(4 * 1024 * 1024 + 1))],
            Some("Active L1 table too large"),
        ),
        (vec![(36, u32(4 * 1024 * 1024))], None),
        (vec![(36, u32(0))], Some("L1 table is too small")),
        (
            vec![(40, u64(0x3_0001))],
            Some("Active L1 table offset invalid"),
        ),
        (
            vec![(40, u64(0xffff_ffff_ffff_0000))],
            Some("Active L1 table offset invalid"),
        ),
        (vec![(40, u64(0x3000_0000))], None),
        (
            vec![(48, u64(0x1_0001))],
            Some("Reference count table offset invalid"),
        ),
        (
            vec![(56, u32(0))],
            Some("Image does not contain a reference count table"),
        ),
        (
            vec![(56, u32(129))],
            Some("Reference count table too large"),
        ),
        (vec![(60, u32(65_537))], Some("Snapshot table too large")),
        (
            vec![(60, u32(1)), (64, u64(5))],
            Some("Snapshot table offset invalid"),
        ),
        (vec![(60, u32(65_536)), (64, u64(0x10_0000))], None),
        (
            vec![(72, u64(1 << 5))],
            Some("Unsupported qcow2 feature(s): Unknown incompatible feature: 20"),
        ),
        (
            vec![(72, u64(1 << 5 | 1 << 62))],
            Some("Unsupported qcow2 feature(s): Unknown incompatible feature: 4000000000000020"),
        ),
        (
            vec![(72, u64(2))],
            Some("qcow2: Image is corrupt; cannot be opened read/write"),
        ),
        (
            vec![(72, u64(4))],
            Some("'data-file' is required for this image"),
        ),
        (
            vec![(72, u64(8))],
            Some("qcow2: Compression type incompatible feature bit must not be set"),
        ),
        (
            vec![(104, vec![1])],
            Some("qcow2: Compression type incompatible feature bit must be set"),
        ),
        (
            vec![(72, u64(8)), (104, vec![2])],
            Some("qcow2: unknown compression type: 2"),
        ),
        (
            vec![(72, u64(16)), (20, u32(13))],
            Some("Unsupported subcluster size: 256"),
        ),
        (
            vec![(88, u64(2))],
            Some("data-file-raw requires a data file"),
        ),
        (
            vec![(96, u32(7))],
            Some("Reference count entry width too large; may not exceed 64 bits"),
        ),
        (vec![(24, u64(1 << 62))], Some("Image is too big")),
        (vec![(24, u64(1 << 63))], Some("Image is too big")),
        (vec![(24, u64(1 << 40))], Some("L1 table is too small")),
        (
            vec![(112, extension(0xe279_2aca, 0x7fff_ffff, &[]))],
            Some("Header extension too large"),
        ),
        (
            vec![(112, extension(0xe279_2aca, 70_000, &[]))],
            Some("Header extension too large"),
        ),
        (
            vec![(112, extension(0xe279_2aca, 16, &[]))],
            Some("ERROR: ext_backing_format: len=16 too large (>=16)"),
        ),
        (
            vec![(112, extension(0x0537_be77, 16, &[]))],
            Some("CRYPTO header extension only expected with LUKS encryption method"),
        ),
        (
            vec![autoclear.clone(), (112, extension(0x2385_2875, 23, &[]))],
            Some("bitmaps_ext: Invalid extension length"),
        ),
        (
            vec![autoclear.clone(), (112, bitmaps(1, 1, 0, 0))],
            Some("bitmaps_ext: Reserved field is not zero"),
        ),
        (
            vec![autoclear.clone(), (112, bitmaps(70_000, 0, 0, 0))],
            Some(
                "bitmaps_ext: Image has 70000 bitmaps, exceeding the QEMU supported maximum of 65535",
            ),
        ),
        (
            vec![autoclear.clone(), (112, bitmaps(1, 0, 32, 5))],
            Some("bitmaps_ext: invalid bitmap directory offset"),
        ),
        (
            vec![autoclear, (112, bitmaps(1, 0, 1 << 40, 65_536))],
            Some(
                "bitmaps_ext: bitmap directory size (1099511627776) exceeds the maximum supported size (67107840)",
            ),
        ),
    ];
    for (patches, expected) in cases {
        let slices: Vec<(usize, &[u8])> = patches
            .iter()
            .map(|(at, bytes)| (*at, bytes.as_slice()))
            .collect();
        let said = refusal(patched(&good, &slices), false);
        assert_eq!(said.as_deref(), expected, "{patches:x?}");
    }
    let corrupt = patched(&good, &[(72, &u64(2))]);
    assert_eq!(refusal(corrupt, true), None, "a corrupt image can be read");
}

#[test]
fn names_unknown_features_by_the_table_in_the_image() {
    let mut table = vec![0, 5];
    table.extend(b"time travel");
    table.resize(48, 0);
    let extension = [
        &0x6803_f857u32.to_be_bytes()[..],
        &48u32.to_be_bytes(),
        &table,
    ]
    .concat();
    let image = patched(
        &created("", "1M"),
        &[(72, &(1u64 << 5 | 1 << 7).to_be_bytes()), (112, &extension)],
    );
    assert_eq!(
        refusal(image, false).as_deref(),
        Some("Unsupported qcow2 feature(s): time travel, Unknown incompatible feature: 80")
    );
}

#[test]
fn refuses_what_is_cut_off() {
    let good = created("", "64M");
    for (len, expected) in [
        (0, Some("Image is not in qcow2 format")),
        (71, Some("qcow2 header too short")),
        (100, Some("qcow2 header too short")),
        (104, None),
        (1024, None),
    ] {
        assert_eq!(
            refusal(good[..len].to_vec(), true).as_deref(),
            expected,
            "{len} bytes"
        );
    }
}

#[test]
fn refuses_options_in_the_words_of_the_reference() {
    let version_3 = created("", "64M");
    let version_2 = created("compat=0.10", "64M");
    type Change = fn(&mut stord_qmp::schema::block::BlockdevOptionsQcow2);
    let cases: [(&[u8], Change, &str); 7] = [
        (
            &version_3,
            |options| {
                options.cache_size = Some(1);
                options.l2_cache_size = Some(1);
                options.refcount_cache_size = Some(1);
            },
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        (
            &version_3,
            |options| {
                options.cache_size = Some(1);
                options.l2_cache_size = Some(2);
            },
            "l2-cache-size may not exceed cache-size",
        ),
        (
            &version_3,
            |options| {
                options.cache_size = Some(1);
                options.refcount_cache_size = Some(2);
            },
            "refcount-cache-size may not exceed cache-size",
        ),
        (
            &version_3,
            |options| options.l2_cache_entry_size = Some(1000),
            "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
        ),
        (
            &version_3,
            |options| options.l2_cache_size = Some(1 << 40),
            "L2 cache size too big",
        ),
        (
            &version_2,
            |options| options.lazy_refcounts = Some(true),
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
        ),
        (
            &version_2,
            |options| options.discard_no_unref = Some(true),
            "discard-no-unref is only supported since qcow2 version 3",
        ),
    ];
    for (image, change, expected) in cases {
        let mut options = defaults();
        change(&mut options);
        let disk = MemoryDisk::new(image.to_vec());
        let said = sim::run(1, || async move {
            let setup = Setup {
                options: Some(options),
                ..Setup::new(&disk)
            };
            setup.open().await.err().map(|error| error.message)
        });
        assert_eq!(said.as_deref(), Some(expected));
    }
}

/// An image with a few clusters written, and the offset of its only L2 table.
fn written() -> (Vec<u8>, usize) {
    let disk = MemoryDisk::new(created("cluster_size=4k", "1M"));
    let file = disk.clone();
    sim::run(1, || async move {
        let image = Setup::new(&file).open().await.expect("opens");
        image.write(0, &[0xaa; 16 * 4096]).await.expect("writes");
        image.close().await.expect("closes");
    });
    let bytes = disk.bytes();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let l1 = usize::try_from(word(40)).expect("an offset");
    let l2 = usize::try_from(word(l1) & 0xff_ffff_ffff_fe00).expect("an offset");
    (bytes, l2)
}

async fn opened(disk: &MemoryDisk, checks: Option<Qcow2OverlapChecks>) -> Image {
    let mut options = defaults();
    options.overlap_check = checks;
    let setup = Setup {
        options: Some(options),
        ..Setup::new(disk)
    };
    setup.open().await.expect("opens")
}

/// Makes the first L2 entry name `target`, and writes through it.
fn write_through(
    target: u64,
    checks: Option<Qcow2OverlapChecks>,
) -> (Result<(), Errno>, Result<Vec<u8>, Errno>, bool) {
    let (bytes, l2) = written();
    let entry = (1u64 << 63 | target).to_be_bytes();
    let disk = MemoryDisk::new(patched(&bytes, &[(l2, &entry)]));
    let file = disk.clone();
    let (result, after) = sim::run(1, || async move {
        let image = opened(&file, checks).await;
        let result = image.write(512, &[0xbb; 512]).await;
        (result, image.read(8192, 512).await)
    });
    (result, after, disk.bytes()[79] & 2 != 0)
}

#[test]
fn never_writes_data_over_metadata() {
    let (bytes, l2) = written();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let reftable = word(48);
    let refblock = word(usize::try_from(reftable).expect("an offset"));
    for target in [word(40), reftable, refblock, l2 as u64] {
        let (result, after, is_marked) = write_through(target, None);
        assert_eq!(result, Err(Errno::EIO), "{target:#x}");
        assert_eq!(
            after,
            Err(Errno::ENOMEDIUM),
            "the image takes no more requests"
        );
        assert!(is_marked, "the image is marked corrupt");
        let (result, _, is_marked) = write_through(
            target,
            Some(Qcow2OverlapChecks::Mode(Qcow2OverlapCheckMode::None)),
        );
        assert_eq!((result, is_marked), (Ok(()), false), "without checks");
    }
    let flags = Qcow2OverlapCheckFlags {
        active_l2: Some(false),
        ..Qcow2OverlapCheckFlags::default()
    };
    let (result, ..) = write_through(l2 as u64, Some(Qcow2OverlapChecks::Flags(flags)));
    assert_eq!(result, Ok(()), "with that check off");
    let constant = Qcow2OverlapChecks::Mode(Qcow2OverlapCheckMode::Constant);
    assert_eq!(write_through(l2 as u64, Some(constant.clone())).0, Ok(()));
    assert_eq!(write_through(reftable, Some(constant)).0, Err(Errno::EIO));
}

#[test]
fn bad_entries_fail_the_request_and_mark_the_image() {
    let (bytes, l2) = written();
    let cases: [(usize, u64); 2] = [(l2, 1 << 63 | 0x5200), (l2, 0x5200 | 1)];
    for (at, entry) in cases {
        let image = patched(&bytes, &[(at, &entry.to_be_bytes())]);
        for read_only in [false, true] {
            let disk = MemoryDisk::new(image.clone());
            let file = disk.clone();
            let (bad, other) = sim::run(1, || async move {
                let mut common = node_options();
                common.read_only = read_only;
                let setup = Setup {
                    common: Some(common),
                    ..Setup::new(&file)
                };
                let image = setup.open().await.expect("opens");
                (image.read(0, 512).await, image.read(4096, 512).await)
            });
            assert_eq!(bad, Err(Errno::EIO));
            if read_only {
                assert_eq!(other, Ok(vec![0xaa; 512]), "the rest can be read");
            } else {
                assert_eq!(other, Err(Errno::ENOMEDIUM));
            }
            assert_eq!(disk.bytes()[79] & 2 != 0, !read_only);
        }
    }
}

/// Changes a few bytes where metadata is; mostly to values that mean something.
fn mutate(image: &mut [u8], random: &mut Random) {
    let len = image.len() as u64;
    for _ in 0..1 + random.below(6) {
        let at = match random.below(4) {
            0 => random.below(120),
            1 => random.below(512),
            _ => random.below(len / 8) * 8,
        };
        let at = usize::try_from(at).expect("an index");
        let value = match random.below(6) {
            0 => random.next(),
            1 => 1 << random.below(64),
            2 => u64::MAX << random.below(64),
            3 => random.below(len) & !511,
            4 => (random.below(len) & !4095) | 1 << (62 + random.below(2)),
            _ => 0,
        };
        for (place, byte) in image[at..].iter_mut().zip(value.to_be_bytes()) {
            *place = byte;
        }
    }
}

#[test]
fn survives_random_damage() {
    let (plain, _) = written();
    let filled = |options| {
        Made::new(&Kind {
            options,
            size: 2 << 20,
            filled: MIXED,
            snapshot: true,
            ..Kind::default()
        })
        .file
        .bytes()
    };
    let images = [
        plain,
        created("cluster_size=512,refcount_bits=64", "1M"),
        filled("cluster_size=16k,extended_l2=on"),
        filled("cluster_size=4k"),
        filled("cluster_size=512,compression_type=zstd"),
    ];
    let rounds = std::env::var("STORD_FUZZ_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(3000u64);
    for seed in 0..rounds {
        let mut random = Random::new(seed);
        let mut image = images[usize::try_from(seed % images.len() as u64).expect("small")].clone();
        mutate(&mut image, &mut random);
        if random.one_in(4) {
            image.truncate(usize::try_from(random.below(image.len() as u64)).expect("an index"));
        }
        if image.get(..4) != Some(b"QFI\xfb".as_slice()) {
            continue;
        }
        // Requests may fail, but they all end, and nothing panics.
        sim::run(seed, || async move {
            let disk = MemoryDisk::new(image);
            let mut common = node_options();
            common.read_only = random.one_in(3);
            let read_only = common.read_only;
            let setup = Setup {
                common: Some(common),
                ..Setup::new(&disk)
            };
            let Ok(image) = setup.open().await else {
                return;
            };
            let size = image.0.size().clamp(1, 1 << 40);
            for _ in 0..6 {
                let at = random.below(size) & !511;
                let len = (size - at).min(20_000);
                let _ = image.read(at, usize::try_from(len).expect("small")).await;
                if !read_only && disk.len() < 1 << 26 {
                    let data = vec![7; usize::try_from(len).expect("small")];
                    let _ = image.write(at, &data).await;
                    let _ = crate::io::discard(&image.0, at, len).await;
                    let _ = crate::io::write_zeroes(
                        &image.0,
                        at,
                        len,
                        crate::driver::ZeroFlags::MAY_UNMAP,
                    )
                    .await;
                    let _ = image.flush().await;
                }
            }
            let _ = image.format().info();
            let _ = image.close().await;
        });
    }
}
