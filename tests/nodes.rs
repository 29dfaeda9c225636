//! Kinds of block nodes and options of theirs that change what a user sees.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::json;

use crate::needs;
use crate::support::daemon::{Daemon, fuse_args, is_qemu, program, run_to_end};
use crate::support::loop_device::LoopDevice;
use crate::support::model::{assert_same, noise};
use crate::support::{Qmp, Scratch, mounts, qemu, run_ok};

const MIB: u64 = 1 << 20;

/// A daemon with a monitor and what else is given.
fn with_monitor(scratch: &Scratch, args: &[&str]) -> (Daemon, Qmp) {
    let mut all = vec![
        "--chardev",
        "socket,id=c,path=qmp.sock,server=on,wait=off",
        "--monitor",
        "c",
    ];
    all.extend(args);
    let daemon = Daemon::start(scratch, &all);
    let qmp = Qmp::connect(&scratch.path("qmp.sock"));
    (daemon, qmp)
}

fn open_rw(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

#[test]
fn block_device_as_image() {
    needs!(root, "losetup");
    let scratch = Scratch::new();
    let content = noise(1, 4 << 20);
    let file = scratch.file("disk.raw", &content);
    let device = LoopDevice::attach(&file, false);
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(
        &scratch,
        &[
            "--blockdev",
            &format!(
                "host_device,node-name=disk,filename={},discard=unmap",
                device.path
            ),
            "--export",
            "fuse,id=e,node-name=disk,mountpoint=mount,writable=on",
        ],
    );
    assert_same("device", &fs::read(&mount).unwrap(), &content);
    let disk = open_rw(&mount);
    disk.write_all_at(&noise(2, 100_000), MIB).unwrap();
    disk.sync_all().unwrap();
    assert!(
        disk.write_at(b"x", 4 * MIB).is_err(),
        "a device does not grow"
    );
    drop(disk);
    daemon.stop();
    drop(device);
    let mut wanted = content;
    wanted[1 << 20..(1 << 20) + 100_000].copy_from_slice(&noise(2, 100_000));
    assert_same("file under the device", &fs::read(&file).unwrap(), &wanted);
}

#[test]
fn qcow2_on_a_block_device() {
    needs!(root, "losetup", "qemu-img");
    let scratch = Scratch::new();
    let file = scratch.file("device", &[]);
    File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(32 << 20)
        .unwrap();
    let device = LoopDevice::attach(&file, false);
    qemu::img(&["create", "-q", "-f", "qcow2", &device.path, "16M"]);
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(
        &scratch,
        &[
            "--blockdev",
            &format!(
                "qcow2,node-name=disk,file.driver=host_device,file.filename={}",
                device.path
            ),
            "--export",
            "fuse,id=e,node-name=disk,mountpoint=mount,writable=on",
        ],
    );
    fs::write(&mount, noise(3, 16 << 20)).unwrap();
    daemon.stop();
    assert_same(
        "disk",
        &qemu::content(&scratch, Path::new(&device.path), "qcow2"),
        &noise(3, 16 << 20),
    );
    run_ok("qemu-img", &["check", "-f", "qcow2", &device.path]);
}

/// What lies on a read-only file system can be read, and is refused for writing by name.
#[test]
fn image_on_a_read_only_file_system() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let dir = scratch.path("dir");
    fs::create_dir(&dir).unwrap();
    let image = dir.join("disk.qcow2");
    qemu::create(&image, MIB, "");
    let dir = dir.to_str().unwrap();
    run_ok("mount", &["--bind", "-o", "ro", dir, dir]);
    let mount = scratch.empty_file("mount");
    let name = program().file_name().unwrap().to_str().unwrap().to_owned();
    let option = "file,node-name=f,filename=dir/disk.qcow2";
    let ended = run_to_end(&scratch, &["--blockdev", option]);
    assert_eq!(ended.code, Some(1));
    let said = format!(
        "{name}: --blockdev {option}: Could not open 'dir/disk.qcow2': Read-only file system\n"
    );
    // Ours adds what may be meant.
    assert!(ended.stderr.starts_with(&said), "{ended:?}");
    for read_only in [
        "auto-read-only=on",
        "read-only=on",
        "read-only=off,auto-read-only=on",
    ] {
        let daemon = Daemon::start(
            &scratch,
            &[
                "--blockdev",
                &format!("file,node-name=f,filename=dir/disk.qcow2,{read_only}"),
                "--blockdev",
                "qcow2,node-name=disk,file=f,read-only=on",
                "--export",
                "fuse,id=e,node-name=disk,mountpoint=mount",
            ],
        );
        assert_same(read_only, &fs::read(&mount).unwrap(), &[0; 1 << 20]);
        daemon.stop();
    }
    assert!(mounts::detach(Path::new(dir)));
}

