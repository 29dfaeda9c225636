//! `stord check`: finds, counts and repairs what `qemu-img check` does, with the same exit status.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{parsed, refused, stord, stord_ok, text};
use crate::locking::Holder;
use crate::needs;
use crate::support::run::run;
use crate::support::{Scratch, qemu};

const CLUSTER: u64 = 65536;

/// An image with a megabyte of data, of which these clusters of the file have other refcounts than they should.
fn damaged(scratch: &Scratch, refcounts: &[(u64, u16)]) -> PathBuf {
    let image = scratch.path("a.qcow2");
    qemu::create(&image, 4 << 20, "");
    qemu::io(&image, "qcow2", &["write -P 7 0 1M".to_owned()]);
    let file = OpenOptions::new().read(true).write(true).open(&image);
    let file = file.unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = number(number(48));
    let mut clusters = file.metadata().unwrap().len().div_ceil(CLUSTER);
    for &(cluster, refcount) in refcounts {
        file.write_all_at(&refcount.to_be_bytes(), block + 2 * cluster)
            .unwrap();
        clusters = clusters.max(cluster + 1);
    }
    file.set_len(clusters * CLUSTER).unwrap();
    image
}

/// What both say, which must be the same, and the exit status.
#[track_caller]
fn agreed(image: &Path) -> (Value, i32) {
    let ours = stord(&["check", "--json", text(image)]);
    let args = ["check", "--output=json", "-f", "qcow2", text(image)];
    let theirs = run("qemu-img", &args);
    assert_eq!(ours.code, theirs.code, "{ours:?} {theirs:?}");
    let found = parsed(&ours.stdout);
    assert_eq!(found, parsed(&theirs.stdout));
    (found, ours.code.unwrap())
}

#[test]
fn counts_and_exit_status_are_those_of_qemu_img() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let (found, status) = agreed(&damaged(&scratch, &[]));
    assert_eq!((&found["leaks"], status), (&Value::Null, 0));
    let (found, status) = agreed(&damaged(&scratch, &[(30, 1), (31, 2), (33, 1)]));
    assert_eq!((&found["leaks"], status), (&3.into(), 3));
    let (found, status) = agreed(&damaged(&scratch, &[(8, 0), (9, 0), (30, 1)]));
    assert_eq!((&found["leaks"], status), (&1.into(), 2));
    // For each the refcount itself, and the flag that says it is one.
    assert_eq!(found["corruptions"], 4);
    for options in ["compat=0.10", "extended_l2=on", "cluster_size=512"] {
        let image = scratch.path("b.qcow2");
        qemu::create(&image, 1 << 20, options);
        let list = ["write -c 0 64k", "write 128k 200k", "write -z 512k 64k"];
        qemu::io(&image, "qcow2", &list.map(str::to_owned));
        assert_eq!(agreed(&image).1, 0, "{options}");
    }
}

#[test]
fn repairs_are_as_thorough() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = damaged(&scratch, &[(30, 1), (31, 1)]);
    let told = parsed(&stord_ok(&[
        "check",
        "--repair=leaks",
        "--json",
        text(&image),
    ]));
    assert_eq!(told["leaks-fixed"], 2);
    qemu::assert_clean(&image);

    let image = damaged(&scratch, &[(8, 0), (30, 1)]);
    // Its refcounts have to be made anew, and that is more than to repair leaks.
    let repaired = stord(&["check", "--repair", "leaks", text(&image)]);
    assert_eq!(repaired.code, Some(1), "{repaired:?}");
    let told = parsed(&stord_ok(&[
        "check",
        "--repair=all",
        "--json",
        text(&image),
    ]));
    assert_eq!(told["corruptions-fixed"], 1);
    qemu::assert_clean(&image);
    let mut model = vec![7; 1 << 20];
    model.resize(4 << 20, 0);
    assert!(qemu::content(&scratch, &image, "qcow2") == model);
}

#[test]
fn what_cannot_be_checked_is_refused() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let raw = scratch.file("a.raw", &[9; 65536]);
    let ended = stord(&["check", text(&raw)]);
    assert_eq!(ended.code, Some(63));
    assert!(ended.stderr.contains("nothing to check"), "{ended:?}");
    assert!(refused(&["check", text(&scratch.path("none"))]).contains("No such file"));
    let image = damaged(&scratch, &[]);
    let _holder = Holder::new(&image, true);
    assert!(refused(&["check", "--repair", "all", text(&image)]).contains("lock"));
}
