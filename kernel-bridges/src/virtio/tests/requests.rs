//! What requests do, and what is answered to those that make no sense.

use super::driver::*;
use super::*;
use crate::virtio::blk::config::{F_CONFIG_WCE, F_MQ, F_RO};

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

#[tokio::test]
async fn written_data_is_read_back_and_in_the_image() {
    let world = World::new(MIB).await;
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    let bytes: Vec<u8> = (0..4096u32).map(|i| (i % 251).to_le_bytes()[0]).collect();
    guest.put(Guest::data_at(0), &bytes);
    assert_eq!(guest.perform(OUT, 3, 4096), (OK, 1));
    assert_eq!(world.image()[3 * SECTOR..3 * SECTOR + 4096], bytes);
    guest.put(Guest::data_at(0), &[0; 4096]);
    assert_eq!(guest.perform(IN, 3, 4096), (OK, 4097));
    assert_eq!(guest.get(Guest::data_at(0), 4096), bytes);
    assert_eq!(guest.perform(FLUSH, 0, 0), (OK, 1));
    assert_eq!(served.stop().await, guest.available);
}

#[tokio::test]
async fn the_serial_is_given_padded_and_cut_off() {
    let world = World::new(MIB).await;
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    guest.put(Guest::data_at(0), &[0xff; 32]);
    assert_eq!(guest.perform(GET_ID, 0, 20), (OK, 21));
    let mut expected = [0; 20];
    expected[..10].copy_from_slice(b"the serial");
    assert_eq!(guest.get(Guest::data_at(0), 20), expected);
    guest.put(Guest::data_at(0), &[0xff; 32]);
    assert_eq!(guest.perform(GET_ID, 0, 4), (OK, 5));
    assert_eq!(guest.get(Guest::data_at(0), 6), b"the \xff\xff");
    served.stop().await;
}

