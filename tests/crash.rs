//! `kill -9` of the daemon under write load: what was synced is there, what was not is old or new but never something
//! else, and the image is not corrupt.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use rand::RngExt;

use crate::needs;
use crate::support::daemon::{Daemon, fuse_args, is_qemu};
use crate::support::direct::Aligned;
use crate::support::model::{noise, rng};
use crate::support::{Scratch, direct, eventually, mounts, qemu};

const BLOCK: usize = 4096;
const BLOCKS: usize = 2048;
const WRITERS: usize = 4;

/// What one block may hold: everything from the last synced content on.
#[derive(Clone, Default)]
struct History {
    /// Seeds of the contents written, oldest first; 0 is a block of zeroes.
    possible: Vec<u64>,
}

fn block_of(seed: u64) -> Vec<u8> {
    if seed == 0 {
        vec![0; BLOCK]
    } else {
        noise(seed, BLOCK)
    }
}

/// Writes, zeroes and syncs the blocks whose number is `number` modulo the writers, until the daemon is gone.
fn write_until_killed(
    mount: &Path,
    number: usize,
    seed: u64,
    histories: &Mutex<Vec<History>>,
    killed: &AtomicBool,
    syncs: &AtomicUsize,
) {
    let file = direct::open(mount, true);
    let mut rng = rng(seed);
    let mut unsynced: Vec<usize> = Vec::new();
    loop {
        let block = rng.random_range(0..BLOCKS / WRITERS) * WRITERS + number;
        let content = if rng.random_bool(0.2) {
            0
        } else {
            rng.random::<u64>() | 1
        };
        // What may be on the disk is written down before it can get there.
        histories.lock().unwrap()[block].possible.push(content);
        unsynced.push(block);
        let at = block * BLOCK;
        let punch = rng.random::<bool>() && !is_qemu(); // which refuses to punch less than a cluster
        let done = if content == 0 && punch {
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let at = i64::try_from(at).unwrap();
            fallocate(&file, mode, at, i64::try_from(BLOCK).unwrap()).map_err(Into::into)
        } else {
            file.write_all_at(Aligned::copy_of(&block_of(content)).as_ref(), at as u64)
        };
        if let Err(error) = done {
            assert!(killed.load(Ordering::SeqCst), "before the crash: {error}");
            return;
        }
        if rng.random_bool(0.1) {
            if let Err(error) = file.sync_data() {
                assert!(killed.load(Ordering::SeqCst), "before the crash: {error}");
                return;
            }
            syncs.fetch_add(1, Ordering::SeqCst);
            let mut histories = histories.lock().unwrap();
            for block in unsynced.drain(..) {
                let possible = &mut histories[block].possible;
                let last = possible.len() - 1;
                possible.drain(..last);
            }
        }
    }
}

