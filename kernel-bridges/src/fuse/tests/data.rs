//! Reads, writes and flushes.

use super::*;

#[tokio::test]
async fn written_data_is_read_back_and_in_the_image() {
    let fixture = Fixture::new(MIB, WRITABLE).await;
    let bytes: Vec<u8> = (0..9000u32).map(|i| (i % 251).to_le_bytes()[0]).collect();
    assert_eq!(fixture.write(70_001, bytes.clone()).await, Ok(9000));
    assert_eq!(
        fixture.read(70_001, 9000).await,
        Outcome::Payload(bytes.clone())
    );
    assert_eq!(fixture.image()[70_001..79_001], bytes);
}

#[tokio::test]
async fn reads_end_at_the_end_of_the_image() {
    let fixture = Fixture::new(MIB, READ_ONLY).await;
    assert_eq!(
        fixture.read(MIB - 10, 4096).await,
        Outcome::Payload(vec![0; 10])
    );
    for offset in [MIB, MIB + 1, u64::MAX] {
        assert_eq!(
            fixture.read(offset, 4096).await,
            Outcome::Payload(Vec::new()),
            "at {offset}"
        );
    }
}

#[tokio::test]
async fn writes_are_cut_off_at_the_end_of_the_image() {
    let fixture = Fixture::new(MIB, WRITABLE).await;
    assert_eq!(fixture.write(MIB - 10, vec![1; 100]).await, Ok(10));
    assert_eq!(fixture.write(MIB, vec![1; 100]).await, Err(Errno::EIO));
    assert_eq!(fixture.write(u64::MAX, vec![1; 2]).await, Err(Errno::EFBIG));
    assert_eq!(fixture.image().len() as u64, MIB);
    assert_eq!(fixture.image()[(1 << 20) - 10..], [1; 10]);
}

#[tokio::test]
async fn growable_images_grow_under_writes() {
    let fixture = Fixture::new(MIB, GROWABLE).await;
    assert_eq!(fixture.write(2 * MIB, vec![1; 4096]).await, Ok(4096));
    assert_eq!(fixture.getattr().await.attr.size, 2 * MIB + 4096);
    assert_eq!(
        fixture.read(2 * MIB - 2, 4).await,
        Outcome::Payload(vec![0, 0, 1, 1])
    );
}

#[tokio::test]
async fn a_read_only_export_takes_no_writes() {
    let fixture = Fixture::new(MIB, READ_ONLY).await;
    assert_eq!(fixture.write(0, vec![1; 512]).await, Err(Errno::EACCES));
    assert_eq!(fixture.truncate(0).await, Err(Errno::EACCES));
    assert_eq!(fixture.fallocate(0, 512, 3).await, Err(Errno::EACCES));
}

#[tokio::test]
async fn a_request_larger_than_its_payload_is_refused() {
    let fixture = Fixture::new(MIB, WRITABLE).await;
    let request = Request::Write {
        offset: 0,
        size: 4097,
    };
    assert_eq!(
        fixture.ask(request, vec![1; 4096]).await,
        Outcome::Failed(Errno::EINVAL)
    );
    let request = Request::Read {
        offset: 0,
        size: u32::MAX,
    };
    assert_eq!(
        fixture.ask(request, vec![1; 4096]).await,
        Outcome::Failed(Errno::EINVAL)
    );
}

#[tokio::test]
async fn flushing_succeeds_clean_and_dirty() {
    let fixture = Fixture::new(MIB, WRITABLE).await;
    let waits = |fixture: &Fixture| {
        let nothing = IoBuffer::zeroed(0);
        fixture
            .file_system
            .try_handle(ROOT_ID, &Request::Flush, &nothing)
            .is_none()
    };
    assert!(!waits(&fixture));
    assert_eq!(fixture.write(0, vec![1; 512]).await, Ok(512));
    assert!(waits(&fixture));
    assert_eq!(fixture.ask(Request::Flush, Vec::new()).await, Outcome::Done);
    assert!(!waits(&fixture));
    assert_eq!(fixture.ask(Request::Fsync, Vec::new()).await, Outcome::Done);
}

#[tokio::test]
async fn a_durable_write_is_written() {
    let presentation = Presentation {
        writethrough: true,
        ..WRITABLE
    };
    let fixture = Fixture::new(MIB, presentation).await;
    assert_eq!(fixture.write(5, vec![7; 3]).await, Ok(3));
    assert_eq!(fixture.image()[4..9], [0, 7, 7, 7, 0]);
}
