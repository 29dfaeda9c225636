//! The exported file behaves like a file: size, mode and owner, growing, holes, allocation, mappings.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::statvfs::statvfs;
use nix::unistd::{Whence, lseek};
use serde_json::json;

use crate::needs;
use crate::support::daemon::{Daemon, fuse_args, is_qemu};
use crate::support::disk::assert_holes_are_zero;
use crate::support::model::{assert_same, noise};
use crate::support::{Qmp, Scratch, direct, eventually, mounts, qemu, run, run_ok};

const MIB: u64 = 1 << 20;

/// A raw image of 4 MiB of noise, exported with these options.
fn export_raw(scratch: &Scratch, options: &str) -> (Daemon, PathBuf) {
    let image = scratch.file("disk.raw", &noise(1, 4 << 20));
    let mountpoint = scratch.empty_file("mount");
    let daemon = Daemon::start(scratch, &fuse_args(&image, "raw", "", &mountpoint, options));
    (daemon, mountpoint)
}

/// An empty qcow2 image of 64 MiB, exported with these options.
fn export_qcow2(scratch: &Scratch, options: &str) -> (Daemon, PathBuf) {
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 64 * MIB, "");
    let mountpoint = scratch.empty_file("mount");
    let daemon = Daemon::start(
        scratch,
        &fuse_args(&image, "qcow2", "", &mountpoint, options),
    );
    (daemon, mountpoint)
}

fn open_rw(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[track_caller]
fn assert_errno<T: std::fmt::Debug>(result: std::io::Result<T>, wanted: Errno) {
    match result {
        Ok(value) => panic!("succeeded with {value:?} instead of {wanted}"),
        Err(error) => assert_eq!(error.raw_os_error().map(Errno::from_raw), Some(wanted)),
    }
}

#[test]
fn read_only_export_refuses_writers() {
    needs!(root);
    let scratch = Scratch::new();
    let (daemon, mount) = export_raw(&scratch, "");
    let metadata = fs::metadata(&mount).unwrap();
    assert!(metadata.is_file());
    assert_eq!((metadata.len(), mode(&mount)), (4 * MIB, 0o400));
    assert_eq!((metadata.uid(), metadata.gid()), (0, 0));
    // Root may open what the mode forbids; the write itself is refused.
    if let Ok(file) = OpenOptions::new().write(true).open(&mount) {
        assert!(file.write_at(b"x", 0).is_err());
    }
    assert!(fs::write(&mount, b"x").is_err());
    assert!(nix::unistd::truncate(&mount, 0).is_err());
    assert_errno(
        fs::set_permissions(&mount, Permissions::from_mode(0o600)),
        Errno::EROFS,
    );
    fs::set_permissions(&mount, Permissions::from_mode(0o444)).unwrap();
    assert_eq!(mode(&mount), 0o444);
    assert_same("content", &fs::read(&mount).unwrap(), &noise(1, 4 << 20));
    daemon.stop();
    assert_same(
        "image",
        &fs::read(scratch.path("disk.raw")).unwrap(),
        &noise(1, 4 << 20),
    );
}

#[test]
fn write_reaches_the_image() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let (daemon, mount) = export_qcow2(&scratch, ",writable=on");
    assert_eq!(mode(&mount), 0o600);
    let file = open_rw(&mount);
    let data = noise(2, 300_000);
    file.write_all_at(&data, 12_345).unwrap();
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    let mut back = vec![0; data.len()];
    file.read_exact_at(&mut back, 12_345).unwrap();
    assert_same("read back", &back, &data);
    drop(file);
    daemon.stop();
    let mut wanted = vec![0; 64 << 20];
    wanted[12_345..12_345 + data.len()].copy_from_slice(&data);
    assert_same(
        "image",
        &qemu::content(&scratch, &scratch.path("disk.qcow2"), "qcow2"),
        &wanted,
    );
    qemu::assert_clean(&scratch.path("disk.qcow2"));
}

#[test]
fn file_ends_at_the_size_unless_growable() {
    needs!(root);
    let scratch = Scratch::new();
    let (daemon, mount) = export_raw(&scratch, ",writable=on");
    let file = open_rw(&mount);
    let mut piece = [0; 100];
    assert_eq!(file.read_at(&mut piece, 4 * MIB - 40).unwrap(), 40);
    assert_eq!(file.read_at(&mut piece, 4 * MIB).unwrap(), 0);
    assert_eq!(file.read_at(&mut piece, 400 * MIB).unwrap(), 0);
    assert_eq!(file.write_at(&piece, 4 * MIB - 40).unwrap(), 40);
    assert!(file.write_at(&piece, 4 * MIB).is_err());
    assert!(file.write_at(&piece, 400 * MIB).is_err());
    assert_eq!(file.metadata().unwrap().len(), 4 * MIB);
    drop(file);
    daemon.stop();
    assert_eq!(
        fs::metadata(scratch.path("disk.raw")).unwrap().len(),
        4 * MIB
    );
}

