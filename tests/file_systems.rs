//! File systems on a loop device over the mount: made, filled, unmounted, checked, and found again by the next daemon.

use std::fs;
use std::path::Path;

use crate::needs;
use crate::support::daemon::{Daemon, fuse_args, is_qemu};
use crate::support::loop_device::LoopDevice;
use crate::support::model::{assert_same, noise};
use crate::support::{Scratch, mounts, qemu, run_ok};

/// How one kind of file system is made and checked.
struct Kind {
    make: &'static [&'static str],
    check: &'static [&'static str],
    mount_type: &'static str,
}

const EXT4: Kind = Kind {
    make: &["mkfs.ext4", "-q", "-F"],
    check: &["fsck.ext4", "-f", "-n"],
    mount_type: "ext4",
};
const XFS: Kind = Kind {
    make: &["mkfs.xfs", "-q", "-f"],
    check: &["xfs_repair", "-n"],
    mount_type: "xfs",
};
const BTRFS: Kind = Kind {
    make: &["mkfs.btrfs", "-q", "-f"],
    check: &["btrfs", "check"],
    mount_type: "btrfs",
};

/// Mounted until dropped.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(device: &str, at: &'a Path, kind: &str) -> Mounted<'a> {
        run_ok(
            "mount",
            &["-t", kind, "-o", "discard", device, at.to_str().unwrap()],
        );
        Mounted(at)
    }

    fn unmount(self) {
        run_ok("umount", &[self.0]);
        std::mem::forget(self);
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        mounts::detach(self.0);
    }
}

fn on_device(program: &[&str], device: &str) {
    run_ok(program[0], &[&program[1..], &[device]].concat());
}

/// The number and seed decide what a file holds.
fn content(number: u64) -> Vec<u8> {
    noise(number, usize::try_from(number * 7919 % 400_000).unwrap())
}

fn round_trip(kind: &Kind, direct: bool) {
    if is_qemu() {
        return; // Its parallel writes corrupt data.
    }
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 512 << 20, "");
    let file = scratch.empty_file("file");
    let files = scratch.path("files");
    fs::create_dir(&files).unwrap();
    let args = fuse_args(&image, "qcow2", ",discard=unmap", &file, ",writable=on");

    let daemon = Daemon::start(&scratch, &args);
    let device = LoopDevice::attach(&file, direct);
    on_device(kind.make, &device.path);
    let mounted = Mounted::new(&device.path, &files, kind.mount_type);
    for number in 0..60 {
        let dir = files.join(format!("dir{}", number % 7));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(number.to_string()), content(number)).unwrap();
    }
    fs::File::open(files.join("dir1/1"))
        .unwrap()
        .sync_all()
        .unwrap();
    for number in (0..60).step_by(3) {
        fs::remove_file(files.join(format!("dir{}/{number}", number % 7))).unwrap();
    }
    run_ok("sync", &["--file-system", files.to_str().unwrap()]);
    run_ok("fstrim", &[files.to_str().unwrap()]);
    mounted.unmount();
    on_device(kind.check, &device.path);
    drop(device);
    daemon.stop();
    qemu::assert_clean(&image);

    // The next daemon finds all of it.
    let daemon = Daemon::start(&scratch, &args);
    let device = LoopDevice::attach(&file, !direct);
    let mounted = Mounted::new(&device.path, &files, kind.mount_type);
    for number in 0..60 {
        let path = files.join(format!("dir{}/{number}", number % 7));
        if number % 3 == 0 {
            assert!(!path.exists());
        } else {
            assert_same(
                &path.display().to_string(),
                &fs::read(&path).unwrap(),
                &content(number),
            );
        }
    }
    mounted.unmount();
    on_device(kind.check, &device.path);
    drop(device);
    daemon.stop();
    qemu::assert_clean(&image);
}

#[test]
fn ext4() {
    needs!(root, "qemu-img", "losetup", "mkfs.ext4", "fsck.ext4");
    round_trip(&EXT4, false);
}

#[test]
fn ext4_direct() {
    needs!(root, "qemu-img", "losetup", "mkfs.ext4", "fsck.ext4");
    round_trip(&EXT4, true);
}

#[test]
fn xfs() {
    needs!(root, "qemu-img", "losetup", "mkfs.xfs", "xfs_repair");
    round_trip(&XFS, false);
}

#[test]
fn xfs_direct() {
    needs!(root, "qemu-img", "losetup", "mkfs.xfs", "xfs_repair");
    round_trip(&XFS, true);
}

#[test]
fn btrfs() {
    needs!(root, "qemu-img", "losetup", "mkfs.btrfs", "btrfs");
    round_trip(&BTRFS, false);
}

#[test]
fn btrfs_direct() {
    needs!(root, "qemu-img", "losetup", "mkfs.btrfs", "btrfs");
    round_trip(&BTRFS, true);
}
