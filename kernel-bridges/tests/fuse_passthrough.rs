//! Passthrough: the kernel reads the image by itself while nobody else has to see that, and never where it would be wrong.

#[expect(dead_code, reason = "some of it is for the other tests")]
mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::errno::Errno;
use nix::libc::O_DIRECT;
use serde_json::{Value, json};
use stord_qmp::from_json;

use support::{MIB, World, blocking, mounting, size};

/// Whether the kernel can; says so otherwise.
async fn can(world: &World) -> bool {
    let path = world.mountpoint("probe");
    let added = world
        .add_at("probe", "n", &path, json!({"passthrough": "on"}))
        .await;
    match added {
        Ok(()) => {
            world.registry.close_all().await;
            true
        }
        Err(error) => {
            assert_eq!(error.message, "FUSE passthrough is not available");
            eprintln!("SKIPPED: needs Linux 6.9 with CONFIG_FUSE_PASSTHROUGH");
            false
        }
    }
}

/// Reads of the image that came to the daemon.
fn reads(world: &World) -> i64 {
    let all = world.graph.query_blockstats();
    let node = all
        .iter()
        .find(|node| node.node_name.as_deref() == Some("n"));
    node.unwrap().stats.rd_operations
}

async fn reopen(world: &World, options: Value) -> Result<(), String> {
    let options = from_json(options).unwrap();
    let reopened = world.graph.blockdev_reopen(vec![options]).await;
    reopened.map_err(|error| error.message)
}

async fn add_node(world: &World, options: Value) {
    let added = world.graph.blockdev_add(from_json(options).unwrap());
    added.await.unwrap();
}

fn open(path: &Path, writable: bool, flags: i32) -> std::io::Result<File> {
    File::options()
        .read(true)
        .write(writable)
        .custom_flags(flags)
        .open(path)
}

#[test]
fn a_read_only_export_is_read_past_the_daemon() {
    mounting(async || {
        let world = World::new().await;
        let image = world.image("n", MIB).await;
        if !can(&world).await {
            return;
        }
        fs::write(&image, [5; MIB]).unwrap();
        let path = world.add("e", "n", json!({})).await.unwrap();
        let before = reads(&world);
        let at = path.clone();
        blocking(move || {
            let file = open(&at, false, 0).unwrap();
            let mut bytes = vec![0; MIB + 1];
            assert_eq!(file.read_at(&mut bytes, 0).unwrap(), MIB);
            assert!(bytes[..MIB] == [5; MIB]);
            assert_eq!(size(&at), MIB as u64);
            // Mappings would let such a file be written.
            let refused = open(&at, true, 0).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::EACCES as i32));
        })
        .await;
        assert_eq!(reads(&world), before);
        let off = json!({"passthrough": "off"});
        let path = world.add("f", "n", off).await.unwrap();
        blocking(move || assert_eq!(fs::read(&path).unwrap().len(), MIB)).await;
        assert!(reads(&world) > before);
        world.registry.close_all().await;
        world.graph.blockdev_del("n").await.unwrap();
    });
}

#[test]
fn writers_are_always_served_by_the_daemon_and_seen_by_readers() {
    mounting(async || {
        let world = World::new().await;
        let image = world.image("n", MIB).await;
        if !can(&world).await {
            return;
        }
        let more = json!({"writable": true, "passthrough": "on"});
        let path = world.add("e", "n", more).await.unwrap();
        blocking(move || {
            for reader_first in [true, false] {
                let open_one = |writable| open(&path, writable, 0).unwrap();
                let (reader, writer) = if reader_first {
                    let reader = open_one(false);
                    (reader, open_one(true))
                } else {
                    let writer = open_one(true);
                    (open_one(false), writer)
                };
                let mut read = [0; 5];
                for bytes in [b"first", b"other"] {
                    writer.write_all_at(bytes, 12345).unwrap();
                    reader.read_exact_at(&mut read, 12345).unwrap();
                    assert_eq!(&read, bytes);
                }
                let past = writer.write_at(b"x", MIB as u64).unwrap_err();
                assert_eq!(past.raw_os_error(), Some(Errno::EIO as i32));
                assert_eq!(size(&path), MIB as u64);
            }
        })
        .await;
        assert_eq!(size(&image), MIB as u64);
        world.registry.close_all().await;
    });
}