/// A segment of a discard or of zeroes.
fn segment(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&count.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

#[tokio::test]
async fn discards_and_zeroes_reach_the_image() {
    use std::os::unix::fs::MetadataExt as _;
    let world = World::new(MIB).await;
    std::fs::write(world.image.path(), vec![7; 1 << 20]).unwrap();
    let blocks = || world.image.as_file().metadata().unwrap().blocks();
    let full = blocks();
    // Holes make the map of the file longer: a few blocks are that.
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    guest.put(Guest::data_at(0), &segment(8, 16, 0));
    assert_eq!(guest.perform(WRITE_ZEROES, 0, 16), (OK, 1));
    assert_eq!(world.image()[8 * SECTOR..24 * SECTOR], [0; 16 * SECTOR]);
    assert_eq!(world.image()[24 * SECTOR], 7);
    guest.put(Guest::data_at(0), &segment(256, 256, 1));
    assert_eq!(guest.perform(WRITE_ZEROES, 0, 16), (OK, 1));
    assert_eq!(world.image()[256 * SECTOR..512 * SECTOR], [0; 256 * SECTOR]);
    assert!(blocks() <= full - 256 + 64, "{} of {full}", blocks());
    guest.put(Guest::data_at(0), &segment(512, 512, 0));
    assert_eq!(guest.perform(DISCARD, 0, 16), (OK, 1));
    assert!(blocks() <= full - 768 + 64, "{} of {full}", blocks());
    served.stop().await;
}

#[tokio::test]
async fn segments_that_make_no_sense_are_refused_as_the_reference_does() {
    let world = World::with(
        64 * MIB,
        DiskOptions {
            logical_block_size: 4096,
            ..options()
        },
    )
    .await;
    let end = 64 * MIB / 512;
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    for (kind, sector, count, flags, status) in [
        (DISCARD, 0, 32768, 0, OK),
        (DISCARD, 0, 32769, 0, IO_ERROR),
        (DISCARD, 8, 8, 1, UNSUPPORTED),
        (DISCARD, 8, 8, 2, UNSUPPORTED),
        (DISCARD, 1, 8, 0, IO_ERROR),
        (DISCARD, end - 8, 8, 0, OK),
        (DISCARD, end - 8, 9, 0, IO_ERROR),
        (DISCARD, end, 0, 0, OK),
        (DISCARD, u64::MAX, 8, 0, IO_ERROR),
        (DISCARD, u64::MAX - 7, u32::MAX, 0, IO_ERROR),
        (WRITE_ZEROES, 0, 32768, 1, OK),
        (WRITE_ZEROES, 0, 32769, 1, IO_ERROR),
        (WRITE_ZEROES, 8, 8, 4, UNSUPPORTED),
        (WRITE_ZEROES, 4, 8, 0, IO_ERROR),
        (WRITE_ZEROES, end + 8, 8, 0, IO_ERROR),
    ] {
        guest.put(Guest::data_at(0), &segment(sector, count, flags));
        let case = (kind, sector, count, flags);
        assert_eq!(guest.perform(kind, 0, 16), (status, 1), "{case:?}");
    }
    assert_eq!(guest.perform(DISCARD, 0, 15), (IO_ERROR, 1));
    assert_eq!(guest.perform(DISCARD, 0, 0), (IO_ERROR, 1));
    assert_eq!(guest.perform(WRITE_ZEROES, 0, 32), (UNSUPPORTED, 1));
    served.stop().await;
}

#[tokio::test]
async fn ranges_that_make_no_sense_are_refused() {
    let world = World::with(
        MIB,
        DiskOptions {
            logical_block_size: 4096,
            ..options()
        },
    )
    .await;
    let end = MIB / 512;
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    for kind in [IN, OUT] {
        for (sector, len, status) in [
            (0, 4096, OK),
            // Of the length, the reference only wants sectors.
            (0, 512, OK),
            (0, 513, IO_ERROR),
            (0, 1, IO_ERROR),
            (0, 0, OK),
            (1, 4096, IO_ERROR),
            (7, 512, IO_ERROR),
            (end - 8, 4096, OK),
            (end - 7, 4096, IO_ERROR),
            (end, 0, OK),
            (end, 512, IO_ERROR),
            (u64::MAX, 512, IO_ERROR),
            (u64::MAX / 512 + 1, 512, IO_ERROR),
        ] {
            let (given, _) = guest.perform(kind, sector, len);
            assert_eq!(given, status, "{kind} {sector} {len}");
        }
    }
    for kind in [2, 5, 10, 14, 0x7fff_ffff] {
        assert_eq!(guest.perform(kind, 0, 0), (UNSUPPORTED, 1), "{kind}");
    }
    // A barrier of old drivers means nothing.
    assert_eq!(guest.perform(OUT | 1 << 31, 0, 512).0, OK);
    served.stop().await;
}

#[tokio::test]
async fn a_read_only_disk_is_not_changed() {
    let read_only = DiskOptions {
        writable: false,
        ..options()
    };
    let world = World::with(MIB, read_only).await;
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    assert_ne!(world.disk.features() & F_RO, 0);
    guest.put(Guest::data_at(0), &[9; 512]);
    assert_eq!(guest.perform(OUT, 0, 512), (IO_ERROR, 1));
    guest.put(Guest::data_at(0), &segment(0, 8, 0));
    assert_eq!(guest.perform(DISCARD, 0, 16), (IO_ERROR, 1));
    assert_eq!(guest.perform(WRITE_ZEROES, 0, 16), (IO_ERROR, 1));
    assert_eq!(guest.perform(IN, 0, 512), (OK, 513));
    assert_eq!(guest.perform(FLUSH, 0, 0), (OK, 1));
    assert!(world.image().iter().all(|byte| *byte == 0));
    served.stop().await;
}

/// How the bytes of a request are spread over descriptors says nothing.
#[tokio::test]
async fn a_request_may_be_cut_into_pieces_anywhere() {
    let world = World::new(MIB).await;
    let mut guest = Guest::new(64, FEATURES);
    let served = world.serve(&guest);
    let (header, _, data) = Guest::addresses(0);
    let bytes: Vec<u8> = (0..1024u32).map(|i| (i % 249).to_le_bytes()[0]).collect();
    // Header and data follow each other in memory, in pieces of 5 bytes but for the end of the data.
    guest.head(0, OUT, 2);
    guest.put(Guest::data_at(0) - 16, &guest.get(header - BASE, 16));
    guest.put(Guest::data_at(0), &bytes);
    let mut at = 0;
    let mut index = 0;
    while at < 16 + 1024 {
        let len = if index < 20 { 5 } else { 16 + 1024 - at };
        guest.describe(
            index,
            data - 16 + at,
            u32::try_from(len).unwrap(),
            NEXT,
            index + 1,
        );
        at += len;
        index += 1;
    }
    guest.describe(index, header + 0x100, 1, WRITE, 0);
    guest.offer(0);
    guest.kick();
    assert_eq!(guest.wait(1), [(0, 1)]);
    assert_eq!(guest.status(0), OK);
    assert_eq!(world.image()[2 * SECTOR..4 * SECTOR], bytes);
    // The status shares a descriptor with the end of the data.
    guest.head(0, IN, 2);
    guest.put(Guest::data_at(0), &[0; 1025]);
    guest.describe(0, header, 16, NEXT, 1);
    guest.describe(1, data, 100, NEXT | WRITE, 2);
    guest.describe(2, data + 100, 925, WRITE, 0);
    guest.put(Guest::data_at(0) + 1024, &[0xaa]);
    guest.offer(0);
    guest.kick();
    assert_eq!(guest.wait(1), [(0, 1025)]);
    assert_eq!(guest.get(Guest::data_at(0), 1024), bytes);
    assert_eq!(guest.get(Guest::data_at(0) + 1024, 1), [OK]);
    served.stop().await;
}

#[tokio::test]
async fn tables_of_descriptors_are_followed() {
    let world = World::new(MIB).await;
    // More segments than the queue has descriptors.
    let mut guest = Guest::new(4, FEATURES);
    let served = world.serve(&guest);
    let (header, status, data) = Guest::addresses(0);
    let table = Guest::data_at(100);
    let bytes: Vec<u8> = (0..4096u32).map(|i| (i % 247).to_le_bytes()[0]).collect();
    guest.put(Guest::data_at(0), &bytes);
    guest.head(0, OUT, 0);
    guest.describe_at(table, header, 16, NEXT, 1);
    for segment in 0..8u16 {
        let from = data + 512 * u64::from(segment);
        let at = table + 16 * u64::from(segment + 1);
        guest.describe_at(at, from, 512, NEXT, segment + 2);
    }
    guest.describe_at(table + 16 * 9, status, 1, WRITE, 0);
    guest.describe(0, BASE + table, 160, INDIRECT | WRITE, 0);
    guest.offer(0);
    guest.kick();
    assert_eq!(guest.wait(1), [(0, 1)]);
    assert_eq!(guest.status(0), OK);
    assert_eq!(world.image()[..4096], bytes);
    // A table after a descriptor.
    guest.put(Guest::data_at(0), &[0; 4096]);
    guest.head(0, IN, 0);
    guest.describe(2, header, 16, NEXT, 3);
    guest.describe(3, BASE + table, 32, INDIRECT, 0);
    guest.describe_at(table, data, 4096, NEXT | WRITE, 1);
    guest.describe_at(table + 16, status, 1, WRITE, 0);
    guest.offer(2);
    guest.kick();
    assert_eq!(guest.wait(1), [(2, 4097)]);
    assert_eq!(guest.get(Guest::data_at(0), 4096), bytes);
    served.stop().await;
}

/// The little-endian number in some bytes of the configuration space.
fn field(config: &[u8], at: usize, len: usize) -> u64 {
    let bytes = config[at..at + len].iter().rev();
    bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[tokio::test]
async fn the_configuration_space_says_what_the_disk_is() {
    let shown = DiskOptions {
        logical_block_size: 4096,
        queues: 4,
        seg_max: 254,
        ..options()
    };
    let world = World::with(64 * MIB, shown).await;
    let config = world.disk.config();
    for (name, at, len, value) in [
        ("capacity", 0, 8, 64 * MIB / 512),
        ("size_max", 8, 4, 0),
        ("seg_max", 12, 4, 254),
        ("blk_size", 20, 4, 4096),
        ("min_io_size", 26, 2, 1),
        ("opt_io_size", 28, 4, 1),
        ("writeback", 32, 1, 1),
        ("num_queues", 34, 2, 4),
        ("max_discard_sectors", 36, 4, 32768),
        ("max_discard_seg", 40, 4, 1),
        ("discard_sector_alignment", 44, 4, 8),
        ("max_write_zeroes_sectors", 48, 4, 32768),
        ("max_write_zeroes_seg", 52, 4, 1),
        ("write_zeroes_may_unmap", 56, 1, 1),
    ] {
        assert_eq!(field(&config, at, len), value, "{name}");
    }
    assert_ne!(world.disk.features() & F_MQ, 0);
    assert_eq!(world.disk.features() & F_RO, 0);
}

#[tokio::test]
async fn the_driver_turns_the_write_cache_on_and_off_and_changes_nothing_else() {
    let world = World::new(MIB).await;
    let disk = &world.disk;
    let before = disk.config();
    for (offset, bytes) in [
        (31, &[0][..]),
        (32, &[0, 0]),
        (33, &[0]),
        (0, &[1; 8]),
        (u32::MAX, &[0]),
        (32, &[]),
    ] {
        assert!(!disk.set_config(offset, bytes), "{offset} {bytes:?}");
        assert_eq!(disk.config(), before);
    }
    let features = F_FLUSH_AND_WCE;
    assert!(!disk.is_writethrough(features));
    assert!(disk.is_writethrough(FEATURES & !F_FLUSH_AND_WCE));
    assert!(disk.set_config(32, &[0]));
    assert_eq!(disk.config()[32], 0);
    assert!(disk.is_writethrough(features));
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    guest.put(Guest::data_at(0), &[9; 512]);
    assert_eq!(guest.perform(OUT, 0, 512), (OK, 1));
    assert_eq!(world.image()[..512], [9; 512]);
    served.stop().await;
    disk.reset();
    assert_eq!(disk.config(), before);
    assert!(!disk.is_writethrough(features));
}

const F_FLUSH_AND_WCE: u64 = F_CONFIG_WCE | crate::virtio::blk::config::F_FLUSH;

#[tokio::test]
async fn a_resized_disk_has_another_capacity_and_says_so() {
    let world = World::new(MIB).await;
    let (sender, mut resized) = mpsc::unbounded_channel();
    world.disk.on_resize(move |size| {
        let _ = sender.send(size);
    });
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    assert_eq!(guest.perform(OUT, 2048, 512).0, IO_ERROR);
    world.graph.resize("n", 2 * MIB).await.unwrap();
    assert_eq!(resized.recv().await, Some(2 * MIB));
    assert_eq!(field(&world.disk.config(), 0, 8), 4096);
    assert_eq!(guest.perform(OUT, 2048, 512).0, OK);
    served.stop().await;
}
