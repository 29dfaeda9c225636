//! The sequences that users have today for QEMU's storage daemon, unchanged but for the program's name.

use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, chown};
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::needs;
use crate::support::daemon::{Daemon, STOP_SECONDS, fuse_args, is_qemu, program, run_to_end};
use crate::support::model::{assert_same, noise};
use crate::support::prerequisites::find;
use crate::support::{Qmp, Scratch, eventually, mounts, qemu};

/// The first example of the manual page, with its short forms `server` and `nowait`.
#[test]
fn manual_page_monitor() {
    let scratch = Scratch::new();
    let daemon = Daemon::start(
        &scratch,
        &[
            "--chardev",
            "socket,path=qmp.sock,server,nowait,id=char1",
            "--monitor",
            "chardev=char1",
        ],
    );
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    qmp.execute("query-version", json!({}));
    daemon.quit(&mut qmp);
}

/// The manual page's nodes, `file` and the format above it by name, with the export this program has for them.
#[test]
fn manual_page_nodes() {
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::new();
    qemu::create(&scratch.path("disk.qcow2"), 4 << 20, "");
    qemu::io(
        &scratch.path("disk.qcow2"),
        "qcow2",
        &["write -P 7 0 4M".to_owned()],
    );
    fs::write(scratch.path("disk.img"), noise(1, 1 << 20)).unwrap();
    scratch.empty_file("raw");
    scratch.empty_file("qcow");
    let daemon = Daemon::start(
        &scratch,
        &[
            "--blockdev",
            "driver=file,node-name=disk,filename=disk.img",
            "--export",
            "type=fuse,id=raw,node-name=disk,mountpoint=raw,writable=on",
            "--blockdev",
            "driver=file,node-name=file,filename=disk.qcow2",
            "--blockdev",
            "driver=qcow2,node-name=qcow2,file=file",
            "--export",
            "fuse,id=qcow,node-name=qcow2,mountpoint=qcow",
        ],
    );
    assert_same(
        "raw",
        &fs::read(scratch.path("raw")).unwrap(),
        &noise(1, 1 << 20),
    );
    assert_same(
        "qcow2",
        &fs::read(scratch.path("qcow")).unwrap(),
        &[7; 4 << 20],
    );
    daemon.stop();
}

/// The same in JSON, as management programs write it.
#[test]
fn options_in_json() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    qemu::create(&scratch.path("disk.qcow2"), 4 << 20, "");
    scratch.empty_file("mnt");
    let blockdev = json!({"driver": "qcow2", "node-name": "disk", "discard": "unmap", "cache": {"direct": false},
        "file": {"driver": "file", "filename": "disk.qcow2", "locking": "auto"}});
    let export = json!({"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": "mnt", "writable": true});
    let object = json!({"qom-type": "iothread", "id": "io"});
    let monitor = json!({"chardev": "c", "mode": "control"});
    let daemon = Daemon::start(
        &scratch,
        &[
            "--chardev",
            "socket,id=c,path=qmp.sock,server=on,wait=off",
            "--monitor",
            &monitor.to_string(),
            "--object",
            &object.to_string(),
            "--blockdev",
            &blockdev.to_string(),
            "--export",
            &export.to_string(),
        ],
    );
    assert_eq!(fs::metadata(scratch.path("mnt")).unwrap().len(), 4 << 20);
    daemon.quit(&mut Qmp::connect(&scratch.path("qmp.sock")));
}