#[test]
fn growable_file_grows_by_writes_and_truncation() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let (daemon, mount) = export_qcow2(&scratch, ",writable=on,growable=on");
    let file = open_rw(&mount);
    let data = noise(3, 1024);
    file.write_all_at(&data, 64 * MIB - 512).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 64 * MIB + 512);
    file.write_all_at(&data, 70 * MIB).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 70 * MIB + 1024);
    let mut gap = vec![1; 1 << 20];
    file.read_exact_at(&mut gap, 66 * MIB).unwrap();
    assert!(gap.iter().all(|byte| *byte == 0), "the gap reads as zeroes");
    file.set_len(80 * MIB).unwrap();
    assert_eq!(fs::metadata(&mount).unwrap().len(), 80 * MIB);
    file.set_len(64 * MIB).unwrap();
    assert_eq!(fs::metadata(&mount).unwrap().len(), 64 * MIB);
    file.set_len(72 * MIB).unwrap();
    let mut cut = vec![1; 1024];
    file.read_exact_at(&mut cut, 70 * MIB).unwrap();
    assert!(
        cut.iter().all(|byte| *byte == 0),
        "what was cut off does not come back"
    );
    drop(file);
    daemon.stop();
    let image = scratch.path("disk.qcow2");
    let mut wanted = vec![0; 72 << 20];
    let end = (64 << 20) - 512;
    wanted[end..end + 512].copy_from_slice(&data[..512]);
    assert_same("image", &qemu::content(&scratch, &image, "qcow2"), &wanted);
    qemu::assert_clean(&image);
}

#[test]
fn others_are_let_in_by_mode_and_owner() {
    needs!(root, "setpriv");
    let scratch = Scratch::new();
    let (daemon, mount) = export_raw(&scratch, ",writable=on,allow-other=on");
    assert!(mounts::on(&mount).unwrap().options.contains("allow_other"));
    let read_as_nobody = || {
        let path = mount.to_str().unwrap();
        run(
            "setpriv",
            &[
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "head",
                "-c1",
                path,
            ],
        )
        .success()
    };
    assert!(!read_as_nobody(), "mode 0600");
    fs::set_permissions(&mount, Permissions::from_mode(0o644)).unwrap();
    assert_eq!(mode(&mount), 0o644);
    assert!(read_as_nobody(), "mode 0644");
    fs::set_permissions(&mount, Permissions::from_mode(0o600)).unwrap();
    chown(&mount, Some(65534), Some(7)).unwrap();
    let metadata = fs::metadata(&mount).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (65534, 7));
    assert!(read_as_nobody(), "the owner");
    daemon.stop();
}

#[test]
fn nobody_else_is_let_in_without_allow_other() {
    needs!(root, "setpriv");
    let scratch = Scratch::new();
    let (daemon, mount) = export_raw(&scratch, ",writable=on,allow-other=off");
    assert!(!mounts::on(&mount).unwrap().options.contains("allow_other"));
    let path = mount.to_str().unwrap();
    let other = run(
        "setpriv",
        &[
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "stat",
            path,
        ],
    );
    assert!(!other.success(), "{other:?}");
    assert_errno(
        fs::set_permissions(&mount, Permissions::from_mode(0o644)),
        Errno::EPERM,
    );
    assert_errno(chown(&mount, Some(65534), None), Errno::EOPNOTSUPP);
    fs::set_permissions(&mount, Permissions::from_mode(0o400)).unwrap();
    assert_eq!(mode(&mount), 0o400);
    daemon.stop();
}

#[test]
fn allow_other_is_tried_by_default() {
    needs!(root);
    for option in ["", ",allow-other=auto"] {
        let scratch = Scratch::new();
        let (daemon, mount) = export_raw(&scratch, option);
        let options = mounts::on(&mount).unwrap().options;
        assert!(options.contains("allow_other"), "{options}");
        assert!(options.contains("default_permissions"), "{options}");
        assert!(
            options.contains("nosuid") && options.contains("nodev"),
            "{options}"
        );
        daemon.stop();
    }
}

