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

#[test]
fn descriptors_and_threads_do_not_leak_over_many_mounts() {
    mounting(async || {
        let count = || (fs::read_dir("/proc/self/fd").unwrap().count(), contexts());
        let world = World::new().await;
        world.image("n", MIB).await;
        let path = world.mountpoint("e");
        let mut after_first = None;
        for _ in 0..200 {
            world.add_at("e", "n", &path, json!({})).await.unwrap();
            let at = path.clone();
            blocking(move || assert_eq!(size(&at), MIB as u64)).await;
            world.registry.del("e", Safe).await.unwrap();
            after_first.get_or_insert_with(count);
        }
        let (descriptors, threads) = after_first.unwrap();
        assert_eq!(count().0, descriptors);
        assert_eq!(count().1, threads);
        assert_eq!(world.deleted.borrow().len(), 200);
    });
}