/// What Proxmox does to let a program edit a small qcow2 disk (firmware variables, TPM state) as a raw file.
#[test]
fn proxmox() {
    needs!(root, "qemu-img");
    for round in 0..3 {
        let scratch = Scratch::new();
        let image = scratch.path("vm-100-disk-0.qcow2");
        qemu::create(&image, 528 << 10, "");
        let socket = scratch.path("qmp.sock");
        let mut daemon = Daemon::daemonize(
            &scratch,
            &[
                "--chardev",
                &format!("socket,id=qmp,path={},server=on,wait=off", socket.display()),
                "--monitor",
                "chardev=qmp,mode=control",
            ],
        );
        let mut qmp = Qmp::connect(&socket);
        qmp.execute(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "disk", "discard": "unmap", "detect-zeroes": "unmap",
                   "file": {"driver": "file", "filename": image.to_str().unwrap(), "node-name": "disk-file",
                            "cache": {"direct": false, "no-flush": false}}}),
        );
        let mount = scratch.path("export");
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&mount)
            .unwrap();
        qmp.execute(
            "block-export-add",
            json!({"type": "fuse", "id": "export", "node-name": "disk", "mountpoint": mount.to_str().unwrap(),
                   "writable": true, "growable": false, "allow-other": "off"}),
        );
        assert_eq!(fs::metadata(&mount).unwrap().len(), 528 << 10);
        let data = noise(round, 200_000);
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&mount)
            .unwrap();
        file.write_all_at(&data, 4096).unwrap();
        if round == 1 {
            file.sync_all().unwrap();
        }
        drop(file);
        assert!(daemon.is_alive());
        // The answer comes first, the end within the bound.
        qmp.execute("quit", json!({}));
        daemon.assert_ends_well();
        assert!(mounts::below(scratch.dir()).is_empty());
        let names = scratch.names();
        assert!(
            !names
                .iter()
                .any(|name| name.ends_with(".pid") || name.ends_with(".sock")),
            "{names:?}"
        );
        let mut wanted = vec![0; 528 << 10];
        wanted[4096..4096 + data.len()].copy_from_slice(&data);
        assert_same("image", &qemu::content(&scratch, &image, "qcow2"), &wanted);
        qemu::assert_clean(&image);
    }
}

/// Every orderly way to end leaves the image whole and closed, nothing mounted and no pid file.
#[test]
fn every_way_to_end_writes_everything_out() {
    needs!(root, "qemu-img");
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let scratch = Scratch::new();
        let image = scratch.path("disk.qcow2");
        qemu::create(&image, 16 << 20, "lazy_refcounts=on");
        let mount = scratch.empty_file("mnt");
        let daemon = Daemon::start(
            &scratch,
            &fuse_args(&image, "qcow2", "", &mount, ",writable=on"),
        );
        let data = noise(3, 5 << 20);
        let file = fs::OpenOptions::new().write(true).open(&mount).unwrap();
        file.write_all_at(&data, 1 << 20).unwrap();
        drop(file);
        daemon.stop_by(signal);
        assert!(mounts::on(&mount).is_none(), "{signal}");
        assert!(
            !scratch.names().iter().any(|name| name.ends_with(".pid")),
            "{signal}: {:?}",
            scratch.names()
        );
        assert_same(
            "image",
            &qemu::content(&scratch, &image, "qcow2")[1 << 20..6 << 20],
            &data,
        );
        qemu::assert_clean(&image);
    }
}

/// A program that keeps writing cannot keep the daemon from ending, and the image is whole all the same.
#[test]
fn end_under_load_is_bounded() {
    needs!(root, "qemu-img", "fio");
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 256 << 20, "");
    let mount = scratch.empty_file("mnt");
    let daemon = Daemon::start(
        &scratch,
        &fuse_args(&image, "qcow2", "", &mount, ",writable=on"),
    );
    let mut load = Command::new("fio")
        .args([
            "--name=load",
            "--rw=randwrite",
            "--bs=16k",
            "--ioengine=libaio",
            "--iodepth=16",
            "--direct=1",
        ])
        .args([
            "--time_based",
            "--runtime=120",
            "--size=256m",
            "--continue_on_error=none",
        ])
        .arg(format!("--filename={}", mount.display()))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    eventually("the load has written something", 30, || {
        fs::metadata(&image).unwrap().len() > 20 << 20
    });
    daemon.stop();
    let _ = load.kill();
    eventually("fio ends", STOP_SECONDS, || {
        load.try_wait().unwrap().is_some()
    });
    qemu::assert_clean(&image);
}

