//! `stord info`: says of every kind of image what `qemu-img info` says.

use std::path::Path;

use serde_json::Value;

use super::{parsed, refused, stord_ok, text};
use crate::locking::Holder;
use crate::needs;
use crate::support::{Scratch, qemu};

#[track_caller]
fn assert_same_info(image: &Path, chain: bool) {
    let (mut ours, mut theirs) = (
        vec!["info", "--json", text(image)],
        vec!["info", "--output=json", text(image)],
    );
    if chain {
        ours.push("--backing-chain");
        theirs.push("--backing-chain");
    }
    let (mut ours, mut theirs) = (parsed(&stord_ok(&ours)), parsed(&qemu::img(&theirs)));
    take_space(&mut ours);
    take_space(&mut theirs);
    assert_eq!(ours, theirs, "{}", image.display());
}

/// Takes out the space that files take up: the file system may not have decided about it before it writes them.
fn take_space(value: &mut Value) {
    match value {
        Value::Object(members) => {
            let space = members.remove("actual-size");
            assert!(space.is_none_or(|space| space.is_u64()));
            members.values_mut().for_each(take_space);
        }
        Value::Array(list) => list.iter_mut().for_each(take_space),
        _ => {}
    }
}

#[test]
fn every_kind_of_image_is_described_as_by_qemu_img() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    for options in [
        "",
        "compat=0.10",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=2M,refcount_bits=64,lazy_refcounts=on",
        "compression_type=zstd,extended_l2=on",
        "preallocation=full",
    ] {
        qemu::create(&image, 3 << 20, options);
        qemu::io(&image, "qcow2", &["write 0 2M".to_owned()]);
        assert_same_info(&image, false);
    }
    qemu::create(&image, 3 << 20, "");
    qemu::img(&["snapshot", "-c", "one", text(&image)]);
    qemu::img(&["snapshot", "-c", "two", text(&image)]);
    let bitmap = ["bitmap", "--add", "-g", "32k", text(&image), "bits"];
    qemu::img(&bitmap);
    assert_same_info(&image, false);
    let data = scratch.path("a.data");
    let options = format!("data_file={},data_file_raw=on", text(&data));
    qemu::create(&image, 3 << 20, &options);
    assert_same_info(&image, false);
    assert_same_info(&scratch.file("a.raw", &[9; 70_000]), false);
}

#[test]
fn chains_are_described_from_top_to_bottom() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    scratch.file("base.raw", &[9; 1 << 20]);
    let (middle, top) = (scratch.path("middle.qcow2"), scratch.path("top.qcow2"));
    let options = "backing_file=base.raw,backing_fmt=raw";
    qemu::create(&middle, 2 << 20, options);
    let options = "backing_file=middle.qcow2,backing_fmt=qcow2";
    qemu::create(&top, 3 << 20, options);
    assert_same_info(&top, true);
    assert_same_info(&top, false);
    // What lies behind need not be there.
    std::fs::remove_file(&middle).unwrap();
    assert_same_info(&top, false);
    assert!(refused(&["info", "--backing-chain", text(&top)]).contains("middle.qcow2"));
}

#[test]
fn people_see_what_matters() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    qemu::create(&image, 3 << 20, "");
    qemu::img(&["snapshot", "-c", "one", text(&image)]);
    let told = stord_ok(&["info", text(&image)]);
    for part in ["qcow2", "3 MiB (3145728 bytes)", "64 KiB", "1 'one'"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let _holder = Holder::new(&image, false);
    assert!(refused(&["info", text(&image)]).contains("lock"));
    stord_ok(&["info", "-U", text(&image)]);
}
