//! What happens to a mount when its daemon is stopped, killed or refused by the system.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use nix::sys::signal::Signal;

use crate::needs;
use crate::support::daemon::{Daemon, fuse_args, is_qemu, program, run_to_end};
use crate::support::model::{assert_same, noise};
use crate::support::run::run;
use crate::support::{Scratch, eventually, mounts, qemu};

const MIB: u64 = 1 << 20;

#[test]
fn stopped_daemon_goes_on_where_it_was() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 16 * MIB, "");
    let mount = scratch.empty_file("mount");
    let args = fuse_args(&image, "qcow2", "", &mount, ",writable=on");
    let daemon = Daemon::start(&scratch, &args);
    let done = AtomicBool::new(false);
    let count = AtomicU64::new(0);
    thread::scope(|scope| {
        for writer in 0..4u64 {
            let (mount, done, count) = (&mount, &done, &count);
            scope.spawn(move || {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(mount)
                    .unwrap();
                let mut round = 0;
                while !done.load(Ordering::Relaxed) {
                    let at = (writer * 4 + round % 4) * MIB;
                    let data = noise(writer * 1000 + round, 70_000);
                    file.write_all_at(&data, at).unwrap();
                    let mut read = vec![0; data.len()];
                    file.read_exact_at(&mut read, at).unwrap();
                    assert_same("what was just written", &read, &data);
                    count.fetch_add(1, Ordering::Relaxed);
                    round += 1;
                }
            });
        }
        for _ in 0..5 {
            let before = count.load(Ordering::Relaxed);
            eventually("the writers get on", 60, || {
                count.load(Ordering::Relaxed) > before + 8
            });
            daemon.signal(Signal::SIGSTOP);
            eventually("it is stopped", 30, || daemon.state() == 'T');
            daemon.signal(Signal::SIGCONT);
        }
        done.store(true, Ordering::Relaxed);
    });
    daemon.stop();
    qemu::assert_clean(&image);
}

/// Runs the daemon where `/dev/fuse` has been changed by a command.
fn refusal_with(change: &str) -> String {
    let scratch = Scratch::new();
    let image = scratch.file("disk.raw", &noise(1, 4096));
    let mount = scratch.empty_file("mount");
    let args = fuse_args(&image, "raw", "", &mount, "");
    let script = format!("{change} && exec \"$@\"");
    let ended = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg(script)
        .arg("sh")
        .arg(program())
        .args(&args)
        .output()
        .unwrap();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(mounts::on(&mount).is_none());
    String::from_utf8(ended.stderr).unwrap()
}

#[test]
fn refusals_say_what_to_do() {
    needs!(root, "unshare", "mount");
    if is_qemu() {
        return;
    }
    // A container without the device.
    let said = refusal_with("mount -t tmpfs none /dev");
    assert!(said.contains("/dev/fuse is missing"), "{said}");
    assert!(said.contains("modprobe fuse"), "{said}");
    assert!(said.contains("--device /dev/fuse"), "{said}");
    // A device that is there but is not what it should be.
    let said = refusal_with("mount --bind /dev/null /dev/fuse");
    assert!(said.contains("Failed to mount"), "{said}");
}

#[test]
fn image_on_a_mount_of_ours_is_not_opened_by_the_same_daemon() {
    needs!(root, "qemu-img");
    if is_qemu() {
        return; // It waits for itself.
    }
    let scratch = Scratch::new();
    let image = scratch.file("disk.raw", &noise(1, 1 << 20));
    let (first, second) = (scratch.empty_file("first"), scratch.empty_file("second"));
    let mut args = fuse_args(&image, "raw", "", &first, ",writable=on");
    args.extend([
        "--blockdev".to_owned(),
        format!("driver=file,node-name=loop,filename={}", first.display()),
        "--export".to_owned(),
        format!(
            "type=fuse,id=loop,node-name=loop,mountpoint={}",
            second.display()
        ),
    ]);
    let ended = run_to_end(&scratch, &args);
    assert!(
        ended.stderr.contains("mount of this daemon's own"),
        "{ended:?}"
    );
    assert!(mounts::below(scratch.dir()).is_empty());
}

#[test]
fn mount_that_is_forced_away_ends_the_export() {
    needs!(root, "qemu-img", "umount");
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 4 * MIB, "");
    let mount = scratch.empty_file("mount");
    let args = fuse_args(&image, "qcow2", "", &mount, ",writable=on");
    let daemon = Daemon::start(&scratch, &args);
    let file = File::options().write(true).open(&mount).unwrap();
    file.write_all_at(b"before", 0).unwrap();
    let ended = run("umount", &["--force", "--lazy", mount.to_str().unwrap()]);
    assert!(ended.success(), "{ended:?}");
    eventually("the file is cut off", 30, || {
        file.write_all_at(b"after", 0).is_err()
    });
    drop(file);
    daemon.stop();
    assert!(qemu::content(&scratch, &image, "qcow2").starts_with(b"before"));
    qemu::assert_clean(&image);
}
