//! `stord convert`: the copy holds what the image holds, takes no more room than qemu-img's, and appears only when it is complete.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{parsed, refused, stord_ok, text};
use crate::locking::Holder;
use crate::needs;
use crate::support::model::noise;
use crate::support::{Scratch, qemu};

#[track_caller]
fn assert_same_content(one: &Path, format: &str, other: &Path, other_format: &str) {
    let args = [
        "compare",
        "-f",
        format,
        "-F",
        other_format,
        text(one),
        text(other),
    ];
    qemu::img(&args);
}

/// Data, zeroes that are stored, holes and noise, over another image.
fn chain(scratch: &Scratch) -> std::path::PathBuf {
    let base = scratch.path("base.qcow2");
    qemu::create(&base, 9 << 20, "");
    qemu::io(&base, "qcow2", &["write -P 3 1M 3M".to_owned()]);
    let image = scratch.path("image.qcow2");
    let backing = format!("backing_file={},backing_fmt=qcow2", text(&base));
    qemu::create(&image, (12 << 20) + 512, &backing);
    let list = [
        "write -P 7 2500k 5000",
        "write -P 0 5M 1M",
        "write -z 3M 100k",
        "write -c -P 9 8M 64k",
        "write -P 5 12M 512",
    ];
    qemu::io(&image, "qcow2", &list.map(str::to_owned));
    image
}

#[test]
fn copies_hold_what_the_image_holds() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = chain(&scratch);
    let cases: [(&str, &[&str]); 8] = [
        ("raw", &["-O", "raw"]),
        ("qcow2", &[]),
        ("qcow2", &["-o", "cluster-size=512"]),
        ("qcow2", &["-o", "cluster-size=2M,extended-l2=on"]),
        ("qcow2", &["-o", "version=v2", "-c"]),
        ("qcow2", &["-c", "-o", "compression-type=zstd"]),
        ("qcow2", &["-c", "-o", "cluster-size=4k,refcount-bits=1"]),
        ("qcow2", &["-o", "preallocation=metadata"]),
    ];
    for (format, options) in cases {
        let copy = scratch.path("copy");
        let mut args = vec!["convert", "--force", text(&image), text(&copy)];
        args.extend(options);
        stord_ok(&args);
        assert_same_content(&image, "qcow2", &copy, format);
        if format == "qcow2" {
            qemu::assert_clean(&copy);
            let info = parsed(&qemu::img(&["info", "--output=json", text(&copy)]));
            assert!(info.get("backing-filename").is_none(), "{info}");
            let check = ["check", "-f", "qcow2", "--output=json", text(&copy)];
            let check = parsed(&qemu::img(&check));
            let compressed = check["compressed-clusters"].as_u64().unwrap_or(0);
            assert_eq!(compressed > 0, options.contains(&"-c"), "{options:?}");
        }
    }
}

#[test]
fn copies_take_no_more_room_than_those_of_qemu_img() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    let mut content = vec![0; 24 << 20];
    content[3 << 20..5 << 20].fill(7);
    content[9 << 20..][..1 << 20].copy_from_slice(&noise(1, 1 << 20));
    content[(20 << 20) + 70_000] = 1;
    // As long as no disk is.
    content.truncate((24 << 20) - 300);
    let image = scratch.file("a.raw", &content);
    for (format, option) in [("raw", None), ("qcow2", None), ("qcow2", Some("-c"))] {
        let (copy, theirs) = (scratch.path("copy"), scratch.path("theirs"));
        let mut args = vec!["convert", "--force", "-O", format];
        let mut their_args = vec!["convert", "-f", "raw", "-O", format];
        args.extend(option);
        their_args.extend(option);
        args.extend([text(&image), text(&copy)]);
        their_args.extend([text(&image), text(&theirs)]);
        stord_ok(&args);
        qemu::img(&their_args);
        assert_same_content(&copy, format, &theirs, format);
        let (ours, theirs) = (fs::metadata(&copy).unwrap(), fs::metadata(&theirs).unwrap());
        assert!(
            ours.blocks() <= theirs.blocks() + 512,
            "{format} {option:?}: {} and {} blocks",
            ours.blocks(),
            theirs.blocks()
        );
    }
}

#[test]
fn what_cannot_be_copied_leaves_the_old_file_as_it_was() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = chain(&scratch);
    let old = scratch.file("old.qcow2", b"precious");
    let before = fs::read(&image).unwrap();
    let (base, none) = (scratch.path("base.qcow2"), scratch.path("none"));
    let cases: [(&[&str], &str); 7] = [
        (&[text(&image), text(&old)], "exists already"),
        (&["--force", text(&image), text(&image)], "over itself"),
        (&["--force", text(&image), text(&base)], "lock"),
        (
            &["--force", "-c", "-O", "raw", text(&image), text(&old)],
            "nothing compressed",
        ),
        (
            &["--force", "-o", "data-file=x", text(&image), text(&old)],
            "data file",
        ),
        (
            &["--force", "-o", "cluster-size=3k", text(&image), text(&old)],
            "Cluster size must be",
        ),
        (&["--force", text(&none), text(&old)], "No such file"),
    ];
    for (args, message) in cases {
        let mut all = vec!["convert"];
        all.extend(args);
        let told = refused(&all);
        assert!(told.contains(message), "{args:?}: {told}");
    }
    {
        let _holder = Holder::new(&image, false);
        assert!(refused(&["convert", "--force", text(&image), text(&old)]).contains("lock"));
    }
    assert_eq!(fs::read(&old).unwrap(), b"precious");
    assert!(fs::read(&image).unwrap() == before);
    assert_eq!(scratch.names(), ["base.qcow2", "image.qcow2", "old.qcow2"]);
}
