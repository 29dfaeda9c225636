//! FUSE exports in the kernel: their life, from mount to the last of their users, under load.

mod support;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use serde_json::{Value, json};
use stord_block::Permissions;
use stord_block::graph::Claim;
use stord_qmp::Error;
use stord_qmp::schema::export::BlockExportRemoveMode::{Hard, Safe};

use support::{MIB, World, blocking, is_mounted, mounting, size};

/// A thread that writes and reads back, until an error or `stop`. Gives the number of rounds and the error.
fn load(path: &Path, lane: u8, stop: &Arc<AtomicBool>) -> JoinHandle<(usize, Option<io::Error>)> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let stop = Arc::clone(stop);
    thread::spawn(move || {
        let base = u64::from(lane) * MIB as u64;
        let mut rounds = 0;
        let mut read = vec![0; 8192];
        while !stop.load(Ordering::Relaxed) {
            let tag = u8::try_from(rounds % 251).unwrap() ^ lane;
            let at = base + (rounds as u64 * 8192) % (MIB as u64 - 8192);
            let written = vec![tag; 8192];
            let result = file
                .write_all_at(&written, at)
                .and_then(|()| file.read_exact_at(&mut read, at));
            if let Err(error) = result {
                return (rounds, Some(error));
            }
            assert!(read == written, "lane {lane} reads back something else");
            rounds += 1;
        }
        (rounds, None)
    })
}

