//! `stord mount` and `stord umount`, as people use them.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::needs;
use crate::support::daemon::{Daemon, program, run_to_end};
use crate::support::model::{assert_same, noise};
use crate::support::run::{Ended, run_in};
use crate::support::{Scratch, eventually, mounts, qemu, run_ok};

/// Ends the calling test when the daemon under test is QEMU's, which has no subcommands.
macro_rules! only_stord {
    () => {
        if $crate::support::daemon::is_qemu() {
            return;
        }
    };
}

pub(crate) use only_stord;

/// Runs `stord mount` and stands guard over the daemon it leaves behind.
#[track_caller]
pub fn mount(scratch: &Scratch, args: &[&str], at: &str) -> (Daemon, Ended) {
    let ended = run_to_end(scratch, &[&["mount"], args].concat());
    assert!(ended.success(), "{ended:?}");
    let at = scratch.path(at);
    assert!(
        mounts::on(&at).is_some(),
        "usable once the command has returned: {ended:?}"
    );
    (Daemon::adopt(scratch, serving(&at)), ended)
}

/// The process that serves the mount at this path, which its arguments name or are the default for.
fn serving(at: &Path) -> i32 {
    let at = at.to_str().unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut found: Vec<i32> = processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            let words: Vec<_> = line.split('\0').collect();
            let is_at = words.iter().any(|word| {
                *word == at || format!("{word}.raw") == at || format!("{word}.parts") == at
            });
            exe == program() && words.get(1) == Some(&"mount") && is_at
        })
        .collect();
    assert_eq!(found.len(), 1, "one daemon serves {at}: {found:?}");
    found.remove(0)
}

/// Runs `stord umount`, which must succeed.
#[track_caller]
pub fn umount(scratch: &Scratch, target: &str) -> Ended {
    let mut last = None;
    // A program that another test is just starting holds copies of our descriptors until it has begun.
    eventually("the mount is let go of", 10, || {
        let ended = run_to_end(scratch, &["umount", target]);
        let is_busy = ended.stderr.contains("Device or resource busy");
        last = Some(ended);
        !is_busy
    });
    let ended = last.expect("it was tried");
    assert!(ended.success(), "{ended:?}");
    ended
}

/// Asserts that a command fails, saying these words, and leaves nothing behind.
#[track_caller]
pub fn refused(scratch: &Scratch, args: &[&str], words: &[&str]) {
    let before = scratch.names();
    let ended = run_to_end(scratch, args);
    assert_eq!(ended.code, Some(1), "{args:?}: {ended:?}");
    for word in words {
        assert!(
            ended.stderr.contains(word),
            "{args:?}: {word:?} is not in {:?}",
            ended.stderr
        );
    }
    assert_eq!(scratch.names(), before, "{args:?} left something behind");
}

/// The absolute path of a name, as an argument: the guard finds the daemon by it.
pub fn arg(scratch: &Scratch, name: &str) -> String {
    scratch.path(name).to_str().unwrap().to_owned()
}

/// Makes a qcow2 image with this content; gives its absolute path.
pub fn qcow2_with(scratch: &Scratch, name: &str, content: &[u8]) -> String {
    let raw = scratch.file("content", content);
    let image = arg(scratch, name);
    qemu::img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        raw.to_str().unwrap(),
        &image,
    ]);
    fs::remove_file(raw).unwrap();
    image
}

#[test]
fn mountpoint_is_created_and_removed() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let content = noise(1, 2 << 20);
    let image = qcow2_with(&scratch, "disk.qcow2", &content);
    let (mut daemon, ended) = mount(&scratch, &[&image, &arg(&scratch, "disk.raw")], "disk.raw");
    assert!(
        ended.stdout.contains("qcow2") && ended.stdout.contains("2 MiB"),
        "{ended:?}"
    );
    assert!(
        ended.stdout.contains("stord umount"),
        "how to go on: {ended:?}"
    );
    assert_same(
        "mount",
        &fs::read(scratch.path("disk.raw")).unwrap(),
        &content,
    );
    let file = OpenOptions::new()
        .write(true)
        .open(scratch.path("disk.raw"))
        .unwrap();
    file.write_all_at(b"changed", 5000).unwrap();
    drop(file);
    umount(&scratch, &arg(&scratch, "disk.raw"));
    assert!(
        !daemon.is_alive(),
        "umount returns when the daemon has ended"
    );
    daemon.assert_ends_well();
    assert_eq!(scratch.names(), ["disk.qcow2"]);
    let mut wanted = content;
    wanted[5000..5007].copy_from_slice(b"changed");
    assert_same(
        "image",
        &qemu::content(&scratch, &scratch.path("disk.qcow2"), "qcow2"),
        &wanted,
    );
    qemu::assert_clean(&scratch.path("disk.qcow2"));
}