#[test]
fn holes_can_be_found() {
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 64 * MIB, "");
    qemu::io(
        &image,
        "qcow2",
        &["write -P 1 1M 1M", "write -z 8M 1M", "write -P 2 9M 64k"].map(str::to_owned),
    );
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(&scratch, &fuse_args(&image, "qcow2", "", &mount, ""));
    let file = File::open(&mount).unwrap();
    let seek = |at: u64, whence| {
        lseek(&file, i64::try_from(at).unwrap(), whence).map(|at| at.unsigned_abs())
    };
    assert_eq!(seek(0, Whence::SeekData), Ok(MIB));
    assert_eq!(seek(0, Whence::SeekHole), Ok(0));
    assert_eq!(seek(MIB + 5, Whence::SeekData), Ok(MIB + 5));
    assert_eq!(seek(MIB + 5, Whence::SeekHole), Ok(2 * MIB));
    assert_eq!(seek(2 * MIB, Whence::SeekData), Ok(9 * MIB));
    assert_eq!(seek(9 * MIB, Whence::SeekHole), Ok(9 * MIB + 65536));
    if !is_qemu() {
        assert_eq!(
            seek(10 * MIB, Whence::SeekData),
            Err(Errno::ENXIO),
            "a hole up to the end"
        );
        assert_eq!(
            seek(64 * MIB, Whence::SeekHole),
            Err(Errno::ENXIO),
            "past the end"
        );
    }
    assert_eq!(seek(80 * MIB, Whence::SeekData), Err(Errno::ENXIO));
    assert_eq!(seek(63 * MIB, Whence::SeekHole), Ok(63 * MIB));
    drop(file);
    daemon.stop();
}

#[test]
fn fallocate_punches_zeroes_and_grows() {
    needs!(root, "qemu-img");
    for growable in [true, false] {
        let scratch = Scratch::new();
        let options = if growable {
            ",writable=on,growable=on"
        } else {
            ",writable=on"
        };
        let image = scratch.path("disk.qcow2");
        qemu::create(&image, 64 * MIB, "");
        let mount = scratch.empty_file("mount");
        let daemon = Daemon::start(
            &scratch,
            &fuse_args(&image, "qcow2", ",discard=unmap", &mount, options),
        );
        let file = open_rw(&mount);
        let mut model = noise(4, 64 << 20);
        file.write_all_at(&model, 0).unwrap();
        file.sync_all().unwrap();
        let full = fs::metadata(&mount).unwrap().blocks() * 512;
        assert!(full >= 64 * MIB, "all of it is allocated: {full}");

        let call = |mode, at: i64, len: i64| fallocate(&file, mode, at, len);
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE;
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        call(punch, 1 << 20, 4 << 20).unwrap();
        model[1 << 20..5 << 20].fill(0);
        if !is_qemu() {
            // QEMU's daemon refuses ranges that do not match its clusters.
            call(punch, (8 << 20) + 1000, 100_001).unwrap();
            model[(8 << 20) + 1000..(8 << 20) + 101_001].fill(0);
            call(zero | keep, (16 << 20) + 77, 1 << 20).unwrap();
            model[(16 << 20) + 77..(17 << 20) + 77].fill(0);
            call(zero, 20 << 20, 12345).unwrap();
            model[20 << 20..(20 << 20) + 12345].fill(0);
        }
        assert_eq!(call(punch, 0, 0), Err(Errno::EINVAL));
        assert_eq!(
            call(FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, 0, 65536),
            Err(Errno::EOPNOTSUPP)
        );
        assert_eq!(
            call(FallocateFlags::FALLOC_FL_INSERT_RANGE, 0, 65536),
            Err(Errno::EOPNOTSUPP)
        );
        assert_eq!(file.metadata().unwrap().len(), 64 * MIB);
        if growable {
            call(zero, 64 << 20, 1 << 20).unwrap();
            call(FallocateFlags::empty(), 65 << 20, 1 << 20).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 66 * MIB);
            model.resize(66 << 20, 0);
        }
        let mut got = vec![0; model.len()];
        file.read_exact_at(&mut got, 0).unwrap();
        assert_same("through the mount", &got, &model);
        file.sync_all().unwrap();
        drop(file);
        daemon.stop();
        assert_same("image", &qemu::content(&scratch, &image, "qcow2"), &model);
        qemu::assert_clean(&image);
        let map = qemu::img(&[
            "map",
            "-f",
            "qcow2",
            "--output=json",
            image.to_str().unwrap(),
        ]);
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let hole = |at: u64| {
            map.as_array().unwrap().iter().any(|extent| {
                let start = extent["start"].as_u64().unwrap();
                let zero = extent["zero"] == true && extent["data"] == false;
                zero && (start..start + extent["length"].as_u64().unwrap()).contains(&at)
            })
        };
        assert!(
            hole(2 * MIB) && hole(4 * MIB),
            "punching gives space back: {map}"
        );
    }
}

