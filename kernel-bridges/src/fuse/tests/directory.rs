//! A directory of two files over two images, and what goes from one to the other.

use super::*;
use crate::fuse::abi::{CopyFileRangeOut, Dirent, EntryOut, IoctlOutNumber, IoctlOutSize, opcode};
use crate::fuse::request::CopyFileRange;

const FIRST: u64 = Directory::FIRST_FILE;
const SECOND: u64 = FIRST + 1;

/// A directory with the files `one`, of 1 MiB, and `two`, of 512 KiB.
async fn directory(presentation: Presentation) -> Fixture {
    let mut fixture = Fixture::empty();
    let one = fixture.add_file(FIRST, MIB, presentation).await;
    let two = fixture.add_file(SECOND, MIB / 2, presentation).await;
    let directory = Directory::new(vec!["one".to_owned(), "two".to_owned()], true);
    fixture.file_system = Arc::new(FileSystem::of_directory(directory, vec![one, two]));
    fixture
}

async fn lookup(fixture: &Fixture, name: &str) -> Result<EntryOut, Errno> {
    let mut arguments = [0; 128];
    arguments[..name.len()].copy_from_slice(name.as_bytes());
    let request = Request::parse(opcode::LOOKUP, &arguments);
    fixture
        .ask_node(ROOT_ID, request, Vec::new())
        .await
        .structure()
}

/// The names in a listing that begins after `offset` entries and has room for `size` bytes.
async fn list(fixture: &Fixture, offset: u64, size: u32) -> Vec<(String, u64)> {
    let request = Request::Readdir { offset, size };
    let outcome = fixture.ask_node(ROOT_ID, request, vec![0xaa; size as usize]);
    let Outcome::Payload(mut bytes) = outcome.await else {
        panic!("no listing");
    };
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (entry, rest) = Dirent::read_from_prefix(&bytes).unwrap();
        let name = String::from_utf8(rest[..entry.namelen as usize].to_vec()).unwrap();
        found.push((name, entry.ino));
        let length = (24 + entry.namelen as usize).next_multiple_of(8);
        bytes.drain(..length);
    }
    found
}

#[tokio::test]
async fn names_lead_to_files() {
    let fixture = directory(WRITABLE).await;
    let entry = lookup(&fixture, "two").await.unwrap();
    assert_eq!((entry.nodeid, entry.attr.ino), (SECOND, SECOND));
    assert_eq!((entry.attr.size, entry.attr.mode), (MIB / 2, 0o100_600));
    assert_eq!(lookup(&fixture, "one").await.unwrap().nodeid, FIRST);
    for absent in ["", "on", "one ", "onetwo"] {
        assert_eq!(lookup(&fixture, absent).await.err(), Some(Errno::ENOENT));
    }
    let root = fixture.getattr().await.attr;
    assert_eq!((root.mode, root.nlink), (0o040_500, 2));
    let gone = fixture.ask_node(9, Request::Getattr, Vec::new()).await;
    assert_eq!(gone, Outcome::Failed(Errno::ENOENT));
}

#[tokio::test]
async fn a_listing_can_be_read_in_parts() {
    let fixture = directory(WRITABLE).await;
    let all = [
        (".".to_owned(), ROOT_ID),
        ("..".to_owned(), ROOT_ID),
        ("one".to_owned(), FIRST),
        ("two".to_owned(), SECOND),
    ];
    assert_eq!(list(&fixture, 0, 4096).await, all);
    assert_eq!(list(&fixture, 2, 4096).await, all[2..]);
    assert_eq!(list(&fixture, 0, 70).await, all[..2]);
    assert_eq!(list(&fixture, 4, 4096).await, []);
    assert_eq!(list(&fixture, u64::MAX, 4096).await, []);
}

