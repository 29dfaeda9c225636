//! Bad images are refused in QEMU's words or read with errors; none of them ends or blocks the daemon.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rand::RngExt;
use serde_json::json;

use crate::needs;
use crate::support::daemon::{Daemon, is_qemu, run_to_end};
use crate::support::model::{noise, rng};
use crate::support::refusal::assert_all_refused;
use crate::support::{Qmp, Scratch, qemu};

/// Overwrites bytes of a file.
fn patch(image: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new()
        .write(true)
        .open(image)
        .unwrap()
        .write_all_at(bytes, at)
        .unwrap();
}

fn open_qcow2(name: &str) -> String {
    format!("qcow2,node-name=q,file.driver=file,file.filename={name}")
}

#[test]
fn headers_that_cannot_be() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    let image = scratch.path("bad.qcow2");
    let option = open_qcow2("bad.qcow2");
    let cases: &[(u64, &[u8], &str)] = &[
        (0, b"QFI\xfa", "Image is not in qcow2 format"),
        (4, &[0, 0, 0, 4], "Unsupported qcow2 version 4"),
        (
            8,
            &[0, 0, 0, 0, 0, 0, 255, 0, 0, 0, 63, 0],
            "Backing file name too long",
        ),
        (20, &[0, 0, 0, 8], "Unsupported cluster size: 2^8"),
        (20, &[0, 0, 0, 63], "Unsupported cluster size: 2^63"),
        (24, &[63, 0, 0, 0, 0, 0, 0, 0], "Image is too big"),
        (36, &[63, 0, 0, 0], "Active L1 table too large"),
        (
            40,
            &[0, 0, 0, 0, 0, 3, 0, 1],
            "Active L1 table offset invalid",
        ),
        (
            48,
            &[0, 0, 0, 0, 0, 1, 0, 1],
            "Reference count table offset invalid",
        ),
        (56, &[63, 0, 0, 0], "Reference count table too large"),
        (60, &[63, 0, 0, 0], "Snapshot table too large"),
        (
            72,
            &[0, 0, 0, 0, 1, 0, 0, 0],
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 1000000",
        ),
        (
            72,
            &[0, 0, 0, 0, 0, 0, 0, 2],
            "qcow2: Image is corrupt; cannot be opened read/write",
        ),
        (
            96,
            &[0, 0, 0, 9],
            "Reference count entry width too large; may not exceed 64 bits",
        ),
        (100, &[0, 0, 0, 1], "qcow2 header too short"),
    ];
    for (at, bytes, message) in cases {
        qemu::create(&image, 64 << 20, "");
        patch(&image, *at, bytes);
        assert_all_refused(&scratch, &[], &[("--blockdev", &option, message)]);
    }
    for (length, message) in [
        (100, "qcow2 header too short"),
        (0, "Image is not in qcow2 format"),
    ] {
        qemu::create(&image, 64 << 20, "");
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(length)
            .unwrap();
        assert_all_refused(&scratch, &[], &[("--blockdev", &option, message)]);
    }
}

#[test]
fn backing_files_that_cannot_be_opened() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    let make = |name: &str, backing: &str, format: &str| {
        let path = scratch.path(name);
        let options = format!("backing_file={backing},backing_fmt={format}");
        qemu::img(&[
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-o",
            &options,
            path.to_str().unwrap(),
            "1M",
        ]);
    };
    make("missing-backing.qcow2", "missing.qcow2", "qcow2");
    make("unknown-protocol.qcow2", "bogus:x", "raw");
    make("one.qcow2", "two.qcow2", "qcow2");
    make("two.qcow2", "one.qcow2", "qcow2");
    make("self.qcow2", "self.qcow2", "qcow2");
    // QEMU's daemon names the file as the image does; ours may resolve it first.
    assert_all_refused(
        &scratch,
        &[],
        &[
            (
                "--blockdev",
                &open_qcow2("missing-backing.qcow2"),
                "Could not open backing file: Could not open 'missing.qcow2': No such file or directory",
            ),
            (
                "--blockdev",
                &open_qcow2("unknown-protocol.qcow2"),
                "Could not open backing file: Unknown protocol 'bogus'",
            ),
        ],
    );
    if is_qemu() {
        return; // It follows a loop of read-only images for ever.
    }
    for name in ["one.qcow2", "self.qcow2"] {
        for read_only in ["", ",read-only=on,file.read-only=on"] {
            let before = scratch.names();
            let ended = run_to_end(&scratch, &["--blockdev", &(open_qcow2(name) + read_only)]);
            assert_eq!(ended.code, Some(1), "{ended:?}");
            assert!(
                ended.stderr.contains("Could not open backing file: "),
                "{ended:?}"
            );
            assert_eq!(scratch.names(), before);
        }
    }
}