#[test]
fn only_what_lies_in_the_file_byte_for_byte_is_read_there() {
    mounting(async || {
        let world = World::new().await;
        let image = world.image("n", MIB).await;
        if !can(&world).await {
            return;
        }
        let mut content = vec![1; 4096];
        content.extend([2; MIB - 4096]);
        fs::write(&image, content).unwrap();
        let window = json!({"driver": "raw", "node-name": "window", "file": "n", "offset": 4096});
        let plain = json!({"driver": "raw", "node-name": "plain", "file": "n"});
        for options in [window, plain] {
            add_node(&world, options).await;
        }
        for (id, node, first, comes_here) in [("w", "window", 2, true), ("p", "plain", 1, false)] {
            let path = world.add(id, node, json!({})).await.unwrap();
            let totals = || {
                let all = world.graph.query_blockstats();
                all.iter().map(|node| node.stats.rd_operations).sum::<i64>()
            };
            let before = totals();
            assert_eq!(blocking(move || fs::read(path).unwrap()[0]).await, first);
            assert_eq!(totals() > before, comes_here, "{node}");
        }
        world.registry.close_all().await;
    });
}

#[test]
fn the_bytes_stay_where_they_are_while_a_file_is_open_past_the_daemon() {
    mounting(async || {
        let world = World::new().await;
        let image = world.image("n", MIB).await;
        if !can(&world).await {
            return;
        }
        let mut content = vec![1; 4096];
        content.extend([2; MIB - 4096]);
        fs::write(&image, content).unwrap();
        let raw =
            |offset: u64| json!({"driver": "raw", "node-name": "r", "file": "n", "offset": offset});
        add_node(&world, raw(0)).await;
        let path = world.add("e", "r", json!({})).await.unwrap();
        let at = path.clone();
        let file = blocking(move || open(&at, false, 0).unwrap()).await;
        let refused = reopen(&world, raw(4096)).await.unwrap_err();
        assert_eq!(
            refused,
            "Node 'r' is in use: the kernel reads its file without asking for block export 'e'"
        );
        // Other options do no harm.
        reopen(&world, raw(0)).await.unwrap();
        reopen(
            &world,
            json!({"driver": "file", "node-name": "n", "filename": image}),
        )
        .await
        .unwrap();
        let file = blocking(move || {
            let mut byte = [0];
            file.read_exact_at(&mut byte, 0).unwrap();
            assert_eq!(byte, [1]);
            file
        })
        .await;
        blocking(move || drop(file)).await;
        // The kernel tells of the end when it gets round to it.
        let mut reopened = reopen(&world, raw(4096)).await;
        for _ in 0..10_000 {
            if reopened.is_ok() {
                break;
            }
            tokio::task::yield_now().await;
            reopened = reopen(&world, raw(4096)).await;
        }
        reopened.unwrap();
        assert_eq!(blocking(move || fs::read(path).unwrap()[0]).await, 2);
        world.registry.close_all().await;
    });
}

#[test]
fn direct_io_and_the_page_cache_are_used_as_the_node_says() {
    mounting(async || {
        let world = World::new().await;
        let image = world.image("n", MIB).await;
        if !can(&world).await {
            return;
        }
        world.graph.blockdev_del("n").await.unwrap();
        let direct = json!({"driver": "file", "node-name": "n", "filename": image, "cache": {"direct": true}});
        add_node(&world, direct).await;
        let path = world.add("e", "n", json!({})).await.unwrap();
        let before = reads(&world);
        let at = path.clone();
        blocking(move || assert_eq!(fs::read(at).unwrap().len(), MIB)).await;
        let through_us = reads(&world);
        assert!(through_us > before);
        blocking(move || {
            let file = open(&path, false, O_DIRECT).unwrap();
            // Direct I/O wants aligned memory: one page of a larger piece.
            let mut bytes = vec![7; 8192];
            let start = bytes.as_ptr().align_offset(4096);
            file.read_exact_at(&mut bytes[start..start + 4096], 4096)
                .unwrap();
            assert!(bytes[start..start + 4096] == [0; 4096]);
        })
        .await;
        assert_eq!(reads(&world), through_us);
        world.registry.close_all().await;
    });
}