/// An image exported on its own path: whoever opens the path afterwards sees the disk, not the qcow2.
#[test]
fn image_on_its_own_path() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 8 << 20, "");
    let before = fs::File::open(&image).unwrap();
    let daemon = Daemon::start(
        &scratch,
        &[
            "--blockdev",
            "node-name=prot-node,driver=file,filename=disk.qcow2",
            "--blockdev",
            "node-name=fmt-node,driver=qcow2,file=prot-node",
            "--export",
            "type=fuse,id=exp0,node-name=fmt-node,mountpoint=disk.qcow2,writable=on",
        ],
    );
    assert_eq!(fs::metadata(&image).unwrap().len(), 8 << 20);
    let data = noise(8, 1 << 20);
    let disk = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    disk.write_all_at(&data, 3 << 20).unwrap();
    disk.sync_all().unwrap();
    let mut back = vec![0; 1 << 20];
    disk.read_exact_at(&mut back, 3 << 20).unwrap();
    assert_same("read back", &back, &data);
    drop(disk);
    let mut magic = [0; 4];
    before.read_exact_at(&mut magic, 0).unwrap();
    assert_eq!(
        &magic, b"QFI\xfb",
        "who had the image open still sees the image"
    );
    daemon.stop();
    let content = qemu::content(&scratch, &image, "qcow2");
    assert_same("image", &content[3 << 20..4 << 20], &data);
    qemu::assert_clean(&image);
}

/// Everything must go on working over the own path: reopening by name would end in the own mount.
#[test]
fn image_on_its_own_path_with_backing_file_grows() {
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let (base, image) = (scratch.path("base.qcow2"), scratch.path("disk.qcow2"));
    qemu::create(&base, 4 << 20, "");
    qemu::io(&base, "qcow2", &["write -P 6 0 4M".to_owned()]);
    qemu::create(&image, 4 << 20, "backing_file=base.qcow2,backing_fmt=qcow2");
    let mut args = fuse_args(&image, "qcow2", "", &image, ",writable=on,growable=on");
    args.extend(
        [
            "--chardev",
            "socket,id=c,path=qmp.sock,server=on,wait=off",
            "--monitor",
            "c",
        ]
        .map(str::to_owned),
    );
    let daemon = Daemon::start(&scratch, &args);
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    let disk = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    disk.write_all_at(&noise(1, 512), 5 << 20).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    qmp.execute("query-named-block-nodes", json!({}));
    qmp.execute("query-block-exports", json!({}));
    daemon.quit(&mut qmp);
    let content = qemu::content(&scratch, &image, "qcow2");
    assert_same("from the backing file", &content[..4 << 20], &[6; 4 << 20]);
    assert_same("grown", &content[5 << 20..], &noise(1, 512));
    qemu::assert_clean(&image);
}

const NOBODY: u32 = 65534;

/// A user without any privilege mounts through fusermount3.
#[test]
fn unprivileged_user() {
    needs!(root, "qemu-img", "setpriv", "fusermount3");
    let scratch = Scratch::new();
    chown(scratch.dir(), Some(NOBODY), Some(NOBODY)).unwrap();
    // The build directory may be closed to others.
    let daemon_copy = scratch.path(program().file_name().unwrap().to_str().unwrap());
    fs::copy(program(), &daemon_copy).unwrap();
    fs::set_permissions(&daemon_copy, fs::Permissions::from_mode(0o755)).unwrap();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 8 << 20, "");
    let mount = scratch.empty_file("mnt");
    for path in [&image, &mount] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let as_nobody = |program: &std::path::Path| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(program);
        command
    };
    for allow_other in ["", ",allow-other=auto", ",allow-other=off"] {
        let args = fuse_args(
            &image,
            "qcow2",
            "",
            &mount,
            &format!(",writable=on{allow_other}"),
        );
        let daemon = Daemon::start_as(&scratch, as_nobody(&daemon_copy), &args);
        assert!(mounts::on(&mount).is_some());
        let copy = |from: &str, to: &str| {
            let status = as_nobody(&find("dd").unwrap())
                .args([
                    &format!("if={from}"),
                    &format!("of={to}"),
                    "bs=64k",
                    "conv=notrunc,fsync",
                    "status=none",
                ])
                .status()
                .unwrap();
            assert!(status.success(), "dd from {from} to {to}");
        };
        let data = scratch.file("data", &noise(4, 1 << 20));
        copy(data.to_str().unwrap(), mount.to_str().unwrap());
        let out = scratch.path("out");
        copy(mount.to_str().unwrap(), out.to_str().unwrap());
        assert_same(
            "read back",
            &fs::read(&out).unwrap()[..1 << 20],
            &noise(4, 1 << 20),
        );
        daemon.stop();
        assert!(mounts::on(&mount).is_none());
        qemu::assert_clean(&image);
    }
    // Nothing of root's may be touched by it.
    if !is_qemu() {
        let ended = as_nobody(&daemon_copy)
            .args(["--pidfile", "/run/stord-test.pid"])
            .output()
            .unwrap();
        assert!(!ended.status.success());
    }
}