/// A daemon with a QMP socket and nothing else.
fn with_monitor(scratch: &Scratch) -> (Daemon, Qmp) {
    let daemon = Daemon::start(
        scratch,
        &[
            "--chardev",
            "socket,id=c,path=qmp.sock,server=on,wait=off",
            "--monitor",
            "chardev=c",
        ],
    );
    let qmp = Qmp::connect(&scratch.path("qmp.sock"));
    (daemon, qmp)
}

/// Opens the image if the daemon takes it, reads all of it and writes here and there if it can: errors are welcome, but the
/// daemon must answer afterwards.
fn exercise(scratch: &Scratch, qmp: &mut Qmp, name: &str, writable: bool) -> bool {
    let added = qmp.try_execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "q", "read-only": !writable,
               "file": {"driver": "file", "filename": name, "read-only": !writable}}),
    );
    if added.is_err() {
        return false;
    }
    let mountpoint = scratch.empty_file("mnt");
    qmp.execute(
        "block-export-add",
        json!({"type": "fuse", "id": "e", "node-name": "q", "mountpoint": "mnt", "writable": writable}),
    );
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .open(&mountpoint)
        .unwrap();
    let size = file.metadata().unwrap().len();
    let mut piece = vec![0; 256 << 10];
    for at in (0..size.min(64 << 20)).step_by(piece.len()) {
        let _ = file.read_at(&mut piece, at);
    }
    if writable {
        for n in 0..40 {
            let _ = file.write_at(&noise(n, 3000), n * 99_991 % size.max(1));
        }
        let _ = file.sync_all();
    }
    drop(file);
    qmp.execute("block-export-del", json!({"id": "e"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.execute("blockdev-del", json!({"node-name": "q"}));
    true
}

#[test]
fn truncated_images_give_errors_and_nothing_worse() {
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::in_memory();
    let whole = scratch.path("whole.qcow2");
    qemu::create(&whole, 8 << 20, "cluster_size=4096");
    qemu::io(&whole, "qcow2", &["write -P 1 0 8M".to_owned()]);
    let length = whole.metadata().unwrap().len();
    let (mut daemon, mut qmp) = with_monitor(&scratch);
    for part in 0..12 {
        let name = format!("part-{part}.qcow2");
        fs::copy(&whole, scratch.path(&name)).unwrap();
        File::options()
            .write(true)
            .open(scratch.path(&name))
            .unwrap()
            .set_len(length * part / 12)
            .unwrap();
        exercise(&scratch, &mut qmp, &name, part % 2 == 1);
        assert!(daemon.is_alive(), "cut to {part}/12: {}", daemon.log());
    }
    qmp.execute("quit", json!({}));
    daemon.assert_ends_well();
}

#[test]
fn fuzzed_images_give_errors_and_nothing_worse() {
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::in_memory();
    let sound = scratch.path("sound.qcow2");
    qemu::create(&sound, 8 << 20, "cluster_size=4096");
    qemu::io(
        &sound,
        "qcow2",
        &["write -P 1 0 4M".to_owned(), "write -z 5M 1M".to_owned()],
    );
    qemu::img(&["snapshot", "-c", "s", sound.to_str().unwrap()]);
    qemu::io(&sound, "qcow2", &["write -P 2 1M 1M".to_owned()]);
    let bytes = fs::read(&sound).unwrap();
    let (mut daemon, mut qmp) = with_monitor(&scratch);
    let mut opened = 0;
    for seed in 0..80 {
        let mut rng = rng(seed);
        let mut fuzzed = bytes.clone();
        // The tables lie at the front, between data clusters; the header is what decides whether they are looked at.
        for _ in 0..rng.random_range(1..12) {
            let region = if rng.random_bool(0.3) { 112 } else { 128 << 10 };
            let at = rng.random_range(4..region);
            fuzzed[at] = if rng.random() {
                rng.random()
            } else {
                1 << rng.random_range(0..8)
            };
        }
        let name = format!("fuzzed-{seed}.qcow2");
        fs::write(scratch.path(&name), fuzzed).unwrap();
        opened += u32::from(exercise(&scratch, &mut qmp, &name, seed % 2 == 1));
        assert!(daemon.is_alive(), "seed {seed}: {}", daemon.log());
        fs::remove_file(scratch.path(&name)).unwrap();
    }
    assert!(
        (10..80).contains(&opened),
        "{opened} of 80 could be opened: the test no longer shows both ways"
    );
    qmp.execute("quit", json!({}));
    daemon.assert_ends_well();
}