#[test]
fn zeroes_are_detected() {
    needs!(root, "qemu-img", "qemu-io");
    for (detect, zero, data) in [
        ("off", false, true),
        ("on", true, true),
        ("unmap", true, false),
    ] {
        let scratch = Scratch::new();
        let image = scratch.path("disk.qcow2");
        qemu::create(&image, 4 * MIB, "");
        qemu::io(&image, "qcow2", &["write -P 1 0 4M".to_owned()]);
        let mount = scratch.empty_file("mount");
        let node = format!(",discard=unmap,detect-zeroes={detect}");
        let daemon = Daemon::start(
            &scratch,
            &fuse_args(&image, "qcow2", &node, &mount, ",writable=on"),
        );
        open_rw(&mount).write_all_at(&[0; 1 << 20], MIB).unwrap();
        daemon.stop();
        let map = qemu::img(&[
            "map",
            "-f",
            "qcow2",
            "--output=json",
            image.to_str().unwrap(),
        ]);
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let extent = map.as_array().unwrap().iter().find(|extent| {
            let start = extent["start"].as_u64().unwrap();
            (start..start + extent["length"].as_u64().unwrap()).contains(&(MIB + 5))
        });
        let extent = extent.unwrap();
        assert_eq!(extent["zero"], zero, "{detect}: {map}");
        // Space is given back only where that is asked for.
        assert_eq!(extent.get("offset").is_some(), data, "{detect}: {map}");
    }
}

#[test]
fn backing_file_as_given() {
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::new();
    fs::write(scratch.path("one.raw"), noise(4, 1 << 20)).unwrap();
    fs::write(scratch.path("two.raw"), noise(5, 1 << 20)).unwrap();
    qemu::create(
        &scratch.path("disk.qcow2"),
        MIB,
        "backing_file=one.raw,backing_fmt=raw",
    );
    let file = json!({"driver": "file", "filename": "disk.qcow2"});
    let two = json!({"driver": "raw", "file": {"driver": "file", "filename": "two.raw"}});
    let (daemon, mut qmp) = with_monitor(
        &scratch,
        &[
            "--blockdev",
            "raw,node-name=base,read-only=on,file.driver=file,file.filename=two.raw",
        ],
    );
    let mount = scratch.empty_file("mount");
    for (backing, wanted) in [
        (None, noise(4, 1 << 20)),
        (Some(json!(null)), vec![0; 1 << 20]),
        (Some(two), noise(5, 1 << 20)),
        (Some(json!("base")), noise(5, 1 << 20)),
    ] {
        let mut options = json!({"driver": "qcow2", "node-name": "disk", "file": file});
        if let Some(backing) = &backing {
            options["backing"] = backing.clone();
        }
        qmp.execute("blockdev-add", options);
        qmp.execute(
            "block-export-add",
            json!({"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": "mount"}),
        );
        assert_same(
            &format!("backing: {backing:?}"),
            &fs::read(&mount).unwrap(),
            &wanted,
        );
        qmp.execute("block-export-del", json!({"id": "e"}));
        qmp.event("BLOCK_EXPORT_DELETED");
        qmp.execute("blockdev-del", json!({"node-name": "disk"}));
    }
    daemon.quit(&mut qmp);
}

