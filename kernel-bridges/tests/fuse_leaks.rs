//! That exports leave nothing behind; alone in its process, so that what it counts is its own.

#[expect(dead_code, reason = "some of it is for the other tests")]
mod support;

use std::fs;

use serde_json::json;
use stord_qmp::schema::export::BlockExportRemoveMode::Safe;

use support::{MIB, World, blocking, mounting, size};

/// Threads of I/O contexts; those for blocking work come and go.
fn contexts() -> usize {
    let threads = fs::read_dir("/proc/self/task").unwrap();
    threads
        .filter(|thread| {
            let name = fs::read(thread.as_ref().unwrap().path().join("comm"));
            name.is_ok_and(|name| name.starts_with(b"io-"))
        })
        .count()
}

/// Resident memory of this process, in KiB.
fn memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let value = line.and_then(|line| line.split_whitespace().nth(1));
    value.expect("the kernel tells it").parse().unwrap()
}

/// How many mounts are made; `STORD_CYCLES` asks for another number than that of a usual run.
fn cycles() -> usize {
    let wanted = std::env::var("STORD_CYCLES").unwrap_or_default();
    wanted.parse().unwrap_or(1000)
}

#[test]
fn nothing_leaks_over_many_mounts() {
    mounting(async || {
        let count = || (fs::read_dir("/proc/self/fd").unwrap().count(), contexts());
        let cycles = cycles();
        let world = World::new().await;
        world.image("n", MIB).await;
        let path = world.mountpoint("e");
        let mut after_first = None;
        let mut after_start = 0;
        for cycle in 0..cycles {
            world.add_at("e", "n", &path, json!({})).await.unwrap();
            let at = path.clone();
            blocking(move || assert_eq!(size(&at), MIB as u64)).await;
            world.registry.del("e", Safe).await.unwrap();
            after_first.get_or_insert_with(count);
            if cycle == cycles / 3 {
                after_start = memory();
            }
        }
        let (descriptors, threads) = after_first.unwrap();
        assert_eq!(count().0, descriptors);
        assert_eq!(count().1, threads);
        assert_eq!(world.deleted.borrow().len(), cycles);
        let grown = memory().saturating_sub(after_start);
        println!("{cycles} mounts: {grown} KiB more than after a third of them");
        assert!(grown < 1024, "{grown} KiB more than after a third of them");
    });
}
