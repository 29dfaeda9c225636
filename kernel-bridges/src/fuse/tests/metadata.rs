//! Attributes, space, and the requests with fixed answers.

use std::os::unix::fs::FileExt as _;

use super::*;

const KEEP_SIZE: u32 = 1;
const PUNCH_HOLE: u32 = 2;
const ZERO_RANGE: u32 = 16;
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

#[tokio::test]
async fn the_root_is_a_regular_file_of_the_images_size() {
    let fixture = Fixture::new(MIB, WRITABLE).await;
    fixture.image_file().write_all_at(&[1; 4096], 0).unwrap();
    let attributes = fixture.getattr().await;
    assert_eq!(attributes.attr.mode, 0o100_600);
    assert_eq!((attributes.attr.ino, attributes.attr.nlink), (1, 1));
    assert_eq!(attributes.attr.size, MIB);
    assert!(attributes.attr.blocks >= 8 && attributes.attr.blocks < MIB / 512);
    assert_eq!(attributes.attr_valid, 1);
}

#[tokio::test]
async fn truncation_needs_no_growable() {
    let fixture = Fixture::new(MIB, WRITABLE).await;
    assert_eq!(fixture.truncate(3 * MIB).await, Ok(3 * MIB));
    assert_eq!(fixture.truncate(4096).await, Ok(4096));
    assert_eq!(fixture.image().len(), 4096);
    assert_eq!(fixture.truncate(u64::MAX).await, Err(Errno::EFBIG));
}

#[tokio::test]
async fn a_refused_attribute_changes_nothing() {
    let fixture = Fixture::new(MIB, WRITABLE).await;
    let values = SetattrIn {
        size: 0,
        mode: 0o644,
        ..SetattrIn::default()
    };
    let changed = fixture
        .setattr(SetattrValid::SIZE | SetattrValid::MODE, values)
        .await;
    assert_eq!(changed.err(), Some(Errno::EPERM));
    let attributes = fixture.getattr().await;
    assert_eq!(
        (attributes.attr.size, attributes.attr.mode),
        (MIB, 0o100_600)
    );
}

#[tokio::test]
async fn punching_frees_inside_the_image_only() {
    let fixture = Fixture::new(MIB, WRITABLE).await;
    fixture.image_file().write_all_at(&[1; 1 << 20], 0).unwrap();
    let before = fixture.getattr().await.attr.blocks;
    let punch = PUNCH_HOLE | KEEP_SIZE;
    assert_eq!(fixture.fallocate(64 * KIB, 64 * KIB, punch).await, Ok(()));
    assert_eq!(fixture.fallocate(MIB - 4096, MIB, punch).await, Ok(()));
    assert_eq!(fixture.fallocate(MIB, 4096, punch).await, Ok(()));
    let after = fixture.getattr().await.attr;
    assert_eq!(after.size, MIB);
    assert!(after.blocks < before, "{} of {before}", after.blocks);
    let image = fixture.image();
    assert!(image[64 << 10..128 << 10].iter().all(|byte| *byte == 0));
    assert!(image[(1 << 20) - 4096..].iter().all(|byte| *byte == 0));
    assert_eq!(image[128 << 10], 1);
}

#[tokio::test]
async fn zeroing_a_range_grows_unless_told_not_to() {
    let fixture = Fixture::new(MIB, WRITABLE).await;
    fixture
        .image_file()
        .write_all_at(&[1; 8192], MIB - 8192)
        .unwrap();
    let keep = ZERO_RANGE | KEEP_SIZE;
    assert_eq!(fixture.fallocate(MIB - 4096, 8192, keep).await, Ok(()));
    assert_eq!(fixture.getattr().await.attr.size, MIB);
    assert_eq!(
        fixture.fallocate(MIB - 8192, 16 * KIB, ZERO_RANGE).await,
        Ok(())
    );
    assert_eq!(fixture.getattr().await.attr.size, MIB + 8192);
    assert!(fixture.image().iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn allocating_is_for_the_space_past_the_end() {
    let fixture = Fixture::new(MIB, WRITABLE).await;
    assert_eq!(fixture.fallocate(0, 4096, 0).await, Err(Errno::EOPNOTSUPP));
    assert_eq!(fixture.fallocate(MIB, 4096, 0).await, Ok(()));
    let attributes = fixture.getattr().await.attr;
    assert_eq!(attributes.size, MIB + 4096);
    assert!(attributes.blocks >= 8);
    for mode in [KEEP_SIZE, PUNCH_HOLE, 8, 32, 64, PUNCH_HOLE | ZERO_RANGE] {
        assert_eq!(
            fixture.fallocate(0, 4096, mode).await,
            Err(Errno::EOPNOTSUPP),
            "mode {mode}"
        );
    }
    assert_eq!(
        fixture.fallocate(u64::MAX, 2, ZERO_RANGE).await,
        Err(Errno::EFBIG)
    );
    assert_eq!(
        fixture.fallocate(1 << 62, 1 << 62, ZERO_RANGE).await,
        Err(Errno::EFBIG)
    );
}

#[tokio::test]
async fn data_and_holes_are_found() {
    let fixture = Fixture::new(MIB, READ_ONLY).await;
    fixture
        .image_file()
        .write_all_at(&[1; 65536], 256 << 10)
        .unwrap();
    let (data, hole) = (256 * KIB, 320 * KIB);
    for (offset, whence, found) in [
        (0, SEEK_DATA, Ok(data)),
        (0, SEEK_HOLE, Ok(0)),
        (data, SEEK_HOLE, Ok(hole)),
        (data + 77, SEEK_DATA, Ok(data + 77)),
        (hole, SEEK_DATA, Err(Errno::ENXIO)),
        (MIB - 1, SEEK_HOLE, Ok(MIB - 1)),
        (MIB, SEEK_HOLE, Err(Errno::ENXIO)),
        (u64::MAX, SEEK_DATA, Err(Errno::ENXIO)),
        (0, 7, Err(Errno::EINVAL)),
    ] {
        assert_eq!(
            fixture.lseek(offset, whence).await,
            found,
            "lseek({offset}, {whence})"
        );
    }
}

#[tokio::test]
async fn requests_that_need_no_image_have_fixed_answers() {
    let fixture = Fixture::new(MIB, READ_ONLY).await;
    for (request, outcome) in [
        (Request::Lookup(None), Outcome::Failed(Errno::ENOENT)),
        (Request::Unknown, Outcome::Failed(Errno::ENOSYS)),
        (Request::Malformed, Outcome::Failed(Errno::EINVAL)),
        (Request::Release, Outcome::Done),
        (Request::Close { handle: 0 }, Outcome::Done),
        (Request::Forget, Outcome::Silence),
    ] {
        assert_eq!(
            fixture.ask(request, Vec::new()).await,
            outcome,
            "{request:?}"
        );
    }
}