#[test]
fn parallel_writers_see_their_own_data() {
    mounting(async || {
        let world = World::new().await;
        let image = world.image("n", 8 * MIB).await;
        let path = world
            .add("e", "n", json!({"writable": true}))
            .await
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = blocking(move || {
            let loads: Vec<_> = (0..8).map(|lane| load(&path, lane, &stop)).collect();
            let file = File::open(&path).unwrap();
            // Enough reads beside them to have every queue at work.
            let mut buffer = vec![0; 65536];
            for round in 0..2000u64 {
                file.read_exact_at(&mut buffer, round % 100 * 65536)
                    .unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            let ended = loads.into_iter().map(|load| load.join().unwrap());
            ended
                .map(|(rounds, error)| {
                    assert!(error.is_none(), "{error:?}");
                    rounds
                })
                .sum::<usize>()
        })
        .await;
        assert!(rounds >= 8);
        world.registry.close_all().await;
        assert_eq!(size(&image), 8 * MIB as u64);
        assert_eq!(*world.deleted.borrow(), ["e"]);
    });
}

#[test]
fn removal_under_load_ends_the_users_and_frees_everything() {
    for mode in [Safe, Hard] {
        mounting(async || {
            let world = World::new().await;
            world.image("n", 8 * MIB).await;
            let path = world
                .add("e", "n", json!({"writable": true}))
                .await
                .unwrap();
            let stop = Arc::new(AtomicBool::new(false));
            let loads = {
                let (path, stop) = (path.clone(), Arc::clone(&stop));
                blocking(move || {
                    (0..4)
                        .map(|lane| load(&path, lane, &stop))
                        .collect::<Vec<_>>()
                })
                .await
            };
            world.registry.del("e", mode).await.unwrap();
            let ended = blocking(move || {
                loads
                    .into_iter()
                    .map(|load| load.join().unwrap())
                    .collect::<Vec<_>>()
            })
            .await;
            for (_, error) in ended {
                let errno = error.expect("the file is gone").raw_os_error();
                let errno = Errno::from_raw(errno.unwrap());
                assert!(
                    matches!(errno, Errno::ENOTCONN | Errno::ECONNABORTED),
                    "{errno}"
                );
            }
            assert!(!is_mounted(&path));
            assert_eq!(size(&path), 0);
            assert_eq!(*world.deleted.borrow(), ["e"]);
            assert!(world.registry.query().is_empty());
            world.graph.blockdev_del("n").await.unwrap();
        });
    }
}

#[test]
fn unmounting_from_outside_ends_the_export() {
    mounting(async || {
        let world = World::new().await;
        world.image("n", MIB).await;
        let path = world.add("e", "n", json!({})).await.unwrap();
        let at = path.clone();
        blocking(move || umount2(&at, MntFlags::empty()).unwrap()).await;
        world.until_deleted(1).await;
        assert!(world.registry.query().is_empty());
        world.graph.blockdev_del("n").await.unwrap();
        assert_eq!(size(&path), 0);
    });
}

#[test]
fn an_open_file_survives_a_lazy_unmount_until_it_is_closed() {
    mounting(async || {
        let world = World::new().await;
        world.image("n", MIB).await;
        let path = world
            .add("e", "n", json!({"writable": true}))
            .await
            .unwrap();
        let file = blocking(move || {
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            umount2(&path, MntFlags::MNT_DETACH).unwrap();
            file.write_all_at(b"still here", 4096).unwrap();
            file
        })
        .await;
        assert_eq!(world.registry.query().len(), 1);
        blocking(move || drop(file)).await;
        world.until_deleted(1).await;
    });
}

#[test]
fn removal_after_a_lazy_unmount_ends_those_who_have_the_file_open() {
    mounting(async || {
        let world = World::new().await;
        world.image("n", MIB).await;
        let path = world
            .add("e", "n", json!({"passthrough": "off"}))
            .await
            .unwrap();
        let file = blocking(move || {
            let file = File::open(&path).unwrap();
            umount2(&path, MntFlags::MNT_DETACH).unwrap();
            file
        })
        .await;
        world.registry.del("e", Safe).await.unwrap();
        world.until_deleted(1).await;
        world.graph.blockdev_del("n").await.unwrap();
        let ended = blocking(move || file.read_at(&mut [0; 512], 0)).await;
        assert!(ended.is_err());
    });
}

#[test]
fn any_number_of_queues_serves() {
    mounting(async || {
        for queues in [1, 3, 64] {
            let world = World::new().await;
            world.image("n", 8 * MIB).await;
            let more = json!({"writable": true, "num-queues": queues});
            let path = world.add("e", "n", more).await.unwrap();
            let stop = Arc::new(AtomicBool::new(false));
            blocking(move || {
                let loads: Vec<_> = (0..4).map(|lane| load(&path, lane, &stop)).collect();
                for _ in 0..10 {
                    assert_eq!(fs::read(&path).unwrap().len(), 8 * MIB);
                }
                stop.store(true, Ordering::Relaxed);
                for load in loads {
                    assert!(load.join().unwrap().1.is_none());
                }
            })
            .await;
            world.registry.close_all().await;
        }
        let world = World::new().await;
        world.image("n", MIB).await;
        for queues in [0, 65] {
            let refused = world.add("e", "n", json!({"num-queues": queues})).await;
            let message = refused.unwrap_err().message;
            assert_eq!(message, "num-queues must be between 1 and 64");
        }
    });
}

#[test]
fn large_requests_beside_small_ones_find_their_data() {
    mounting(async || {
        let world = World::new().await;
        world.image("n", 64 * MIB).await;
        let path = world
            .add("e", "n", json!({"writable": true}))
            .await
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        blocking(move || {
            let small: Vec<_> = (0..4).map(|lane| load(&path, lane, &stop)).collect();
            // Enough at a time to have entries taken over by another context.
            thread::scope(|scope| {
                for lane in 8..24u8 {
                    let path = &path;
                    scope.spawn(move || {
                        let file = File::options().read(true).write(true).open(path).unwrap();
                        let at = u64::from(lane) * 2 * MIB as u64;
                        let mut read = vec![0; MIB];
                        for round in 0..8u8 {
                            let written = vec![lane ^ round; MIB];
                            file.write_all_at(&written, at).unwrap();
                            file.read_exact_at(&mut read, at).unwrap();
                            assert!(read == written, "lane {lane}, round {round}");
                        }
                    });
                }
            });
            stop.store(true, Ordering::Relaxed);
            for load in small {
                let (rounds, error) = load.join().unwrap();
                assert!(rounds > 0 && error.is_none(), "{error:?}");
            }
        })
        .await;
        world.registry.close_all().await;
    });
}

#[test]
fn an_export_can_lie_over_its_own_image() {
    mounting(async || {
        let world = World::new().await;
        let image = world.image("n", MIB).await;
        world
            .add_at(
                "e",
                "n",
                &image,
                json!({"writable": true, "growable": true}),
            )
            .await
            .unwrap();
        let path = image.clone();
        blocking(move || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap();
            file.write_all_at(b"through the mount", 2 * MIB as u64)
                .unwrap();
            assert_eq!(size(&path), 2 * MIB as u64 + 17);
        })
        .await;
        world.registry.close_all().await;
        let content = fs::read(&image).unwrap();
        assert_eq!(content[2 * MIB..], *b"through the mount");
    });
}

