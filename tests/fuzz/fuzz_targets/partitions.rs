//! The beginning and the end of a disk: partitions that are found lie inside it, and no table takes long to read.
#![no_main]

use std::cell::Cell;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use libfuzzer_sys::fuzz_target;
use stord_aio::Errno;

/// What the module needs of the daemon.
mod report {
    pub fn reason(error: &std::io::Error) -> String {
        error.to_string()
    }
}

mod mount {
    pub fn size_text(bytes: u64) -> String {
        bytes.to_string()
    }
}

#[path = "../../../src/mount/partition/mod.rs"]
#[allow(dead_code)]
mod partition;

/// The middle of the disk reads as zeroes.
const SIZE: u64 = 1 << 30;

fuzz_target!(|data: &[u8]| {
    let (head, tail) = data.split_at(data.len() / 2);
    let reads = Cell::new(0);
    let disk = partition::Disk {
        size: SIZE,
        read: async |offset: u64, len: usize| {
            reads.set(reads.get() + 1);
            assert!(reads.get() < 2000 && len <= 1 << 20);
            let byte = |at: u64| {
                let from_end = at.checked_sub(SIZE - tail.len() as u64);
                match from_end {
                    Some(at) => tail[at as usize],
                    None => head.get(at as usize).copied().unwrap_or(0),
                }
            };
            Ok::<Vec<u8>, Errno>((offset..offset + len as u64).map(byte).collect())
        },
    };
    let mut found = pin!(disk.table());
    let Poll::Ready(found) = found.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
        panic!("nothing is waited for");
    };
    for partition in found.map_or_else(|_| Vec::new(), |table| table.0) {
        assert!(partition.start > 0 && partition.len > 0);
        assert!(partition.start.checked_add(partition.len).is_some_and(|end| end <= SIZE));
    }
});