#[test]
fn mountpoint_has_a_default_and_an_existing_one_stays() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = qcow2_with(&scratch, "disk.qcow2", &noise(2, 1 << 20));
    let (_daemon, _) = mount(&scratch, &[&image], "disk.qcow2.raw");
    // By the image's name as well as by the mountpoint's.
    umount(&scratch, &image);
    assert_eq!(scratch.names(), ["disk.qcow2"]);
    scratch.empty_file("mine");
    let (_daemon, _) = mount(&scratch, &[&image, &arg(&scratch, "mine")], "mine");
    umount(&scratch, &arg(&scratch, "mine"));
    assert_eq!(scratch.names(), ["disk.qcow2", "mine"]);
    // A default that would hide something is refused.
    scratch.file("disk.qcow2.raw", b"precious");
    refused(
        &scratch,
        &["mount", &image],
        &["disk.qcow2.raw", "exists already"],
    );
}

#[test]
fn image_over_itself() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let content = noise(3, 1 << 20);
    let image = qcow2_with(&scratch, "disk.qcow2", &content);
    let (_daemon, _) = mount(&scratch, &[&image, &image], "disk.qcow2");
    assert_same(
        "mount",
        &fs::read(scratch.path("disk.qcow2")).unwrap(),
        &content,
    );
    umount(&scratch, &image);
    qemu::assert_clean(&scratch.path("disk.qcow2"));
}

#[test]
fn read_only_lets_nobody_write() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = qcow2_with(&scratch, "disk.qcow2", &noise(4, 1 << 20));
    let before = fs::read(&image).unwrap();
    let (_daemon, _) = mount(&scratch, &["--read-only", &image, &arg(&scratch, "m")], "m");
    assert!(fs::write(scratch.path("m"), b"x").is_err());
    // Readers share: a second mount and QEMU's tools may look as well.
    let (_second, _) = mount(&scratch, &["--read-only", &image, &arg(&scratch, "n")], "n");
    qemu::img(&["info", &image]);
    let ambiguous = run_to_end(&scratch, &["umount", &image]);
    assert!(
        ambiguous.code == Some(1) && ambiguous.stderr.contains("more than once"),
        "{ambiguous:?}"
    );
    umount(&scratch, &arg(&scratch, "m"));
    umount(&scratch, &arg(&scratch, "n"));
    assert!(
        fs::read(&image).unwrap() == before,
        "not a byte of the image has changed"
    );
}

#[test]
fn foreground_ends_on_interrupt() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = qcow2_with(&scratch, "disk.qcow2", &noise(5, 1 << 20));
    let mut child = Command::new(program())
        .args(["mount", "--foreground", &image, &arg(&scratch, "m")])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the mount is there", 30, || {
        mounts::on(&scratch.path("m")).is_some()
    });
    assert!(child.try_wait().unwrap().is_none());
    kill(
        Pid::from_raw(i32::try_from(child.id()).unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    eventually("it ends", 30, || child.try_wait().unwrap().is_some());
    assert!(child.wait().unwrap().success());
    assert_eq!(scratch.names(), ["disk.qcow2"]);
}

#[test]
fn plain_umount_ends_it_too() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = qcow2_with(&scratch, "disk.qcow2", &noise(6, 1 << 20));
    let (mut daemon, _) = mount(&scratch, &[&image, &arg(&scratch, "m")], "m");
    run_ok("umount", &[&arg(&scratch, "m")]);
    daemon.assert_ends_well();
    eventually("the mountpoint goes as well", 30, || {
        scratch.names() == ["disk.qcow2"]
    });
}

#[test]
fn stale_mount_of_a_killed_daemon_is_replaced() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let content = noise(7, 1 << 20);
    let image = qcow2_with(&scratch, "disk.qcow2", &content);
    let (mut daemon, _) = mount(&scratch, &[&image, &arg(&scratch, "m")], "m");
    daemon.kill_hard();
    assert!(
        fs::metadata(scratch.path("m")).is_err(),
        "the mount is dead"
    );
    let (mut daemon, ended) = mount(&scratch, &[&image, &arg(&scratch, "m")], "m");
    assert!(
        (ended.stdout.clone() + &ended.stderr).contains("dead"),
        "it says what it cleared: {ended:?}"
    );
    assert_same("mount", &fs::read(scratch.path("m")).unwrap(), &content);
    assert_eq!(mounts::below(scratch.dir()).len(), 1, "nothing is stacked");
    // And umount clears what a killed daemon leaves.
    daemon.kill_hard();
    umount(&scratch, &arg(&scratch, "m"));
    assert!(mounts::below(scratch.dir()).is_empty());
    assert_eq!(
        scratch.names(),
        ["disk.qcow2"],
        "the mountpoint had been created for the mount"
    );
}

