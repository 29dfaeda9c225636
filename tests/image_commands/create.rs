//! `stord create`: what it makes is what qemu-img makes, and what was there before is not lost by a failure.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use serde_json::json;

use super::{parsed, refused, stord, stord_ok, text};
use crate::locking::Holder;
use crate::needs;
use crate::support::daemon::program;
use crate::support::run::{run, run_in};
use crate::support::{Scratch, qemu};

/// Members of `qemu-img info` that depend on time and place.
const PLACES: [&str; 4] = ["filename", "actual-size", "children", "backing-filename"];

#[track_caller]
fn info(image: &str) -> serde_json::Value {
    let mut info = parsed(&qemu::img(&["info", "-U", "--output=json", image]));
    for member in PLACES {
        info.as_object_mut().unwrap().remove(member);
    }
    info
}

#[test]
fn every_option_makes_what_qemu_img_makes() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    let cases = [
        ("", ""),
        ("cluster-size=512", "cluster_size=512"),
        ("cluster-size=2M", "cluster_size=2M"),
        ("version=v2", "compat=0.10"),
        ("refcount-bits=1", "refcount_bits=1"),
        ("refcount-bits=64", "refcount_bits=64"),
        ("lazy-refcounts=on", "lazy_refcounts=on"),
        ("compression-type=zstd", "compression_type=zstd"),
        ("extended-l2=on", "extended_l2=on"),
        ("preallocation=metadata", "preallocation=metadata"),
        ("preallocation=falloc", "preallocation=falloc"),
        ("preallocation=full", "preallocation=full"),
        (
            "extended-l2=on,cluster-size=128k,preallocation=metadata,refcount-bits=8",
            "extended_l2=on,cluster_size=128k,preallocation=metadata,refcount_bits=8",
        ),
    ];
    for (ours, theirs) in cases {
        let (mine, oracle) = (scratch.path("mine.qcow2"), scratch.path("oracle.qcow2"));
        let mut args = vec!["create", "--force", text(&mine), "10M"];
        if !ours.is_empty() {
            args.extend(["-o", ours]);
        }
        stord_ok(&args);
        qemu::create(&oracle, 10 << 20, theirs);
        assert_eq!(info(text(&mine)), info(text(&oracle)), "{ours}");
        qemu::assert_clean(&mine);
        let same = [
            "compare",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            text(&mine),
            text(&oracle),
        ];
        qemu::img(&same);
        let (mine, oracle) = (fs::metadata(&mine).unwrap(), fs::metadata(&oracle).unwrap());
        let close = mine.blocks() <= oracle.blocks() + 2048;
        assert!(
            close,
            "{ours}: {} and {} blocks",
            mine.blocks(),
            oracle.blocks()
        );
    }
}

#[test]
fn backing_and_data_files_are_found_where_the_image_lies() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    let base = scratch.path("base.qcow2");
    stord_ok(&["create", text(&base), "7M"]);
    let over = scratch.path("over.qcow2");
    stord_ok(&["create", text(&over), "--backing", "base.qcow2"]);
    let found = parsed(&qemu::img(&["info", "--output=json", text(&over)]));
    assert_eq!(found["virtual-size"], json!(7 << 20));
    assert_eq!(found["backing-filename"], "base.qcow2");
    assert_eq!(found["backing-filename-format"], "qcow2");

    let image = scratch.path("split.qcow2");
    let option = "data-file=split.raw,data-file-raw=on,preallocation=metadata";
    let args = ["create", "split.qcow2", "5M", "-o", option];
    assert!(run_in(scratch.dir(), program(), &args).success());
    let found = parsed(&qemu::img(&["info", "--output=json", text(&image)]));
    let data = &found["format-specific"]["data"];
    assert_eq!(data["data-file"], text(&scratch.path("split.raw")));
    assert_eq!(data["data-file-raw"], true);
    assert_eq!(
        fs::metadata(scratch.path("split.raw")).unwrap().len(),
        5 << 20
    );
    qemu::assert_clean(&image);
    assert_eq!(
        scratch.names(),
        ["base.qcow2", "over.qcow2", "split.qcow2", "split.raw"]
    );
}

#[test]
fn raw_images_have_the_space_asked_for() {
    let scratch = Scratch::new();
    for (mode, blocks) in [("off", 0), ("falloc", 6144), ("full", 6144)] {
        let image = scratch.path("a.raw");
        let option = format!("preallocation={mode}");
        stord_ok(&["create", "--force", text(&image), "3M", "-o", &option]);
        let made = fs::metadata(&image).unwrap();
        assert_eq!(made.len(), 3 << 20);
        assert!(made.blocks() >= blocks, "{mode}: {}", made.blocks());
    }
}

