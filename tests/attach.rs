//! `stord attach`, `stord detach` and `stord ls` with loop devices, which every kernel has; the other ways need modules and are tried in
//! a virtual machine (`tests/vm/`).

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::mount_command::{arg, only_stord, qcow2_with, refused};
use crate::needs;
use crate::support::daemon::{program, run_to_end};
use crate::support::model::{assert_same, noise};
use crate::support::prerequisites::{find, skip};
use crate::support::run::{Ended, limited, run};
use crate::support::{Scratch, eventually, qemu, run_ok};

/// An image that is attached; detached by force when dropped.
struct Attached<'s> {
    scratch: &'s Scratch,
    image: String,
    device: String,
}

impl<'s> Attached<'s> {
    /// Attaches the image as a loop device.
    #[track_caller]
    fn new(scratch: &'s Scratch, image: &str, options: &[&str]) -> Attached<'s> {
        let ended = run_to_end(
            scratch,
            &[&["attach", "--via", "loop", image], options].concat(),
        );
        assert!(ended.success(), "{ended:?}");
        let device = ended
            .stdout
            .strip_suffix('\n')
            .expect("one line")
            .to_owned();
        assert!(
            device.starts_with("/dev/loop") && Path::new(&device).exists(),
            "the device's path and nothing else: {ended:?}"
        );
        Attached {
            scratch,
            image: image.to_owned(),
            device,
        }
    }

    fn try_detach(&self) -> Ended {
        run_to_end(self.scratch, &["detach", &self.device])
    }

    #[track_caller]
    fn detach(&self) {
        let ended = self.try_detach();
        assert!(ended.success(), "{ended:?}");
        assert!(!is_bound(&self.device), "{} has gone", self.device);
        assert_eq!(listed(self.scratch, &self.image), None);
    }

    /// What `stord ls` says of it.
    #[track_caller]
    fn listed(&self) -> Value {
        listed(self.scratch, &self.image).expect("it is in the list")
    }

    fn pid(&self) -> Pid {
        let pid = self.listed()["pid"].as_i64().expect("a number");
        Pid::from_raw(i32::try_from(pid).unwrap())
    }

    fn open(&self) -> File {
        let mut mode = OpenOptions::new();
        mode.read(true).write(true).open(&self.device).unwrap()
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        // The device may be another's by now.
        let is_ours = |found: &Value| found["device"] == self.device;
        if all_listed(self.scratch, &self.image).iter().any(is_ours) {
            run_to_end(self.scratch, &["detach", "--force", &self.device]);
        }
    }
}

/// What `stord ls` says of an image.
fn listed(scratch: &Scratch, image: &str) -> Option<Value> {
    all_listed(scratch, image).pop()
}

fn all_listed(scratch: &Scratch, image: &str) -> Vec<Value> {
    let ended = run_to_end(scratch, &["ls", "--json"]);
    let mut list: Vec<Value> = serde_json::from_str(&ended.stdout).unwrap_or_default();
    list.retain(|device| device["image"] == image);
    list
}

/// Whether a loop device has a file.
fn is_bound(device: &str) -> bool {
    let name = device.trim_start_matches("/dev/");
    Path::new("/sys/block").join(name).join("loop").exists()
}

/// A file system that is mounted; taken away when dropped.
struct Mounted<'p>(&'p Path);