#[test]
fn fifty_exports_of_one_node_at_once() {
    mounting(async || {
        let world = World::new().await;
        world.image("n", MIB).await;
        let mut paths = Vec::new();
        for number in 0..50 {
            paths.push(
                world
                    .add(&format!("e{number}"), "n", json!({}))
                    .await
                    .unwrap(),
            );
        }
        let seen = paths.clone();
        blocking(move || {
            for path in seen {
                assert_eq!(fs::read(path).unwrap().len(), MIB);
            }
        })
        .await;
        world.registry.close_all().await;
        assert_eq!(world.deleted.borrow().len(), 50);
        assert!(paths.iter().all(|path| !is_mounted(path)));
    });
}

#[test]
fn only_a_growable_export_keeps_others_from_forbidding_resizes() {
    mounting(async || {
        let world = World::new().await;
        let image = world.image("n", MIB).await;
        let path = world
            .add("e", "n", json!({"writable": true}))
            .await
            .unwrap();
        let set_size = |path: &Path, size: u64| {
            let file = OpenOptions::new().write(true).open(path).unwrap();
            blocking(move || file.set_len(size))
        };
        set_size(&path, 2 * MIB as u64).await.unwrap();
        assert_eq!(size(&image), 2 * MIB as u64);
        let no_resizes = Claim {
            permissions: Permissions::CONSISTENT_READ,
            shared: Permissions::all() - Permissions::RESIZE,
        };
        let other = world.graph.attach("n", "job", no_resizes).await.unwrap();
        let refused = set_size(&path, 3 * MIB as u64).await.unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::EPERM as i32));
        assert_eq!(size(&image), 2 * MIB as u64);
        let growable = json!({"writable": true, "growable": true});
        let message = world.add("g", "n", growable).await.unwrap_err().message;
        assert!(message.contains("'resize'"), "{message}");
        world.graph.detach(other).await;
        set_size(&path, 4096).await.unwrap();
        assert_eq!(size(&image), 4096);
        world.registry.close_all().await;
    });
}

#[test]
fn resizing_shows_at_once() {
    mounting(async || {
        let world = World::new().await;
        world.image("n", MIB).await;
        let path = world.add("e", "n", json!({})).await.unwrap();
        let at = path.clone();
        // The kernel holds the attributes for a second from here on.
        assert_eq!(blocking(move || size(&at)).await, MIB as u64);
        world.graph.resize("n", 3 * MIB as u64).await.unwrap();
        let seen = blocking(move || {
            (0..100_000)
                .map(|_| size(&path))
                .find(|size| *size != MIB as u64)
        })
        .await;
        assert_eq!(seen, Some(3 * MIB as u64));
    });
}

#[test]
fn failures_name_what_is_wrong_and_leave_nothing() {
    mounting(async || {
        let world = World::new().await;
        world.image("n", MIB).await;
        let message = |result: Result<(), Error>| result.unwrap_err().message;
        let dir = world.dir.path().to_owned();
        let absent = dir.join("absent");
        let path = world.mountpoint("m");
        let at = async |id: &str, node: &str, path: &Path, more: Value| {
            message(world.add_at(id, node, path, more).await)
        };
        assert_eq!(
            at("e", "n", &absent, json!({})).await,
            format!(
                "Failed to stat '{}': No such file or directory",
                absent.display()
            )
        );
        assert_eq!(
            at("e", "n", &dir, json!({})).await,
            format!("'{}' is not a regular file", dir.display())
        );
        for id in ["", "1x", "a b", "\u{e9}"] {
            assert_eq!(
                at(id, "n", &path, json!({})).await,
                "Invalid block export id"
            );
        }
        assert_eq!(
            at("e", "absent", &path, json!({})).await,
            "Cannot find device='' nor node-name='absent'"
        );
        assert_eq!(
            at("e", "n", &path, json!({"iothread": "absent"})).await,
            "iothread \"absent\" not found"
        );
        assert_eq!(
            message(world.registry.del("e", Safe).await),
            "Export 'e' is not found"
        );
        world.add_at("e", "n", &path, json!({})).await.unwrap();
        assert_eq!(
            at("e", "n", &path, json!({})).await,
            "Block export id 'e' is already in use"
        );
        assert_eq!(
            at("f", "n", &path, json!({})).await,
            format!("There already is a FUSE export on '{}'", path.display())
        );
        world.registry.close_all().await;
        assert_eq!(*world.deleted.borrow(), ["e"]);
        world.graph.blockdev_del("n").await.unwrap();
    });
}