#[test]
fn file_system_figures_are_sane() {
    needs!(root);
    let scratch = Scratch::new();
    let (daemon, mount) = export_raw(&scratch, "");
    let figures = statvfs(&mount).unwrap();
    assert!(figures.block_size() >= 512 && figures.fragment_size() >= 512);
    if !is_qemu() {
        assert!(figures.name_max() >= 1);
        let metadata = fs::metadata(&mount).unwrap();
        assert!(
            metadata.blksize() >= 512,
            "programs size their buffers by it: {}",
            metadata.blksize()
        );
    }
    daemon.stop();
}

#[test]
fn mountpoint_can_be_neither_removed_nor_entered() {
    needs!(root);
    let scratch = Scratch::new();
    let (daemon, mount) = export_raw(&scratch, ",writable=on");
    assert_errno(fs::remove_file(&mount), Errno::EBUSY);
    assert_errno(fs::rename(&mount, scratch.path("elsewhere")), Errno::EBUSY);
    assert_errno(File::open(mount.join("below")), Errno::ENOTDIR);
    assert!(fs::read_dir(&mount).is_err_and(|error| error.kind() == ErrorKind::NotADirectory));
    daemon.stop();
    assert_eq!(
        fs::metadata(&mount).unwrap().len(),
        0,
        "the mountpoint itself is untouched"
    );
}

#[test]
fn direct_and_buffered_views_agree() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let (daemon, mount) = export_qcow2(&scratch, ",writable=on");
    let buffered = open_rw(&mount);
    let past_cache = direct::open(&mount, true);
    for round in 0..50_u64 {
        let at = round * 37 % 16 * 65536;
        let data = noise(round, 8192);
        let mut back = direct::Aligned::zeroed(8192);
        if round % 2 == 0 {
            buffered.write_all_at(&data, at).unwrap();
            past_cache.read_exact_at(back.as_mut(), at).unwrap();
        } else {
            past_cache
                .write_all_at(direct::Aligned::copy_of(&data).as_ref(), at)
                .unwrap();
            buffered.read_exact_at(back.as_mut(), at).unwrap();
        }
        assert_same(&format!("round {round}"), back.as_ref(), &data);
    }
    drop((buffered, past_cache));
    daemon.stop();
    qemu::assert_clean(&scratch.path("disk.qcow2"));
}

#[test]
fn file_can_be_mapped() {
    needs!(root, "qemu-img", "fio");
    if is_qemu() {
        return; // Its parallel writes corrupt data.
    }
    let scratch = Scratch::new();
    let (daemon, mount) = export_qcow2(&scratch, ",writable=on");
    run_ok(
        "fio",
        &[
            "--name=map",
            "--ioengine=mmap",
            "--rw=randwrite",
            "--bs=4k",
            "--size=8m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--verify_state_save=0",
            "--fallocate=none",
            &format!("--filename={}", mount.display()),
        ],
    );
    let through_mount = fs::read(&mount).unwrap();
    assert!(through_mount[..8 << 20].iter().any(|byte| *byte != 0));
    daemon.stop();
    let image = scratch.path("disk.qcow2");
    assert_same(
        "image",
        &qemu::content(&scratch, &image, "qcow2"),
        &through_mount,
    );
    qemu::assert_clean(&image);
}

#[test]
fn append_mode_grows_at_the_end() {
    needs!(root);
    let scratch = Scratch::new();
    let (daemon, mount) = export_raw(&scratch, ",writable=on,growable=on");
    let log = OpenOptions::new().append(true).open(&mount).unwrap();
    std::io::Write::write_all(&mut &log, &noise(9, 512)).unwrap();
    std::io::Write::write_all(&mut &log, &noise(10, 1024)).unwrap();
    drop(log);
    let got = fs::read(&mount).unwrap();
    assert_same(
        "appended",
        &got[4 << 20..],
        &[noise(9, 512), noise(10, 1024)].concat(),
    );
    daemon.stop();
    assert_eq!(
        fs::metadata(scratch.path("disk.raw")).unwrap().len(),
        4 * MIB + 1536
    );
}