impl<'p> Mounted<'p> {
    #[track_caller]
    fn new(device: &str, at: &'p Path) -> Mounted<'p> {
        fs::create_dir_all(at).unwrap();
        mount(
            Some(device),
            at,
            Some("ext4"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        Mounted(at)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn attached_image_is_a_disk() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let mut content = noise(1, 4 << 20);
    let image = qcow2_with(&scratch, "disk.qcow2", &content);
    let attached = Attached::new(&scratch, &image, &[]);
    assert_same("device", &fs::read(&attached.device).unwrap(), &content);
    let info = attached.listed();
    assert_eq!(info["device"], attached.device);
    assert_eq!(info["via"], "loop");
    assert_eq!(info["size"], 4 << 20);
    assert_eq!(info["read-only"], false);
    assert_eq!(info["serial"].as_str().map(str::len), Some(20));
    let table = run_to_end(&scratch, &["ls"]).stdout;
    let is_it = |line: &str| line.starts_with(&attached.device) && line.ends_with(&image);
    assert!(table.lines().any(is_it), "{table}");
    let daemons = run_to_end(&scratch, &["ps"]).stdout;
    let is_it = |line: &str| line.contains("attach") && line.ends_with(&attached.device);
    assert!(daemons.lines().any(is_it), "{daemons}");

    let written = noise(2, 1 << 20);
    // Not synced: detaching writes out what the kernel still has.
    attached.open().write_all_at(&written, 123 << 10).unwrap();
    content[123 << 10..][..1 << 20].copy_from_slice(&written);
    attached.detach();
    let raw = scratch.path("raw");
    let raw = raw.to_str().unwrap();
    qemu::img(&["convert", "-O", "raw", &image, raw]);
    assert_same("image", &fs::read(raw).unwrap(), &content);
    qemu::img(&["check", &image]);
}

#[test]
fn detached_by_image_and_attached_again() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = qcow2_with(&scratch, "disk.qcow2", &noise(1, 1 << 20));
    for _ in 0..3 {
        let attached = Attached::new(&scratch, &image, &[]);
        let ended = run_to_end(&scratch, &["detach", "disk.qcow2"]);
        assert!(ended.success(), "{ended:?}");
        assert!(!is_bound(&attached.device));
    }
    refused(
        &scratch,
        &["detach", "disk.qcow2"],
        &["is not attached", "stord ls"],
    );
}

#[test]
fn read_only_device_is_not_written_and_shares_its_image() {
    only_stord!();
    needs!(root, "qemu-img", "blockdev");
    let scratch = Scratch::new();
    let content = noise(1, 1 << 20);
    let image = qcow2_with(&scratch, "disk.qcow2", &content);
    let options = ["--read-only", "--logical-block-size", "4096"];
    let one = Attached::new(&scratch, &image, &options);
    let other = Attached::new(&scratch, &image, &["-r"]);
    assert_ne!(one.device, other.device);
    assert_eq!(
        run_ok("blockdev", &["--getro", "--getss", &one.device]),
        "1\n4096\n"
    );
    assert_same("device", &fs::read(&other.device).unwrap(), &content);
    let opened = OpenOptions::new().write(true).open(&one.device);
    let written = opened.and_then(|file| file.write_at(&[1; 4096], 0));
    assert!(written.is_err(), "{written:?}");
    let ended = run_to_end(&scratch, &["detach", &image]);
    assert!(ended.stderr.contains("more than once"), "{ended:?}");
}

#[test]
fn partition_is_attached_alone() {
    only_stord!();
    needs!(root, "sfdisk");
    let scratch = Scratch::new();
    let content = noise(1, 8 << 20);
    let image = arg(&scratch, "disk.img");
    fs::write(&image, &content).unwrap();
    let script = scratch.file(
        "script",
        b"label: gpt\nstart=2048, size=4096\nstart=6144, size=2048\n",
    );
    let mut sfdisk = limited("sfdisk");
    let made = sfdisk
        .args(["-q", &image])
        .stdin(File::open(script).unwrap());
    assert!(made.status().unwrap().success());
    let attached = Attached::new(&scratch, &image, &["--format", "raw"]);
    let user = attached.open();
    let ended = attached.try_detach();
    assert!(
        ended.stderr.contains("is in use: open in process"),
        "{ended:?}"
    );
    drop(user);
    attached.detach();
    let attached = Attached::new(&scratch, &image, &["--format", "raw", "-p", "2", "-r"]);
    assert_same(
        "attached partition",
        &fs::read(&attached.device).unwrap(),
        &content[3 << 20..4 << 20],
    );
}

#[test]
fn device_in_use_is_detached_by_force_only() {
    only_stord!();
    needs!(root, "qemu-img", "mkfs.ext4");
    let scratch = Scratch::new();
    let image = arg(&scratch, "disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &image, "64M"]);
    let attached = Attached::new(&scratch, &image, &[]);
    run_ok("mkfs.ext4", &["-q", &attached.device]);
    let at = scratch.path("mounted");
    let mounted = Mounted::new(&attached.device, &at);
    fs::write(at.join("file"), "precious").unwrap();
    let ended = attached.try_detach();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for words in [&format!("mounted at '{}'", at.display()), "--force"] {
        assert!(ended.stderr.contains(words), "{words}: {ended:?}");
    }
    let ended = run_to_end(&scratch, &["detach", "--force", &image]);
    assert!(ended.success(), "{ended:?}");
    assert_eq!(listed(&scratch, &image), None);
    drop(mounted);
    eventually("the device goes with its last user", 10, || {
        !is_bound(&attached.device)
    });
    // What was written before was written out.
    let again = Attached::new(&scratch, &image, &[]);
    let _mounted = Mounted::new(&again.device, &at);
    assert_eq!(fs::read_to_string(at.join("file")).unwrap(), "precious");
}

#[test]
fn daemon_that_is_told_to_end_waits_for_the_device_s_users() {
    only_stord!();
    needs!(root, "qemu-img", "mkfs.ext4", "e2fsck");
    let scratch = Scratch::new();
    let image = arg(&scratch, "disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &image, "64M"]);
    let attached = Attached::new(&scratch, &image, &[]);
    run_ok("mkfs.ext4", &["-q", &attached.device]);
    let at = scratch.path("mounted");
    let mounted = Mounted::new(&attached.device, &at);
    kill(attached.pid(), Signal::SIGTERM).unwrap();
    let content = noise(3, 8 << 20);
    fs::write(at.join("file"), &content).unwrap();
    // Past several looks at whether it is still in use.
    for _ in 0..3 {
        assert!(!attached.try_detach().success(), "it is in use");
    }
    umount2(&at, MntFlags::empty()).unwrap();
    drop(mounted);
    eventually("the daemon ends", 30, || listed(&scratch, &image).is_none());
    assert!(!is_bound(&attached.device));
    let again = Attached::new(&scratch, &image, &["--read-only"]);
    run_ok("e2fsck", &["-fn", &again.device]);
}

#[test]
fn device_of_a_killed_daemon_is_cleared() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = qcow2_with(&scratch, "disk.qcow2", &noise(1, 1 << 20));
    let name = format!("test-killed-{}", std::process::id());
    let spec = format!("/run/cdi/stord.io-disk-{name}.json");
    let attached = Attached::new(&scratch, &image, &["--cdi", &name]);
    assert!(Path::new(&spec).exists());
    kill(attached.pid(), Signal::SIGKILL).unwrap();
    eventually("nothing is left", 20, || {
        !is_bound(&attached.device) && !Path::new(&spec).exists()
    });
    assert_eq!(listed(&scratch, &image), None);
    Attached::new(&scratch, &image, &["--cdi", &name]).detach();
    assert!(!Path::new(&spec).exists());
}

#[test]
fn image_in_use_is_refused() {
    only_stord!();
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = qcow2_with(&scratch, "disk.qcow2", &noise(1, 1 << 20));
    let attached = Attached::new(&scratch, &image, &[]);
    let hint = format!("stord detach '{}'", attached.device);
    let words = ["is attached as", &hint];
    refused(&scratch, &["attach", "--via", "loop", &image], &words);
    refused(&scratch, &["mount", &image], &words);
    refused(&scratch, &["umount", &image], &words);
    refused(&scratch, &["upgrade", &image], &["is a device"]);
    // Somebody else's lock.
    let ended = run("qemu-io", &["-c", "write 0 512", &image]);
    assert!(ended.stderr.contains("lock"), "{ended:?}");
    attached.detach();
}

#[test]
fn mistakes_are_told() {
    only_stord!();
    needs!(root, "setpriv");
    let scratch = Scratch::new();
    let image = arg(&scratch, "disk.raw");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let odd = arg(&scratch, "odd.raw");
    fs::write(&odd, vec![0; 1536]).unwrap();
    let attach = |more: &[&'static str]| [&["attach", "--via", "loop"], more].concat();
    refused(&scratch, &attach(&["absent"]), &["No such file"]);
    refused(
        &scratch,
        &attach(&["--queues", "2", "disk.raw"]),
        &["have no queues"],
    );
    let words = ["no multiple of the logical block size"];
    refused(
        &scratch,
        &attach(&["--logical-block-size", "1024", "odd.raw"]),
        &words,
    );
    refused(&scratch, &attach(&["-p", "3", "disk.raw"]), &["disk.raw"]);
    refused(&scratch, &["detach", "disk.raw"], &["is not attached"]);
    for bad in [
        ["--serial", "a serial number of spaces"],
        ["--cdi", "-"],
        ["--logical-block-size", "513"],
    ] {
        refused(
            &scratch,
            &attach(&[bad[0], bad[1], "disk.raw"]),
            &["invalid value"],
        );
    }
    let mut user = limited("setpriv");
    user.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
    user.arg(program())
        .args(["attach", "--via", "loop", &image]);
    let ended: Ended = user.output().unwrap().into();
    for words in ["only root can attach", "stord mount"] {
        assert!(ended.stderr.contains(words), "{ended:?}");
    }
}

#[test]
fn missing_module_is_named_with_what_to_do() {
    only_stord!();
    needs!(root);
    let scratch = Scratch::new();
    scratch.file("disk.raw", &[0; 1 << 20]);
    if Path::new("/sys/module/nbd").exists() || run("modprobe", &["-n", "nbd"]).success() {
        skip("this kernel has the module nbd: the message for kernels without it is not seen here");
        return;
    }
    let words = [
        "the module nbd (CONFIG_BLK_DEV_NBD)",
        "modprobe -a nbd",
        "--via loop",
    ];
    refused(&scratch, &["attach", "--via", "nbd", "disk.raw"], &words);
}

#[test]
fn container_gets_the_disk_by_name() {
    only_stord!();
    needs!(root, "podman", "runc", "busybox");
    let scratch = Scratch::new();
    let content = noise(1, 1 << 20);
    let image = qcow2_with(&scratch, "disk.qcow2", &content);
    let name = format!("test-{}", std::process::id());
    let attached = Attached::new(&scratch, &image, &["--cdi", &name]);
    let taken = run_to_end(
        &scratch,
        &["attach", "--via", "loop", "-r", "--cdi", &name, &image],
    );
    assert!(taken.stderr.contains("already"), "{taken:?}");

    let root = scratch.path("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy(find("busybox").unwrap(), root.join("bin/busybox")).unwrap();
    let (root, tar) = (root.to_str().unwrap(), arg(&scratch, "root.tar"));
    run_ok("tar", &["-C", root, "-cf", &tar, "."]);
    let podman = |args: &[&str]| {
        let (store, state) = (arg(&scratch, "store"), arg(&scratch, "state"));
        // What needs no more than the machine gives; the tests are not about podman.
        let mut command = limited("podman");
        command.args([
            "--root",
            &store,
            "--runroot",
            &state,
            "--storage-driver",
            "vfs",
        ]);
        command.args(["--cgroup-manager", "cgroupfs", "--runtime", "runc"]);
        Ended::from(command.args(args).output().unwrap())
    };
    let imported = podman(&["import", &tar, "stord-test"]);
    assert!(imported.success(), "{imported:?}");
    let script = format!(
        "dd if={0} bs=1M count=1 | sha256sum; echo >{0}",
        attached.device
    );
    let in_container = |device: &str| {
        podman(&[
            "run",
            "--rm",
            "--network",
            "none",
            "--pids-limit",
            "0",
            "--ulimit",
            "nofile=1024:1024",
            "--ulimit",
            "nproc=1000:1000",
            "--device",
            device,
            "stord-test",
            "/bin/busybox",
            "sh",
            "-c",
            &script,
        ])
    };
    let plain = podman(&[
        "run",
        "--rm",
        "--network",
        "none",
        "--pids-limit",
        "0",
        "--ulimit",
        "nofile=1024:1024",
        "--ulimit",
        "nproc=1000:1000",
        "stord-test",
        "/bin/busybox",
        "true",
    ]);
    if !plain.success() {
        skip(&format!(
            "podman cannot run any container here: {}",
            plain.stderr
        ));
        return;
    }
    let device = format!("stord.io/disk={name}");
    let ended = in_container(&device);
    let sum = run_ok("sha256sum", &[scratch.file("expected", &content)]);
    assert!(ended.success(), "{ended:?}");
    assert_eq!(
        ended.stdout.split(' ').next(),
        sum.split(' ').next(),
        "{ended:?}"
    );
    let mut first = [1; 1];
    attached.open().read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, *b"\n", "it was written from inside");
    attached.detach();
    let ended = in_container(&device);
    assert!(!ended.success(), "the name goes with the device: {ended:?}");
}