#[test]
fn what_cannot_be_made_leaves_the_old_file_as_it_was() {
    let scratch = Scratch::new();
    let image = scratch.file("a.qcow2", b"precious");
    fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
    let path = text(&image);
    let huge = [
        "create",
        "--force",
        path,
        "4E",
        "--format",
        "raw",
        "-o",
        "preallocation=falloc",
    ];
    let itself = format!("data-file={path}");
    let cases: [(&[&str], &str); 12] = [
        (&["create", path, "1G"], "exists already"),
        (&["create", "--force", path], "no size is given"),
        (&["create", "--force", path, "much"], "'much' is no size"),
        (
            &["create", "--force", path, "1G", "-o", "cluster-size=3k"],
            "Cluster size must be",
        ),
        (
            &["create", "--force", path, "1G", "-o", "nonsense=1"],
            "nonsense",
        ),
        (
            &["create", "--force", path, "1G", "-o", "nonsense"],
            "is no option",
        ),
        (
            &["create", "--force", path, "1G", "-o", "refcount-bits=5"],
            "Refcount width",
        ),
        (
            &[
                "create",
                "--force",
                path,
                "1G",
                "-o",
                "version=v2,extended-l2=on",
            ],
            "Extended L2",
        ),
        (
            &["create", "--force", path, "1E", "-o", "cluster-size=512"],
            "too large",
        ),
        (
            &["create", "--force", path, "--backing", "absent.qcow2"],
            "absent.qcow2",
        ),
        (
            &["create", "--force", path, "1G", "-o", &itself],
            "its own data file",
        ),
        (&huge, "preallocate"),
    ];
    for (args, message) in cases {
        let told = refused(args);
        assert!(told.contains(message), "{args:?}: {told}");
        assert_eq!(fs::read(&image).unwrap(), b"precious", "{args:?}");
        assert_eq!(scratch.names(), ["a.qcow2"], "{args:?}");
    }
}

#[test]
fn killed_half_way_leaves_the_old_file_alone() {
    needs!("prlimit");
    let scratch = Scratch::new();
    let image = scratch.file("a.qcow2", b"precious");
    let program = program();
    let args = [
        "--fsize=3000000",
        program.to_str().unwrap(),
        "create",
        "--force",
        text(&image),
        "10M",
        "-o",
        "preallocation=full",
    ];
    assert!(!run("prlimit", &args).success());
    assert_eq!(fs::read(&image).unwrap(), b"precious");
    assert_eq!(scratch.names(), ["a.qcow2"]);
}

#[test]
fn replaced_files_keep_their_mode_and_links_to_them() {
    let scratch = Scratch::new();
    let image = scratch.file("a.qcow2", b"old");
    fs::set_permissions(&image, fs::Permissions::from_mode(0o640)).unwrap();
    let link = scratch.path("link.qcow2");
    std::os::unix::fs::symlink("a.qcow2", &link).unwrap();
    stord_ok(&["create", "--force", text(&link), "1M"]);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::metadata(&image).unwrap().mode() & 0o777, 0o640);
    assert!(fs::read(&image).unwrap().starts_with(b"QFI\xfb"));
}

#[test]
fn an_image_in_use_is_refused() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    qemu::create(&image, 1 << 20, "");
    let before = fs::read(&image).unwrap();
    {
        let _holder = Holder::new(&image, true);
        let told = refused(&["create", "--force", text(&image), "1G"]);
        assert!(
            told.contains("lock") && told.contains("Is another process"),
            "{told}"
        );
        assert_eq!(fs::read(&image).unwrap(), before);
    }
    stord_ok(&["create", "--force", text(&image), "1G"]);
}

#[test]
fn an_image_cannot_lie_behind_itself() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    stord_ok(&["create", text(&image), "1M"]);
    let before = fs::read(&image).unwrap();
    let told = refused(&["create", "--force", text(&image), "--backing", "a.qcow2"]);
    assert!(told.contains("behind itself"), "{told}");
    assert_eq!(fs::read(&image).unwrap(), before);
}

#[test]
fn directories_and_pipes_are_no_place_for_an_image() {
    let scratch = Scratch::new();
    let told = refused(&["create", "--force", text(scratch.dir()), "1M"]);
    assert!(told.contains("neither a file nor a block device"), "{told}");
    let told = refused(&["create", text(&scratch.path("none/a.qcow2")), "1M"]);
    assert!(told.contains("No such file or directory"), "{told}");
    assert!(scratch.names().is_empty());
    assert_eq!(stord(&["create", "--nonsense"]).code, Some(1));
}

#[test]
fn devices_take_images_where_they_are() {
    needs!(root, "losetup", "qemu-img");
    let scratch = Scratch::new();
    let storage = scratch.file("disk", &vec![0xaa; 8 << 20]);
    let device = crate::support::loop_device::LoopDevice::attach(&storage, false);
    let told = refused(&["create", &device.path, "4M"]);
    assert!(told.contains("exists already"), "{told}");
    let told = refused(&["create", "--force", &device.path, "4M", "--format", "raw"]);
    assert!(told.contains("is a raw image already"), "{told}");
    assert!(fs::read(&storage).unwrap().iter().all(|&byte| byte == 0xaa));
    stord_ok(&["create", "--force", &device.path, "4M"]);
    let found = parsed(&qemu::img(&["info", "--output=json", &device.path]));
    assert_eq!(found["format"], "qcow2");
    assert_eq!(found["virtual-size"], json!(4 << 20));
    qemu::img(&["check", "-f", "qcow2", &device.path]);
}
