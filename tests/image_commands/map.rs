//! `stord map`: the same parts at the same places as `qemu-img map`, through every kind of chain.

use std::path::Path;

use serde_json::Value;

use super::{parsed, refused, stord_ok, text};
use crate::locking::Holder;
use crate::needs;
use crate::support::{Scratch, qemu};

/// What stord says, without the file names, which qemu-img does not tell in JSON.
#[track_caller]
fn ours(image: &Path, format: &str) -> Vec<Value> {
    let mut map = parsed(&stord_ok(&[
        "map",
        "--json",
        "--format",
        format,
        text(image),
    ]));
    let mut parts = std::mem::take(map.as_array_mut().unwrap());
    for part in &mut parts {
        let has_place = part.get("offset").is_some();
        let name = part.as_object_mut().unwrap().remove("filename");
        assert_eq!(name.is_some(), has_place);
    }
    parts
}

#[track_caller]
fn assert_same_map(image: &Path, format: &str) {
    let args = ["map", "--output=json", "-f", format, text(image)];
    let theirs = parsed(&qemu::img(&args));
    let ours = ours(image, format);
    assert_eq!(&ours, theirs.as_array().unwrap(), "{}", image.display());
}

fn commands(list: &[&str]) -> Vec<String> {
    list.iter().map(|&command| command.to_owned()).collect()
}

#[test]
fn chains_are_mapped_as_qemu_img_maps_them() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    for options in [
        "",
        "extended_l2=on",
        "cluster_size=4k",
        "compression_type=zstd",
    ] {
        let base = scratch.path("base.qcow2");
        qemu::create(&base, 4 << 20, options);
        let list = [
            "write 0 128k",
            "write -z 256k 64k",
            "write 1M 64k",
            "write -z 1M 64k",
            "write 2M 1M",
            "discard 2112k 64k",
            "write -z -u 2560k 128k",
        ];
        qemu::io(&base, "qcow2", &commands(&list));
        let middle = scratch.path("middle.qcow2");
        qemu::create(
            &middle,
            5 << 20,
            &format!(
                "backing_file={},backing_fmt=qcow2{}{options}",
                text(&base),
                if options.is_empty() { "" } else { "," }
            ),
        );
        let list = [
            "write 64k 64k",
            "write 3M 64k",
            "write 3136k 64k",
            "write 4544k 64k",
        ];
        qemu::io(&middle, "qcow2", &commands(&list));
        let top = scratch.path("top.qcow2");
        qemu::create(
            &top,
            6 << 20,
            &format!("backing_file={},backing_fmt=qcow2", text(&middle)),
        );
        let list = [
            "write -c 512k 64k",
            "write -c 576k 64k",
            "write 5M 64k",
            "write -z 3M 32k",
        ];
        qemu::io(&top, "qcow2", &commands(&list));
        for image in [&base, &middle, &top] {
            assert_same_map(image, "qcow2");
        }
    }
}

#[test]
fn preallocated_and_raw_images_are_mapped_as_qemu_img_maps_them() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    for preallocation in ["metadata", "falloc", "full"] {
        let image = scratch.path("a.qcow2");
        qemu::create(&image, 8 << 20, &format!("preallocation={preallocation}"));
        qemu::io(
            &image,
            "qcow2",
            &commands(&["write 1M 1M", "write -z 4M 1M"]),
        );
        assert_same_map(&image, "qcow2");
    }
    let raw = scratch.path("a.raw");
    std::fs::File::create(&raw)
        .unwrap()
        .set_len(4 << 20)
        .unwrap();
    qemu::io(&raw, "raw", &commands(&["write 1M 1M", "write 3M 4k"]));
    assert_same_map(&raw, "raw");
    let empty = scratch.empty_file("empty.raw");
    assert!(ours(&empty, "raw").is_empty());
}

#[test]
fn data_files_are_named() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let (image, data) = (scratch.path("a.qcow2"), scratch.path("a.data"));
    qemu::create(&image, 4 << 20, &format!("data_file={}", text(&data)));
    qemu::io(
        &image,
        "qcow2",
        &commands(&["write 1M 128k", "write -z 2M 64k"]),
    );
    assert_same_map(&image, "qcow2");
    let map = parsed(&stord_ok(&["map", "--json", text(&image)]));
    assert_eq!(map[1]["filename"], text(&data));
    assert_eq!(map[1]["offset"], 1 << 20);
}

#[test]
fn people_see_what_is_stored() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    qemu::create(&image, 4 << 20, "");
    qemu::io(
        &image,
        "qcow2",
        &commands(&["write 1M 128k", "write -c 2M 64k"]),
    );
    let told = stord_ok(&["map", text(&image)]);
    let lines: Vec<Vec<&str>> = told
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0], ["Offset", "Length", "Mapped", "to", "File"]);
    assert_eq!(lines[1], ["0x100000", "0x20000", "0x50000", text(&image)]);
    assert_eq!(lines[2], ["0x200000", "0x10000", "compressed"]);
    assert_eq!(lines.len(), 3);

    let map = parsed(&stord_ok(&[
        "map",
        "--json",
        "-s",
        "1M",
        "-l",
        "192k",
        text(&image),
    ]));
    let lengths: Vec<u64> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|part| part["length"].as_u64().unwrap())
        .collect();
    assert_eq!(lengths, [128 << 10, 64 << 10]);
    assert!(refused(&["map", "--start", "5M", text(&image)]).contains("has 4194304 bytes only"));
}

#[test]
fn an_image_that_is_written_to_is_refused_unless_asked_for() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    qemu::create(&image, 4 << 20, "");
    let _holder = Holder::new(&image, false);
    assert!(refused(&["map", text(&image)]).contains("lock"));
    stord_ok(&["map", "-U", text(&image)]);
    assert!(refused(&["map", text(&scratch.path("none"))]).contains("No such file"));
}