/// A user who asks for what only an administrator can allow is told so.
#[test]
fn unprivileged_allow_other_is_refused_unless_configured() {
    needs!(root, "qemu-img", "setpriv", "fusermount3");
    let configured = fs::read_to_string("/etc/fuse.conf")
        .is_ok_and(|text| text.lines().any(|line| line.trim() == "user_allow_other"));
    if configured {
        return; // Allowed here: the case above covers the mount itself.
    }
    let scratch = Scratch::new();
    chown(scratch.dir(), Some(NOBODY), Some(NOBODY)).unwrap();
    let daemon_copy = scratch.path(program().file_name().unwrap().to_str().unwrap());
    fs::copy(program(), &daemon_copy).unwrap();
    let mount = scratch.empty_file("mnt");
    chown(&mount, Some(NOBODY), Some(NOBODY)).unwrap();
    let ended = crate::support::run::run_in(
        scratch.dir(),
        "setpriv",
        &[
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            daemon_copy.to_str().unwrap(),
            "--blockdev",
            "null-co,node-name=n,size=1048576",
            "--export",
            "fuse,id=e,node-name=n,mountpoint=mnt,allow-other=on",
        ],
    );
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(mounts::on(&mount).is_none());
    assert!(ended.stderr.contains("allow_other"), "{ended:?}");
}

#[test]
fn help_and_version_end_well() {
    let scratch = Scratch::new();
    for (option, wanted) in [
        ("--help", "--blockdev [driver=]<driver>"),
        ("-h", "--export [type=]fuse"),
    ] {
        let ended = run_to_end(&scratch, &[option]);
        assert!(
            ended.success() && ended.stdout.contains(wanted),
            "{ended:?}"
        );
    }
    for option in ["--version", "-V"] {
        let ended = run_to_end(&scratch, &[option]);
        assert!(
            ended.success() && ended.stdout.contains(" version "),
            "{ended:?}"
        );
    }
    let ended = run_to_end(&scratch, &["--object", "help"]);
    assert!(
        ended.success() && ended.stdout.contains("\n  iothread\n"),
        "{ended:?}"
    );
    let ended = run_to_end(&scratch, &["--object", "iothread,help"]);
    assert!(
        ended.success() && ended.stdout.contains("  poll-max-ns=<int>"),
        "{ended:?}"
    );
    let ended = run_to_end(&scratch, &["--chardev", "help"]);
    assert!(
        ended.success() && ended.stdout.contains("\n  socket\n"),
        "{ended:?}"
    );
}

/// Containers often refuse io_uring; scripts/test runs more of these tests this way.
#[test]
fn works_without_io_uring() {
    needs!(root, "qemu-img");
    if is_qemu() {
        return; // It uses io_uring on demand only.
    }
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 4 << 20, "");
    let mount = scratch.empty_file("mnt");
    let mut command = Command::new(program());
    command.env("STORD_ENGINE", "fallback");
    let args = fuse_args(&image, "qcow2", "", &mount, ",writable=on");
    let daemon = Daemon::start_as(&scratch, command, &args);
    let rings = fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
        .unwrap()
        .flatten()
        .filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.ends_with("anon_inode:[io_uring]")))
        .count();
    assert_eq!(rings, 0);
    let data = noise(6, 4 << 20);
    fs::write(&mount, &data).unwrap();
    assert_same("read back", &fs::read(&mount).unwrap(), &data);
    daemon.stop();
    assert_same("image", &qemu::content(&scratch, &image, "qcow2"), &data);
    qemu::assert_clean(&image);
}

/// Options take effect in the order given: a node may be used only after the option that makes it.
#[test]
fn order_of_options_counts() {
    needs!(root);
    let scratch = Scratch::new();
    scratch.empty_file("mnt");
    let ended = run_to_end(
        &scratch,
        &[
            "--export",
            "fuse,id=e,node-name=n,mountpoint=mnt",
            "--blockdev",
            "null-co,node-name=n,size=1048576",
        ],
    );
    assert_eq!(ended.code, Some(1));
    assert!(
        ended
            .stderr
            .contains("Cannot find device='' nor node-name='n'"),
        "{ended:?}"
    );
}
