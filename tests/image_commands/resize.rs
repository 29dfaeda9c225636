//! `stord resize`: what is new reads as zeroes whatever lies behind or was there before, and qemu-img finds nothing wrong with it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{parsed, refused, stord_ok, text};
use crate::locking::Holder;
use crate::needs;
use crate::support::{Scratch, qemu};

#[track_caller]
fn resize(image: &Path, args: &[&str]) {
    let mut all = vec!["resize", text(image)];
    all.extend(args);
    stord_ok(&all);
}

/// Asserts that the image is sound and holds `start`, and zeroes behind that up to `size`.
#[track_caller]
fn assert_holds(scratch: &Scratch, image: &Path, start: &[u8], size: usize) {
    qemu::assert_clean(image);
    let content = qemu::content(scratch, image, "qcow2");
    assert_eq!(content.len(), size);
    let (head, rest) = content.split_at(start.len().min(size));
    assert!(head == &start[..head.len()], "the old content has changed");
    assert!(
        rest.iter().all(|&byte| byte == 0),
        "what is new is not zero"
    );
}

#[test]
fn growing_reserves_the_space_asked_for() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    for options in [
        "",
        "compat=0.10",
        "extended_l2=on",
        "cluster_size=512",
        "refcount_bits=1",
    ] {
        for mode in ["off", "metadata", "falloc", "full"] {
            let image = scratch.path("a.qcow2");
            qemu::create(&image, 1_000_448, options);
            qemu::io(&image, "qcow2", &["write -P 7 0 1000448".to_owned()]);
            let before = fs::metadata(&image).unwrap().blocks() * 512;
            resize(&image, &["+5M", "--preallocation", mode]);
            assert_holds(&scratch, &image, &[7; 1_000_448], 1_000_448 + (5 << 20));
            let after = fs::metadata(&image).unwrap().blocks() * 512;
            let grown = after - before.min(after);
            let reserves = ["falloc", "full"].contains(&mode);
            assert_eq!(grown > 4 << 20, reserves, "{options} {mode}: {grown}");
            let report = parsed(&qemu::img(&[
                "check",
                "--output=json",
                "-f",
                "qcow2",
                text(&image),
            ]));
            let (all, stored) = (&report["total-clusters"], &report["allocated-clusters"]);
            assert_eq!(all == stored, mode != "off", "{options} {mode}: {report}");
            // It goes on as any image does.
            qemu::io(&image, "qcow2", &["write -P 9 3M 1M".to_owned()]);
            qemu::assert_clean(&image);
        }
    }
}

#[test]
fn what_lies_behind_does_not_show_in_the_new_part() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    for options in ["", "compat=0.10", "extended_l2=on"] {
        for mode in ["off", "metadata", "full"] {
            let base = scratch.path("base.qcow2");
            qemu::create(&base, 8 << 20, "");
            qemu::io(&base, "qcow2", &["write -P 3 0 8M".to_owned()]);
            let image = scratch.path("a.qcow2");
            let backing = format!("backing_file={},backing_fmt=qcow2", text(&base));
            let comma = if options.is_empty() { "" } else { "," };
            qemu::create(&image, 1 << 20, &format!("{backing}{comma}{options}"));
            resize(&image, &["4M", "--preallocation", mode]);
            assert_holds(&scratch, &image, &[3; 1 << 20], 4 << 20);
            resize(&image, &["12M"]);
            assert_holds(&scratch, &image, &[3; 1 << 20], 12 << 20);
        }
    }
}

#[test]
fn tables_grow_with_the_image() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    // Tables of the smallest clusters: more L1 entries than a cluster holds, and more refcount blocks than the table has room for.
    qemu::create(&image, 1 << 20, "cluster_size=512,refcount_bits=64");
    qemu::io(&image, "qcow2", &["write -P 5 0 1M".to_owned()]);
    resize(&image, &["3M", "--preallocation=metadata"]);
    resize(&image, &["16G"]);
    qemu::io(&image, "qcow2", &["write -P 6 15G 64k".to_owned()]);
    qemu::assert_clean(&image);
    resize(&image, &["1M", "--shrink"]);
    assert_holds(&scratch, &image, &[5; 1 << 20], 1 << 20);
}

#[test]
fn shrinking_needs_consent_and_gives_space_back() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    qemu::create(&image, 8 << 20, "");
    qemu::io(&image, "qcow2", &["write -P 5 0 8M".to_owned()]);
    let before = fs::metadata(&image).unwrap().blocks();
    let told = refused(&["resize", text(&image), "-6M"]);
    assert!(told.contains("--shrink"), "{told}");
    resize(&image, &["--shrink", "-6M"]);
    assert_holds(&scratch, &image, &[5; 2 << 20], 2 << 20);
    let after = fs::metadata(&image).unwrap().blocks();
    assert!(after < before / 2, "{before} {after}");
    resize(&image, &["8M"]);
    assert_holds(&scratch, &image, &[5; 2 << 20], 8 << 20);
}

