//! What people and their programs do with NBD servers: looking at them, mounting them, copying from and to them.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};

use super::{BYTES, SIZE, Served};
use crate::needs;
use crate::support::disk::MIB;
use crate::support::model::{assert_same, noise};
use crate::support::prerequisites::skip;
use crate::support::run::{Ended, limited, run, run_ok};
use crate::support::{Scratch, eventually, mounts, qemu};

#[test]
fn nbdinfo_asks_for_everything_it_knows() {
    needs!("qemu-img", "nbdinfo");
    let served = Served::start(&noise(1, MIB), "", ",writable=on,description=for you");
    let uri = served.uri();
    let answers =
        |option: &str, what: &str, uri: &str| match run("nbdinfo", &[option, what, uri]).code {
            Some(0) => true,
            Some(2) => false,
            code => panic!("{option} {what}: {code:?}"),
        };
    for what in [
        "connect",
        "read",
        "write",
        "cache",
        "df",
        "fast-zero",
        "flush",
        "fua",
        "multi-conn",
        "trim",
        "zero",
        "structured-reply",
    ] {
        assert!(answers("--can", what, &uri), "{what}");
    }
    for what in ["read-only", "rotational", "tls"] {
        assert!(!answers("--is", what, &uri), "{what}");
    }
    let mut qmp = served.qmp();
    qmp.execute(
        "block-export-add",
        json!({"type": "nbd", "id": "r", "node-name": "disk", "name": "r"}),
    );
    let reader = uri.replace("/disk?", "/r?");
    for what in ["connect", "read", "cache", "df", "flush", "multi-conn"] {
        assert!(answers("--can", what, &reader), "{what}");
    }
    for what in ["write", "trim", "zero", "fast-zero"] {
        assert!(!answers("--can", what, &reader), "{what}");
    }
    assert!(answers("--is", "read-only", &reader));

    assert_eq!(
        run_ok("nbdinfo", &["--size", &uri]).trim(),
        SIZE.to_string()
    );
    let size: Value =
        serde_json::from_str(&run_ok("nbdinfo", &["--size", "--json", &uri])).unwrap();
    assert_eq!(size, SIZE);
    let map = run_ok("nbdinfo", &["--map", &uri]);
    let map: Vec<Vec<&str>> = map
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        map,
        [
            vec!["0", "1048576", "0", "data"],
            vec!["1048576", "66060288", "3", "hole,zero"]
        ]
    );
    let totals: Value = serde_json::from_str(&run_ok(
        "nbdinfo",
        &["--map=base:allocation", "--totals", "--json", &uri],
    ))
    .unwrap();
    let sizes: Vec<_> = totals
        .as_array()
        .unwrap()
        .iter()
        .map(|it| (&it["description"], it["size"].as_u64()))
        .collect();
    assert_eq!(
        sizes,
        [
            (&json!("data"), Some(MIB as u64)),
            (&json!("hole,zero"), Some(SIZE - MIB as u64))
        ]
    );

    let all = format!("nbd+unix:///?socket={}", served.socket.display());
    let list = run_ok("nbdinfo", &["--list", &all]);
    for text in [
        "export=\"disk\":",
        "export=\"r\":",
        "description: for you",
        "is_read_only: true",
        "base:allocation",
    ] {
        assert!(list.contains(text), "{text}: {list}");
    }
    let list: Value =
        serde_json::from_str(&run_ok("nbdinfo", &["--list", "--json", &all])).unwrap();
    let mut names: Vec<_> = list["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["export-name"].clone())
        .collect();
    names.sort_by_key(ToString::to_string);
    assert_eq!(names, ["disk", "r"]);
    let text = run_ok("nbdinfo", &[&uri]);
    for line in [
        "protocol: newstyle-fixed without TLS",
        "using structured packets",
        "block_size_preferred: 4096",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    served.daemon.quit(&mut qmp);
}

#[test]
fn qemu_nbd_lists_the_exports() {
    needs!("qemu-img", "qemu-nbd");
    let served = Served::start(
        &[],
        "",
        ",writable=on,description=for you,allocation-depth=on",
    );
    let list = run_ok(
        "qemu-nbd",
        &["--list", "--socket", served.socket.to_str().unwrap()],
    );
    for text in [
        "exports available: 1",
        "export: 'disk'",
        "description: for you",
        &format!("size:  {SIZE}"),
        "flush fua trim zeroes df multi cache fast-zero",
        "min block: 1",
        "opt block: 4096",
        "max block: 33554432",
        "available meta contexts: 2",
        "base:allocation",
        "qemu:allocation-depth",
    ] {
        assert!(list.contains(text), "{text}: {list}");
    }
    served.daemon.stop();
}

/// How Proxmox moves disks: names in QEMU's older notation, into an export that exists, and out of it.
#[test]
fn disks_are_moved_by_qemu_img() {
    needs!("qemu-img");
    let served = Served::start(&[], ",max-connections=0", ",writable=on,name=drive-scsi0");
    let mut content = noise(2, BYTES);
    content[8 * MIB..40 * MIB].fill(0);
    let source = served.scratch.file("source", &content);
    let target = format!(
        "nbd:unix:{}:exportname=drive-scsi0",
        served.socket.display()
    );
    let convert = [
        "convert",
        "-p",
        "-n",
        "-f",
        "raw",
        "-O",
        "raw",
        "--target-is-zero",
        "-W",
        "-m",
        "16",
    ];
    run_ok(
        "qemu-img",
        &[&convert[..], &[source.to_str().unwrap(), &target]].concat(),
    );
    run_ok(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            source.to_str().unwrap(),
            &target,
        ],
    );
    let copy = served.scratch.path("copy.qcow2");
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=drive-scsi0",
        served.socket.display()
    );
    run_ok(
        "qemu-img",
        &[
            "convert",
            "--image-opts",
            &options,
            "-O",
            "qcow2",
            copy.to_str().unwrap(),
        ],
    );
    assert_same(
        "the copy",
        &qemu::content(&served.scratch, &copy, "qcow2"),
        &content,
    );
    served.assert_image_is(&content);
}