#[test]
fn backing_file_named_in_json() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let base = scratch.file("base.raw", &noise(6, 1 << 20));
    let image = scratch.path("disk.qcow2");
    let window = json!({"driver": "raw", "offset": 65536, "size": 131_072,
        "file": {"driver": "file", "filename": base.to_str().unwrap()}});
    let backing = format!("json:{window}");
    qemu::img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        &backing,
        "-F",
        "raw",
        image.to_str().unwrap(),
        "131072",
    ]);
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(&scratch, &fuse_args(&image, "qcow2", "", &mount, ""));
    assert_same(
        "window",
        &fs::read(&mount).unwrap(),
        &noise(6, 1 << 20)[65536..65536 + 131_072],
    );
    daemon.stop();
}

/// QEMU's daemon rounds sizes up to whole sectors; ours shows a raw file byte for byte.
#[test]
fn image_that_ends_within_a_sector() {
    needs!(root);
    let scratch = Scratch::new();
    let image = scratch.file("disk.raw", &noise(7, 100_000));
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(
        &scratch,
        &fuse_args(&image, "raw", "", &mount, ",writable=on"),
    );
    let got = fs::read(&mount).unwrap();
    assert_same("content", &got[..100_000], &noise(7, 100_000));
    assert!(got[100_000..].iter().all(|byte| *byte == 0));
    assert!(is_qemu() || got.len() == 100_000);
    open_rw(&mount).write_all_at(b"end", 99_997).unwrap();
    daemon.stop();
    let closed = fs::read(&image).unwrap();
    assert!(is_qemu() || closed.len() == 100_000);
    assert_eq!(&closed[99_997..100_000], b"end");
}

#[test]
fn very_large_disk() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    let size = 64_u64 << 40;
    qemu::create(&image, size, "");
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(
        &scratch,
        &fuse_args(&image, "qcow2", "", &mount, ",writable=on"),
    );
    assert_eq!(fs::metadata(&mount).unwrap().len(), size);
    let disk = open_rw(&mount);
    let data = noise(8, 70_000);
    let places = [0, size / 3, size / 2 - 1000, size - 70_000];
    for at in places {
        disk.write_all_at(&data, at).unwrap();
    }
    disk.sync_all().unwrap();
    let mut back = vec![0; 70_000];
    for at in places {
        disk.read_exact_at(&mut back, at).unwrap();
        assert_same(&format!("at {at}"), &back, &data);
    }
    disk.read_exact_at(&mut back, size / 5).unwrap();
    assert!(back.iter().all(|byte| *byte == 0));
    drop(disk);
    daemon.stop();
    qemu::assert_clean(&image);
    let commands = [format!("read -P {} {} 1", data[0], size / 3)];
    qemu::io(&image, "qcow2", &commands);
}

#[test]
fn several_exports_serve_side_by_side() {
    needs!(root, "qemu-img");
    const DISKS: u64 = 6;
    let scratch = Scratch::in_memory();
    let (daemon, mut qmp) = with_monitor(&scratch, &["--object", "iothread,id=io"]);
    for number in 0..DISKS {
        let image = scratch.path(&format!("disk{number}.qcow2"));
        qemu::create(&image, 8 * MIB, "");
        scratch.empty_file(&format!("mount{number}"));
        qmp.execute(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": format!("disk{number}"),
                   "file": {"driver": "file", "filename": format!("disk{number}.qcow2")}}),
        );
        let mut export = json!({"type": "fuse", "id": format!("e{number}"), "node-name": format!("disk{number}"),
            "mountpoint": format!("mount{number}"), "writable": true});
        if number % 2 == 1 && !is_qemu() {
            export["iothread"] = json!("io");
        }
        qmp.execute("block-export-add", export);
    }
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..DISKS)
            .map(|number| {
                let mount = scratch.path(&format!("mount{number}"));
                scope.spawn(move || {
                    let disk = open_rw(&mount);
                    for round in 0..20 {
                        let data = noise(number * 100 + round, 16 << 10);
                        let at = round * 300_000;
                        disk.write_all_at(&data, at).unwrap();
                        let mut back = vec![0; data.len()];
                        disk.read_exact_at(&mut back, at).unwrap();
                        assert_same(&format!("disk {number}"), &back, &data);
                    }
                    // Taken away while the others work: what was written is in the image all the same.
                    drop(disk);
                    number
                })
            })
            .collect();
        for writer in writers {
            let number = writer.join().expect("the writer found no fault");
            qmp.execute("block-export-del", json!({"id": format!("e{number}")}));
            qmp.event("BLOCK_EXPORT_DELETED");
            qmp.execute(
                "blockdev-del",
                json!({"node-name": format!("disk{number}")}),
            );
            let image = scratch.path(&format!("disk{number}.qcow2"));
            let content = qemu::content(&scratch, &image, "qcow2");
            for round in 0..20_usize {
                let wanted = noise(number * 100 + round as u64, 16 << 10);
                let at = round * 300_000;
                assert_same("closed image", &content[at..at + wanted.len()], &wanted);
            }
            qemu::assert_clean(&image);
        }
    });
    daemon.quit(&mut qmp);
}