#[test]
fn busy_mount_is_not_taken_away_unless_forced() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = qcow2_with(&scratch, "disk.qcow2", &noise(8, 1 << 20));
    let (daemon, _) = mount(&scratch, &[&image, &arg(&scratch, "m")], "m");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(scratch.path("m"))
        .unwrap();
    let ended = run_to_end(&scratch, &["umount", &arg(&scratch, "m")]);
    assert!(
        ended.code == Some(1) && ended.stderr.contains("busy"),
        "{ended:?}"
    );
    assert!(daemon.is_alive());
    file.write_all_at(b"still served", 0).unwrap();
    let ended = run_to_end(&scratch, &["umount", "--force", &arg(&scratch, "m")]);
    assert!(ended.success(), "{ended:?}");
    assert!(!daemon.is_alive());
    drop(file);
    assert!(
        qemu::content(&scratch, &scratch.path("disk.qcow2"), "qcow2").starts_with(b"still served")
    );
    qemu::assert_clean(&scratch.path("disk.qcow2"));
}

#[test]
fn format_is_guessed_safely() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let content = noise(9, 1 << 20);
    let plain = scratch.file("plain.img", &content);
    let plain = plain.to_str().unwrap();
    let (_daemon, ended) = mount(&scratch, &[plain, &arg(&scratch, "m")], "m");
    assert!(
        (ended.stdout + &ended.stderr).contains("raw"),
        "it says that it took the image for raw"
    );
    assert_same("mount", &fs::read(scratch.path("m")).unwrap(), &content);
    umount(&scratch, &arg(&scratch, "m"));

    // What a guest can write to its raw disk must not turn it into another format by itself.
    let image = qcow2_with(&scratch, "disk.qcow2", &content);
    fs::copy(&image, scratch.path("disk.raw")).unwrap();
    let disguised = arg(&scratch, "disk.raw");
    refused(
        &scratch,
        &["mount", &disguised, &arg(&scratch, "m")],
        &["looks like qcow2", "--format"],
    );
    let (_daemon, _) = mount(
        &scratch,
        &["--format", "raw", &disguised, &arg(&scratch, "m")],
        "m",
    );
    assert_same(
        "as raw",
        &fs::read(scratch.path("m")).unwrap(),
        &fs::read(&image).unwrap(),
    );
    umount(&scratch, &arg(&scratch, "m"));
    let (_daemon, _) = mount(
        &scratch,
        &["--format=qcow2", &disguised, &arg(&scratch, "m")],
        "m",
    );
    assert_same("as qcow2", &fs::read(scratch.path("m")).unwrap(), &content);
    umount(&scratch, &arg(&scratch, "m"));

    scratch.file("no.qcow2", &content);
    let no = arg(&scratch, "no.qcow2");
    refused(
        &scratch,
        &["mount", &no, &arg(&scratch, "m")],
        &["does not look like"],
    );
    let vmdk = arg(&scratch, "disk.vmdk");
    qemu::img(&["create", "-q", "-f", "vmdk", &vmdk, "1M"]);
    refused(&scratch, &["mount", &vmdk, &arg(&scratch, "m")], &["vmdk"]);
}

#[test]
fn other_files_that_the_image_brings_in_are_named() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    qcow2_with(&scratch, "base.qcow2", &noise(10, 1 << 20));
    let image = scratch.path("top.qcow2");
    qemu::create(&image, 1 << 20, "backing_file=base.qcow2,backing_fmt=qcow2");
    let (_daemon, ended) = mount(
        &scratch,
        &[image.to_str().unwrap(), &arg(&scratch, "m")],
        "m",
    );
    assert!((ended.stdout + &ended.stderr).contains("base.qcow2"));
    assert_same(
        "mount",
        &fs::read(scratch.path("m")).unwrap(),
        &noise(10, 1 << 20),
    );
    umount(&scratch, &arg(&scratch, "m"));
}