/// How virt-v2v copies: nbdkit with a layer that takes writes in front of the server, and nbdcopy out of that.
#[test]
fn overlay_of_nbdkit_leaves_the_server_alone() {
    needs!("qemu-img", "nbdkit", "nbdcopy", "nbdsh");
    let content = noise(3, BYTES);
    let served = Served::start(&content, "", "");
    let copy = served.scratch.path("copy");
    let socket = format!("socket={}", served.socket.display());
    let run = format!(
        "PATH=/usr/bin:$PATH nbdsh -u \"$uri\" -c 'h.pwrite(b\"x\" * 100000, 70000)' && nbdcopy \"$uri\" {}",
        copy.display()
    );
    run_ok(
        "nbdkit",
        &[
            "-U",
            "-",
            "--filter=cow",
            "--filter=retry",
            "nbd",
            &socket,
            "export=disk",
            "shared=true",
            "--run",
            &run,
        ],
    );
    let mut wanted = content.clone();
    wanted[70_000..170_000].fill(b'x');
    assert_same("the copy", &fs::read(copy).unwrap(), &wanted);
    served.assert_image_is(&content);
}

#[test]
fn nbdfuse_shows_it_as_a_file() {
    needs!(root, "qemu-img", "nbdfuse", "fusermount3");
    let content = noise(4, BYTES);
    let served = Served::start(&content, "", ",writable=on");
    let dir = served.scratch.path("mnt");
    fs::create_dir(&dir).unwrap();
    let path = dir.join("nbd");
    let mut child = limited("nbdfuse")
        .args(["--connections=4", path.to_str().unwrap(), &served.uri()])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("it is mounted", 60, || {
        mounts::on(&dir).is_some() && path.exists()
    });
    let mut file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mut read = Vec::new();
    file.read_to_end(&mut read).unwrap();
    assert_same("the file", &read, &content);
    file.seek(SeekFrom::Start(300_000)).unwrap();
    file.write_all(&[7; 200_000]).unwrap();
    file.sync_all().unwrap();
    drop(file);
    run_ok("fusermount3", &["-u", dir.to_str().unwrap()]);
    assert!(child.wait().unwrap().success());
    let mut wanted = content;
    wanted[300_000..500_000].fill(7);
    served.assert_image_is(&wanted);
}