/// A daemon that serves for months must not lose descriptors, threads or memory with every export.
#[test]
fn exports_come_and_go_without_a_trace() {
    needs!(root, "qemu-img");
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 4 * MIB, "");
    scratch.empty_file("mount");
    let (daemon, mut qmp) = with_monitor(&scratch, &[]);
    let cycle = |qmp: &mut Qmp| {
        qmp.execute(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": "disk.qcow2"}}),
        );
        qmp.execute(
            "block-export-add",
            json!({"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": "mount", "writable": true}),
        );
        let disk = open_rw(&scratch.path("mount"));
        disk.write_all_at(&noise(1, 5000), 70_000).unwrap();
        drop(disk);
        qmp.execute("block-export-del", json!({"id": "e"}));
        qmp.event("BLOCK_EXPORT_DELETED");
        qmp.execute("blockdev-del", json!({"node-name": "disk"}));
    };
    let count = |what: &str| {
        fs::read_dir(format!("/proc/{}/{what}", daemon.pid()))
            .unwrap()
            .count()
    };
    for _ in 0..20 {
        cycle(&mut qmp);
    }
    let before = (count("fd"), daemon.memory_kib("VmRSS"));
    for _ in 0..100 {
        cycle(&mut qmp);
    }
    let after = (count("fd"), daemon.memory_kib("VmRSS"));
    assert!(
        after.0 <= before.0,
        "descriptors: {before:?} before, {after:?} after"
    );
    assert!(
        after.1 <= before.1 + 4096,
        "KiB of memory: {before:?} before, {after:?} after"
    );
    // The pool for what blocks has at most 64, which end when they have nothing to do.
    assert!(count("task") < 80, "threads: {}", count("task"));
    daemon.quit(&mut qmp);
    qemu::assert_clean(&image);
}

/// Removal waits for what is under way and then says so; nothing acknowledged is lost.
#[test]
fn export_is_removed_under_load() {
    needs!(root, "qemu-img", "fio");
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 64 * MIB, "");
    scratch.empty_file("mount");
    let (daemon, mut qmp) = with_monitor(&scratch, &[]);
    qmp.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": "disk.qcow2"}}),
    );
    for _ in 0..5 {
        qmp.execute(
            "block-export-add",
            json!({"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": "mount", "writable": true}),
        );
        let mut load = std::process::Command::new("fio")
            .args([
                "--name=load",
                "--rw=randrw",
                "--bs=16k",
                "--ioengine=libaio",
                "--iodepth=16",
                "--direct=1",
            ])
            .args(["--time_based", "--runtime=60", "--size=64m"])
            .arg(format!("--filename={}", scratch.path("mount").display()))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let stat = scratch.path("mount");
        let before = fs::metadata(&image).unwrap().modified().unwrap();
        crate::support::eventually("the load writes", 30, || {
            fs::metadata(&image).unwrap().modified().unwrap() > before && stat.exists()
        });
        qmp.execute("block-export-del", json!({"id": "e", "mode": "hard"}));
        qmp.event("BLOCK_EXPORT_DELETED");
        assert!(mounts::on(&scratch.path("mount")).is_none());
        let _ = load.kill();
        crate::support::eventually("fio ends", 30, || load.try_wait().unwrap().is_some());
    }
    qmp.execute("blockdev-del", json!({"node-name": "disk"}));
    qemu::assert_clean(&image);
    daemon.quit(&mut qmp);
}