fn crash_and_verify(create: &str, node: &str, backing: bool, seed: u64) {
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    let size = BLOCKS * BLOCK;
    let mut options = create.to_owned();
    let mut histories = vec![History { possible: vec![0] }; BLOCKS];
    if backing {
        // Every block of the backing file is the noise of its own number.
        let content: Vec<u8> = (0..BLOCKS as u64)
            .flat_map(|number| block_of(number + 1))
            .collect();
        let base = scratch.file("base.raw", &content);
        if !options.is_empty() {
            options.push(',');
        }
        options.push_str(&format!("backing_file={},backing_fmt=raw", base.display()));
        for (number, history) in histories.iter_mut().enumerate() {
            history.possible = vec![number as u64 + 1];
        }
    }
    qemu::create(&image, size as u64, &options);
    let mount = scratch.empty_file("mount");
    let args = fuse_args(&image, "qcow2", node, &mount, ",writable=on");
    let histories = Mutex::new(histories);

    for round in 0..3 {
        let mut daemon = Daemon::start(&scratch, &args);
        let killed = AtomicBool::new(false);
        let writers = if is_qemu() { 1 } else { WRITERS };
        let syncs = AtomicUsize::new(0);
        thread::scope(|scope| {
            let (mount, histories, killed, syncs) = (&mount, &histories, &killed, &syncs);
            for number in 0..writers {
                let seed = seed * 1000 + round * 10 + number as u64;
                scope.spawn(move || {
                    write_until_killed(mount, number, seed, histories, killed, syncs);
                });
            }
            eventually("something is synced", 60, || {
                syncs.load(Ordering::SeqCst) > 3
            });
            // Not a wait for something to become true: the moment of the crash is to be any moment.
            thread::sleep(Duration::from_millis((seed * 131 + round * 97) % 300));
            killed.store(true, Ordering::SeqCst);
            daemon.kill_hard();
        });
        mounts::detach(&mount);

        // An image with lazy refcounts says that its refcounts are stale, and is mended by whoever opens it next.
        if create.contains("lazy_refcounts") {
            Daemon::start(&scratch, &args).stop();
        }
        qemu::assert_no_corruption(&image);
        let content = qemu::content(&scratch, &image, "qcow2");
        for (number, history) in histories.lock().unwrap().iter_mut().enumerate() {
            let got = &content[number * BLOCK..(number + 1) * BLOCK];
            let found = history
                .possible
                .iter()
                .rev()
                .find(|seed| block_of(**seed) == got);
            let Some(found) = found.copied() else {
                panic!(
                    "round {round}: block {number} holds none of the {} contents it may hold: {:02x?}...",
                    history.possible.len(),
                    &got[..16]
                );
            };
            // From here on this is what the block holds.
            history.possible = vec![found];
        }
    }
    // What was left behind does not keep the next daemon from working, nor from closing the image cleanly.
    let daemon = Daemon::start(&scratch, &args);
    let file = OpenOptions::new().write(true).open(&mount).unwrap();
    file.write_all_at(&block_of(1), 0).unwrap();
    drop(file);
    daemon.stop();
    qemu::assert_no_corruption(&image);
}

#[test]
fn default_image() {
    needs!(root, "qemu-img");
    for seed in 1..4 {
        crash_and_verify("", ",discard=unmap", false, seed);
    }
}

#[test]
fn small_clusters() {
    needs!(root, "qemu-img");
    crash_and_verify("cluster_size=512", ",discard=unmap", false, 11);
    crash_and_verify("cluster_size=4096,compat=0.10", ",discard=unmap", false, 12);
}

#[test]
fn over_a_backing_file() {
    needs!(root, "qemu-img");
    crash_and_verify("", ",discard=unmap", true, 21);
    crash_and_verify("extended_l2=on", ",discard=unmap", true, 22);
}

#[test]
fn lazy_refcounts() {
    needs!(root, "qemu-img");
    crash_and_verify("lazy_refcounts=on", ",discard=unmap", false, 31);
}

#[test]
fn killed_daemon_leaves_a_mount_that_can_be_replaced() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 4 << 20, "");
    let mount = scratch.empty_file("mount");
    let args = fuse_args(&image, "qcow2", "", &mount, ",writable=on");
    let mut daemon = Daemon::start(&scratch, &args);
    daemon.kill_hard();
    assert!(
        mounts::on(&mount).is_some(),
        "the kernel keeps the dead mount"
    );
    // As Proxmox does it: unmount what is left, then start again.
    assert!(mounts::detach(&mount));
    let daemon = Daemon::start(&scratch, &args);
    assert_eq!(std::fs::metadata(&mount).unwrap().len(), 4 << 20);
    daemon.stop();
}

#[test]
fn export_replaces_the_mount_of_a_dead_daemon() {
    needs!(root, "qemu-img");
    if is_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 4 << 20, "");
    let mount = scratch.empty_file("mount");
    let args = fuse_args(&image, "qcow2", "", &mount, ",writable=on");
    let mut daemon = Daemon::start(&scratch, &args);
    // The kernel remembers the attributes, and says so even when the daemon is gone.
    assert_eq!(std::fs::metadata(&mount).unwrap().len(), 4 << 20);
    daemon.kill_hard();
    let daemon = Daemon::start(&scratch, &args);
    assert_eq!(mounts::below(scratch.dir()).len(), 1, "nothing is stacked");
    let file = OpenOptions::new().write(true).open(&mount).unwrap();
    file.write_all_at(b"alive", 0).unwrap();
    drop(file);
    daemon.stop();
}