/// The kernel that scripts/vm unpacks, for programs that start a machine of their own.
fn kernel() -> Option<(PathBuf, String)> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .filter(|path| !path.is_empty())
        .map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let dir = cache.join("stord/vm/kernel");
    let version = fs::read_to_string(dir.join("version"))
        .ok()?
        .trim()
        .to_owned();
    dir.join("vmlinuz").is_file().then_some((dir, version))
}

/// libguestfs boots a machine with the disk, and mounts the file system inside.
#[test]
fn guestfish_mounts_the_file_system_inside() {
    needs!("qemu-img", "guestfish", "mkfs.ext4");
    let Some((dir, version)) = kernel() else {
        skip("no kernel for a machine: run scripts/vm fetch");
        return;
    };
    if !Path::new("/lib/modules").is_dir() {
        skip(
            "supermin wants the directory /lib/modules, even an empty one: run scripts/setup test",
        );
        return;
    }
    let scratch = Scratch::new();
    let files = scratch.path("files");
    fs::create_dir(&files).unwrap();
    fs::write(files.join("letter"), "from the host\n").unwrap();
    let raw = scratch.path("raw");
    run_ok(
        "mkfs.ext4",
        &[
            "-q",
            "-d",
            files.to_str().unwrap(),
            raw.to_str().unwrap(),
            "64M",
        ],
    );
    let image = scratch.path("disk.qcow2");
    run_ok(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            raw.to_str().unwrap(),
            image.to_str().unwrap(),
        ],
    );
    let served = Served::start_over(scratch, image, &[], "", ",writable=on");
    let disk = format!("nbd:///disk?socket={}", served.socket.display());
    let cache = served.scratch.path("cache");
    fs::create_dir(&cache).unwrap();
    let output = limited("guestfish")
        .args(["--format=raw", "-a", &disk])
        .args([
            "run", ":", "mount", "/dev/sda", "/", ":", "cat", "/letter", ":",
        ])
        .args([
            "write",
            "/answer",
            "from the guest\n",
            ":",
            "umount-all",
            ":",
            "shutdown",
        ])
        .env("SUPERMIN_KERNEL", dir.join("vmlinuz"))
        .env("SUPERMIN_MODULES", dir.join("lib/modules").join(&version))
        .env("SUPERMIN_KERNEL_VERSION", &version)
        .env("LIBGUESTFS_BACKEND", "direct")
        // Where this machine is one itself, KVM may be there and not work.
        .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
        .env("LIBGUESTFS_CACHEDIR", &cache)
        .env("TMPDIR", &cache)
        .output()
        .unwrap();
    let ended = Ended::from(output);
    assert!(ended.success(), "{ended:?}");
    assert_eq!(ended.stdout.trim(), "from the host");
    served.daemon.stop();
    let raw = Scratch::new();
    let content = raw.file("content", &qemu::content(&raw, &served.image, "qcow2"));
    assert_eq!(
        run_ok("debugfs", &["-R", "cat /answer", content.to_str().unwrap()]),
        "from the guest\n"
    );
}

#[test]
fn fio_reads_back_over_several_connections() {
    needs!("qemu-img", "fio");
    let served = Served::start(&[], "", ",writable=on");
    let uri = format!("--uri={}", served.uri());
    let args = [
        "--name=verify",
        "--ioengine=nbd",
        "--iodepth=16",
        "--numjobs=4",
        "--thread",
        "--offset_increment=16M",
        "--size=16M",
        "--rw=randrw",
        "--rwmixread=30",
        "--bsrange=512-64k",
        "--bs_unaligned=0",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_backlog=128",
        "--verify_state_save=0",
        "--fsync=64",
        &uri,
    ];
    let output = limited("fio")
        .args(args)
        .current_dir(served.scratch.dir())
        .output()
        .unwrap();
    let ended = Ended::from(output);
    assert!(ended.success(), "{}\n{}", ended.stdout, ended.stderr);
    served.daemon.stop();
    qemu::assert_clean(&served.image);
}