/// `dd of=mount` and `cat >mount` open with O_TRUNC: the disk they write to stays as large as it is.
#[test]
fn truncating_open_keeps_the_size() {
    needs!(root);
    for growable in ["on", "off"] {
        let scratch = Scratch::new();
        let (daemon, mount) = export_raw(&scratch, &format!(",writable=on,growable={growable}"));
        let data = noise(11, 100 * 512);
        fs::write(&mount, &data).unwrap();
        let mut wanted = noise(1, 4 << 20);
        wanted[..data.len()].copy_from_slice(&data);
        assert_same("rewritten", &fs::read(&mount).unwrap(), &wanted);
        daemon.stop();
        assert_same(
            "image",
            &fs::read(scratch.path("disk.raw")).unwrap(),
            &wanted,
        );
    }
}

#[test]
fn block_resize_shows_at_the_mount() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 16 * MIB, "");
    let mount = scratch.empty_file("mount");
    let mut args = fuse_args(&image, "qcow2", "", &mount, ",writable=on,growable=off");
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
    let file = open_rw(&mount);
    qmp.execute(
        "block_resize",
        json!({"node-name": "disk", "size": 24 * MIB}),
    );
    // The kernel may remember the old size for a moment.
    eventually("the new size", 5, || {
        fs::metadata(&mount).unwrap().len() == 24 * MIB
    });
    file.write_all_at(&noise(1, 512), 24 * MIB - 512).unwrap();
    drop(file);
    daemon.quit(&mut qmp);
    qemu::assert_clean(&image);
}

#[test]
fn exports_in_iothreads() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 16 * MIB, "");
    let mount = scratch.empty_file("mount");
    let mut args = vec!["--object".to_owned(), "iothread,id=io0".to_owned()];
    args.extend(fuse_args(
        &image,
        "qcow2",
        "",
        &mount,
        ",writable=on,iothread=io0",
    ));
    let daemon = Daemon::start(&scratch, &args);
    let data = noise(5, 16 << 20);
    fs::write(&mount, &data).unwrap_or_else(|error| panic!("{error}: {}", daemon.log()));
    assert_same("read back", &fs::read(&mount).unwrap(), &data);
    daemon.stop();
    assert_same("image", &qemu::content(&scratch, &image, "qcow2"), &data);
    qemu::assert_clean(&image);
}

#[test]
fn copies_of_the_mount_keep_its_holes() {
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 256 * MIB, "");
    qemu::io(&image, "qcow2", &["write -P 1 100M 1M".to_owned()]);
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(&scratch, &fuse_args(&image, "qcow2", "", &mount, ""));
    let copy = scratch.path("copy.raw");
    run_ok(
        "cp",
        &[
            "--sparse=auto",
            mount.to_str().unwrap(),
            copy.to_str().unwrap(),
        ],
    );
    let (mount_path, copy_path) = (mount.to_str().unwrap(), copy.to_str().unwrap());
    qemu::img(&["compare", "-f", "raw", "-F", "raw", mount_path, copy_path]);
    assert!(
        fs::metadata(&copy).unwrap().blocks() * 512 < 8 * MIB,
        "the copy is sparse"
    );
    let content = fs::read(&mount).unwrap();
    let data = assert_holes_are_zero("mount", &File::open(&mount).unwrap(), &content);
    assert_eq!(data, MIB);
    daemon.stop();
}

#[test]
fn opening_twice_sees_one_file() {
    needs!(root);
    let scratch = Scratch::new();
    let (daemon, mount) = export_raw(&scratch, ",writable=on");
    let first = open_rw(&mount);
    let second = File::open(&mount).unwrap();
    assert_eq!(
        first.metadata().unwrap().ino(),
        second.metadata().unwrap().ino()
    );
    first.write_all_at(b"seen by both", 1000).unwrap();
    let mut piece = [0; 12];
    second.read_exact_at(&mut piece, 1000).unwrap();
    assert_eq!(&piece, b"seen by both");
    drop(first);
    second.read_exact_at(&mut piece, 1000).unwrap();
    drop(second);
    daemon.stop();
}

#[test]
fn open_files_do_not_keep_the_daemon_from_ending() {
    needs!(root);
    let scratch = Scratch::new();
    let (daemon, mount) = export_raw(&scratch, ",writable=on");
    let file = open_rw(&mount);
    file.write_all_at(b"last words", 0).unwrap();
    daemon.stop();
    assert!(mounts::on(&mount).is_none());
    let mut piece = [0; 10];
    assert_errno(file.read_at(&mut piece, 0), Errno::from_raw(libc::ENOTCONN));
    assert_eq!(
        &fs::read(scratch.path("disk.raw")).unwrap()[..10],
        b"last words"
    );
}
