//! What the daemon costs while it does nothing, and after it has done a lot.

use std::fs;
use std::time::Duration;

use crate::needs;
use crate::support::daemon::{Daemon, fuse_args, program};
use crate::support::prerequisites::skip;
use crate::support::{Scratch, eventually, qemu, run_ok};

/// The bound on resident memory with one export, in KiB.
const LIMIT_KIB: u64 = 16 << 10;

/// Whether the binary is an optimised one; the debug build is no measure of memory.
fn is_release() -> bool {
    program()
        .parent()
        .is_some_and(|dir| !dir.ends_with("debug"))
}

#[test]
fn one_export_stays_within_its_memory() {
    needs!(root, "qemu-img", "fio");
    if !is_release() {
        skip_debug();
        return;
    }
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 256 << 20, "");
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(
        &scratch,
        &fuse_args(&image, "qcow2", "", &mount, ",writable=on"),
    );
    let idle = daemon.memory_kib("VmRSS");
    assert!(idle <= LIMIT_KIB, "at the start: {idle} KiB");
    for (load, size) in [
        ("randwrite", "4k"),
        ("write", "1m"),
        ("read", "1m"),
        ("randread", "4k"),
    ] {
        run_ok(
            "fio",
            &[
                "--name=load",
                "--ioengine=libaio",
                "--iodepth=32",
                "--direct=1",
                "--size=256m",
                "--io_size=64m",
                &format!("--rw={load}"),
                &format!("--bs={size}"),
                &format!("--filename={}", mount.display()),
            ],
        );
        // Requests in flight need memory of their own, which is given back when they are done.
        eventually(
            &format!("{LIMIT_KIB} KiB again after {load} of {size}"),
            10,
            || daemon.memory_kib("VmRSS") <= LIMIT_KIB,
        );
        let peak = daemon.memory_kib("VmHWM");
        assert!(peak <= 2 * LIMIT_KIB, "during {load} of {size}: {peak} KiB");
    }
    daemon.stop();
}

fn skip_debug() {
    // Not for lack of anything on the machine: scripts/test always has a release binary.
    skip("memory is judged on the release build: set STORD_BIN to it, or run scripts/test");
}

#[test]
fn idle_daemon_uses_no_processor_time() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 16 << 20, "");
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(
        &scratch,
        &fuse_args(&image, "qcow2", "", &mount, ",writable=on"),
    );
    fs::read(&mount).unwrap();
    // Ticks of 10 ms; what is left over from the reading may still be under way.
    std::thread::sleep(Duration::from_millis(300));
    let before = ticks(&daemon);
    std::thread::sleep(Duration::from_secs(2));
    let used = ticks(&daemon) - before;
    assert!(used <= 4, "{used} ticks of 10 ms in two idle seconds");
    daemon.stop();
}

/// User and system time of the process so far.
fn ticks(daemon: &Daemon) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    let after_name = stat.rsplit(')').next().unwrap();
    after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap())
        .sum()
}