#[test]
fn snapshots_keep_what_they_hold() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    qemu::create(&image, 4 << 20, "");
    qemu::io(&image, "qcow2", &["write -P 5 0 4M".to_owned()]);
    qemu::img(&["snapshot", "-c", "s", text(&image)]);
    resize(&image, &["--shrink", "1M"]);
    assert_holds(&scratch, &image, &[5; 1 << 20], 1 << 20);
    resize(&image, &["6M", "--preallocation=full"]);
    assert_holds(&scratch, &image, &[5; 1 << 20], 6 << 20);
    qemu::img(&["snapshot", "-a", "s", text(&image)]);
    assert_holds(&scratch, &image, &[5; 4 << 20], 4 << 20);

    let old = scratch.path("v2.qcow2");
    qemu::create(&old, 1 << 20, "compat=0.10");
    qemu::img(&["snapshot", "-c", "s", text(&old)]);
    let told = refused(&["resize", text(&old), "2M"]);
    assert!(
        told.contains("Can't resize a v2 image which has snapshots"),
        "{told}"
    );
}

#[test]
fn data_files_follow() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    for raw in ["on", "off"] {
        for mode in ["off", "metadata", "falloc", "full"] {
            let (image, data) = (scratch.path("a.qcow2"), scratch.path("a.data"));
            let options = format!("data_file={},data_file_raw={raw}", text(&data));
            qemu::create(&image, 1 << 20, &options);
            qemu::io(&image, "qcow2", &["write -P 5 0 1M".to_owned()]);
            resize(&image, &["3M", "--preallocation", mode]);
            assert_holds(&scratch, &image, &[5; 1 << 20], 3 << 20);
            let found = fs::metadata(&data).unwrap();
            assert_eq!(found.len(), 3 << 20);
            let reserves = ["falloc", "full"].contains(&mode);
            assert_eq!(found.blocks() * 512 >= 3 << 20, reserves, "{mode}");
            resize(&image, &["--shrink", "512k"]);
            assert_holds(&scratch, &image, &[5; 512 << 10], 512 << 10);
        }
    }
}

#[test]
fn raw_images_are_resized_too() {
    let scratch = Scratch::new();
    let image = scratch.file("a.raw", &[9; 1 << 20]);
    for (mode, blocks) in [("off", 0), ("falloc", 2048), ("full", 2048)] {
        let before = fs::metadata(&image).unwrap();
        resize(&image, &["+1M", "--preallocation", mode]);
        let after = fs::metadata(&image).unwrap();
        assert_eq!(after.len(), before.len() + (1 << 20));
        assert!(after.blocks() >= before.blocks() + blocks, "{mode}");
    }
    resize(&image, &["--shrink", "1M"]);
    assert!(fs::read(&image).unwrap() == [9; 1 << 20]);
}

#[test]
fn what_cannot_be_leaves_the_image_as_it_was() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    qemu::create(&image, 1 << 20, "");
    let raw = scratch.file("a.raw", &[9; 1 << 20]);
    let none = scratch.path("none");
    let cases: [(&[&str], &str); 8] = [
        (
            &["resize", text(&image), "4E"],
            "Failed to grow the L1 table",
        ),
        (&["resize", text(&image), "much"], "is no size"),
        (&["resize", text(&image), "-2M", "--shrink"], "cannot be"),
        (
            &[
                "resize",
                text(&image),
                "512k",
                "--shrink",
                "--preallocation=full",
            ],
            "only be used for growing",
        ),
        (
            &["resize", text(&raw), "2M", "--preallocation=metadata"],
            "Unsupported preallocation mode: metadata",
        ),
        (
            &["resize", text(&raw), "7E", "--preallocation=falloc"],
            "Could not resize",
        ),
        (&["resize", text(&raw), "7E"], "Could not resize"),
        (&["resize", text(&none), "1M"], "No such file"),
    ];
    for (args, message) in cases {
        let told = refused(args);
        assert!(told.contains(message), "{args:?}: {told}");
    }
    assert_holds(&scratch, &image, &[], 1 << 20);
    assert!(fs::read(&raw).unwrap() == [9; 1 << 20]);
    let _holder = Holder::new(&image, true);
    assert!(refused(&["resize", text(&image), "2M"]).contains("lock"));
}