#[test]
fn wrong_use_is_explained_and_leaves_nothing() {
    only_stord!();
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = qcow2_with(&scratch, "disk.qcow2", &noise(11, 1 << 20));
    fs::create_dir(scratch.path("dir")).unwrap();
    let at = arg(&scratch, "m");
    refused(
        &scratch,
        &["mount", &arg(&scratch, "missing"), &at],
        &["missing", "No such file or directory"],
    );
    refused(
        &scratch,
        &["mount", &arg(&scratch, "dir"), &at],
        &["neither a file nor a block device"],
    );
    refused(
        &scratch,
        &["mount", &image, &arg(&scratch, "dir")],
        &["directory"],
    );
    refused(
        &scratch,
        &["mount", &image, &arg(&scratch, "absent/m")],
        &["No such file or directory"],
    );
    refused(
        &scratch,
        &["mount", "--partition", "1", &image, &at],
        &["partition"],
    );
    refused(&scratch, &["mount", "--format=vdi", &image, &at], &["vdi"]);
    refused(&scratch, &["umount", &at], &["is not mounted"]);
    let truncated = scratch.file("short.qcow2", &fs::read(&image).unwrap()[..100]);
    refused(
        &scratch,
        &["mount", truncated.to_str().unwrap(), &at],
        &["qcow2 header too short"],
    );
    let usage = run_to_end(&scratch, &["mount"]);
    assert!(
        usage.code == Some(1) && usage.stderr.contains("IMAGE"),
        "{usage:?}"
    );
    let usage = run_to_end(&scratch, &["mound", &image]);
    assert!(
        usage.code == Some(1) && usage.stderr.contains("mound"),
        "{usage:?}"
    );

    // Mounted already, by this program and by another.
    let (_daemon, _) = mount(&scratch, &[&image, &at], "m");
    refused(
        &scratch,
        &["mount", &image, &arg(&scratch, "n")],
        &["mounted", "stord umount"],
    );
    refused(
        &scratch,
        &["mount", "--read-only", &image, &arg(&scratch, "n")],
        &["lock"],
    );
    let other = qcow2_with(&scratch, "other.qcow2", &noise(12, 1 << 20));
    refused(&scratch, &["mount", &other, &at], &["mounted"]);
    umount(&scratch, &at);
    let mut holder = Command::new("qemu-io")
        .args(["-f", "qcow2", &image])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut input = holder.stdin.take().unwrap();
    eventually("qemu-io holds the image", 30, || {
        !run_in(scratch.dir(), "qemu-img", &["info", &image]).success()
    });
    refused(&scratch, &["mount", &image, &at], &["lock"]);
    input.write_all(b"quit\n").unwrap();
    holder.wait().unwrap();
}

/// A user without privileges mounts, works and unmounts with the two commands alone.
#[test]
fn unprivileged_user() {
    only_stord!();
    needs!(root, "qemu-img", "setpriv", "fusermount3");
    const NOBODY: u32 = 65534;
    let scratch = Scratch::new();
    let image = qcow2_with(&scratch, "disk.qcow2", &noise(14, 1 << 20));
    let copy = scratch.path("stord");
    fs::copy(program(), &copy).unwrap();
    fs::create_dir(scratch.path("run")).unwrap();
    for path in [scratch.dir(), Path::new(&image), &scratch.path("run")] {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let as_nobody = |args: &[&str]| -> Ended {
        crate::support::run::limited("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&copy)
            .args(args)
            .env("XDG_RUNTIME_DIR", scratch.path("run"))
            .current_dir(scratch.dir())
            .output()
            .unwrap()
            .into()
    };
    let mounted = as_nobody(&["mount", &image, "m"]);
    assert!(mounted.success(), "{mounted:?}");
    assert!(mounts::on(&scratch.path("m")).is_some());
    let unmounted = as_nobody(&["umount", "m"]);
    assert!(unmounted.success(), "{unmounted:?}");
    assert!(mounts::below(scratch.dir()).is_empty());
    assert_eq!(scratch.names(), ["disk.qcow2", "run", "stord"]);
    qemu::assert_clean(Path::new(&image));
}

#[test]
fn help_is_for_people() {
    only_stord!();
    let scratch = Scratch::new();
    for (args, words) in [
        (
            &["mount", "--help"][..],
            &["--read-only", "--foreground", "--partition", "--format"][..],
        ),
        (&["umount", "--help"], &["--force"]),
        (&["--help"], &["mount"]),
    ] {
        let ended = run_to_end(&scratch, args);
        assert!(ended.success(), "{ended:?}");
        for word in words {
            assert!(
                ended.stdout.contains(word),
                "{args:?}: {word} is not in {}",
                ended.stdout
            );
        }
    }
}