#[tokio::test]
async fn requests_reach_the_file_they_name() {
    let fixture = directory(WRITABLE).await;
    let write = Request::Write { offset: 0, size: 3 };
    fixture.ask_node(SECOND, write, b"two".to_vec()).await;
    let read = Request::Read { offset: 0, size: 3 };
    let content = async |node| fixture.ask_node(node, read, vec![0; 3]).await;
    assert_eq!(content(FIRST).await, Outcome::Payload(vec![0; 3]));
    assert_eq!(content(SECOND).await, Outcome::Payload(b"two".to_vec()));
    assert_eq!(content(ROOT_ID).await, Outcome::Failed(Errno::EISDIR));
}

#[tokio::test]
async fn nobody_changes_the_directory() {
    let fixture = directory(WRITABLE).await;
    let ask = async |request| fixture.ask_node(ROOT_ID, request, Vec::new()).await;
    assert_eq!(
        ask(Request::ChangeDirectory).await,
        Outcome::Failed(Errno::EPERM)
    );
    let mode = |mode| SetattrIn {
        mode,
        ..SetattrIn::default()
    };
    let changed = fixture.setattr(SetattrValid::MODE, mode(0o755)).await;
    assert_eq!(changed.err(), Some(Errno::EROFS));
    let changed = fixture.setattr(SetattrValid::MODE, mode(0o555)).await;
    assert_eq!(changed.unwrap().attr.mode, 0o040_555);
}

async fn copy(fixture: &Fixture, from: u64, to: u64, length: u64) -> Result<u64, Errno> {
    let request = Request::CopyFileRange(CopyFileRange {
        from,
        target: SECOND,
        to,
        length,
        wide: true,
    });
    let outcome = fixture.ask_node(FIRST, request, Vec::new()).await;
    outcome
        .structure::<CopyFileRangeOut>()
        .map(|out| out.bytes_copied)
}

#[tokio::test]
async fn copies_end_with_the_source_and_with_the_target() {
    let fixture = directory(WRITABLE).await;
    let write = Request::Write {
        offset: 700_000,
        size: 5000,
    };
    fixture.ask_node(FIRST, write, vec![7; 5000]).await;
    let read = Request::Read {
        offset: 100_000,
        size: 5001,
    };
    assert_eq!(copy(&fixture, 600_000, 0, 400_000).await, Ok(400_000));
    let mut wanted = vec![7; 5000];
    wanted.push(0);
    assert_eq!(
        fixture.ask_node(SECOND, read, vec![1; 5001]).await,
        Outcome::Payload(wanted)
    );
    assert_eq!(copy(&fixture, MIB - 10, 0, 4096).await, Ok(10));
    assert_eq!(copy(&fixture, MIB, 0, 4096).await, Ok(0));
    assert_eq!(copy(&fixture, 0, MIB / 2 - 100, 4096).await, Ok(100));
    assert_eq!(copy(&fixture, 0, MIB / 2, 1).await, Err(Errno::EIO));
    let growing = directory(GROWABLE).await;
    assert_eq!(copy(&growing, 0, MIB / 2 - 100, 4096).await, Ok(4096));
    let grown = growing.ask_node(SECOND, Request::Getattr, Vec::new()).await;
    let grown = grown.structure::<AttrOut>().unwrap().attr.size;
    assert_eq!(grown, MIB / 2 - 100 + 4096);
    let read_only = directory(READ_ONLY).await;
    assert_eq!(copy(&read_only, 0, 0, 1).await, Err(Errno::EACCES));
}

#[tokio::test]
async fn tools_can_ask_for_sizes() {
    let fixture = directory(READ_ONLY).await;
    let ask = async |command| {
        let request = Request::Ioctl { command };
        fixture.ask_node(SECOND, request, Vec::new()).await
    };
    let size = ask(0x8008_1272).await.structure::<IoctlOutSize>().unwrap();
    assert_eq!((size.out.result, size.value), (0, MIB / 2));
    let block = ask(0x8008_1270)
        .await
        .structure::<IoctlOutNumber>()
        .unwrap();
    assert_eq!((block.out.result, block.value), (0, 4096));
    assert_eq!(ask(0x1268).await, Outcome::Failed(Errno::ENOTTY));
}
