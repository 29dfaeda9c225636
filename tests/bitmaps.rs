//! Dirty bitmaps: the commands in the reference's words; what is stored is what QEMU's daemon finds, and the other way round; and what a
//! killed daemon leaves.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::needs;
use crate::support::daemon::Daemon;
use crate::support::run::limited;
use crate::support::{Qmp, Scratch, qemu};

const MIB: u64 = 1 << 20;
const ADD: &str = "block-dirty-bitmap-add";
const REMOVE: &str = "block-dirty-bitmap-remove";
const CLEAR: &str = "block-dirty-bitmap-clear";
const DISABLE: &str = "block-dirty-bitmap-disable";
const MERGE: &str = "block-dirty-bitmap-merge";
const HASH: &str = "x-debug-block-dirty-bitmap-sha256";

const MONITOR: [&str; 4] = [
    "--chardev",
    "socket,id=c,path=qmp.sock,server=on,wait=off",
    "--monitor",
    "c",
];

/// A daemon with `disk.qcow2` as node `disk`, exported as the file `mount` if that exists.
fn serve(scratch: &Scratch, more: &[&str]) -> (Daemon, Qmp) {
    let mut args = MONITOR.to_vec();
    args.extend([
        "--blockdev",
        "file,node-name=file,filename=disk.qcow2",
        "--blockdev",
        "qcow2,node-name=disk,file=file",
    ]);
    args.extend(more);
    let daemon = Daemon::start(scratch, &args);
    let qmp = Qmp::connect(&scratch.path("qmp.sock"));
    (daemon, qmp)
}

const EXPORT: [&str; 2] = [
    "--export",
    "fuse,id=e,node-name=disk,mountpoint=mount,writable=on",
];

fn named(name: &str) -> Value {
    json!({"node": "disk", "name": name})
}

fn bitmaps_of(qmp: &mut Qmp, node: &str) -> Value {
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().unwrap();
    nodes
        .iter()
        .find(|found| found["node-name"] == node)
        .unwrap()["dirty-bitmaps"]
        .clone()
}

/// What QEMU's daemon says of an image's bitmaps: names, flags, counts, and hashes.
fn told_by_qemu(image: &Path, names: &[&str]) -> Vec<(String, Value, Value)> {
    let file = format!("driver=file,node-name=file,filename={}", image.display());
    let mut input = String::from("{\"execute\":\"qmp_capabilities\"}\n");
    for name in names {
        input.push_str(&json!({"execute": HASH, "arguments": named(name)}).to_string());
        input.push('\n');
    }
    input.push_str("{\"execute\":\"query-named-block-nodes\"}\n{\"execute\":\"quit\"}\n");
    let script = image.with_extension("script");
    std::fs::write(&script, input).unwrap();
    let output = limited("qemu-storage-daemon")
        .args(["--blockdev", &file])
        .args(["--blockdev", "qcow2,node-name=disk,file=file"])
        .args(["--chardev", "stdio,id=m", "--monitor", "m"])
        .stdin(std::fs::File::open(&script).unwrap())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let replies: Vec<Value> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|reply| reply.get("return").is_some() || reply.get("error").is_some())
        .collect();
    let nodes = &replies[names.len() + 1]["return"];
    let disk = nodes
        .as_array()
        .unwrap()
        .iter()
        .find(|node| node["node-name"] == "disk")
        .unwrap();
    let found = disk["dirty-bitmaps"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    names
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let info = found.iter().find(|bitmap| bitmap["name"] == *name);
            let hash = replies[index + 1]["return"]["sha256"].clone();
            ((*name).to_owned(), info.cloned().unwrap_or_default(), hash)
        })
        .collect()
}

fn told_by_us(qmp: &mut Qmp, names: &[&str]) -> Vec<(String, Value, Value)> {
    let found = bitmaps_of(qmp, "disk");
    let found = found.as_array().cloned().unwrap_or_default();
    names
        .iter()
        .map(|name| {
            let info = found.iter().find(|bitmap| bitmap["name"] == *name);
            let hash = qmp.execute(HASH, named(name))["sha256"].clone();
            ((*name).to_owned(), info.cloned().unwrap_or_default(), hash)
        })
        .collect()
}

#[test]
fn what_is_stored_is_what_qemu_finds() {
    needs!("qemu-storage-daemon");
    for options in [
        "",
        "cluster_size=512",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=2M",
    ] {
        let scratch = Scratch::in_memory();
        let image = scratch.path("disk.qcow2");
        qemu::create(&image, 32 * MIB + 512, options);
        let mount = scratch.empty_file("mount");
        let (daemon, mut qmp) = serve(&scratch, &EXPORT);
        let add = |name: &str, granularity: u32, disabled: bool| {
            json!({"node": "disk", "name": name, "granularity": granularity,
                "persistent": true, "disabled": disabled})
        };
        qmp.execute(ADD, add("fine", 512, false));
        qmp.execute(ADD, add("coarse", 1 << 20, false));
        qmp.execute(ADD, add("off", 65536, true));
        qmp.execute(ADD, json!({"node": "disk", "name": "passing"}));
        let disk = OpenOptions::new().write(true).open(&mount).unwrap();
        for at in [0, 5 * MIB + 512, 17 * MIB, 32 * MIB] {
            disk.write_all_at(&[7; 512], at).unwrap();
        }
        disk.write_all_at(&vec![3; 8 << 20], 20 * MIB).unwrap();
        qmp.execute(
            MERGE,
            json!({"node": "disk", "target": "off", "bitmaps": ["fine"]}),
        );
        qmp.execute(DISABLE, named("coarse"));
        disk.write_all_at(&[9; 512], 12 * MIB).unwrap();
        drop(disk);
        let names = ["fine", "coarse", "off"];
        let ours = told_by_us(&mut qmp, &names);
        daemon.quit(&mut qmp);
        qemu::assert_clean(&image);
        let theirs = told_by_qemu(&image, &names);
        assert_eq!(ours, theirs, "{options}");
        assert_eq!(told_by_qemu(&image, &["passing"])[0].1, Value::Null);
        assert_eq!(ours[0].1["count"], 5 * 512 + (8 << 20), "{options}");
        // And back again.
        qemu::io(
            &image,
            "qcow2",
            &["write 1M 1M".to_owned(), "write -z 3M 64k".to_owned()],
        );
        let theirs = told_by_qemu(&image, &names);
        let (daemon, mut qmp) = serve(&scratch, &[]);
        assert_eq!(told_by_us(&mut qmp, &names), theirs, "{options}");
        for name in names {
            qmp.execute(REMOVE, named(name));
        }
        assert_eq!(bitmaps_of(&mut qmp, "disk"), Value::Null);
        daemon.quit(&mut qmp);
        qemu::assert_clean(&image);
        let info = qemu::img(&["info", image.to_str().unwrap()]);
        assert!(!info.contains("bitmaps"), "{info}");
    }
}

#[test]
fn header_with_a_backing_file_has_room_for_bitmaps() {
    let scratch = Scratch::new();
    scratch.file("base.raw", &[5; 1 << 20]);
    let image = scratch.path("disk.qcow2");
    qemu::img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.raw",
        "-F",
        "raw",
        image.to_str().unwrap(),
    ]);
    let (daemon, mut qmp) = serve(&scratch, &[]);
    qmp.execute(
        ADD,
        json!({"node": "disk", "name": "b", "persistent": true}),
    );
    daemon.quit(&mut qmp);
    qemu::assert_clean(&image);
    let info: Value = serde_json::from_str(&qemu::img(&[
        "info",
        "--output=json",
        image.to_str().unwrap(),
    ]))
    .unwrap();
    assert_eq!(info["backing-filename"], "base.raw");
    assert_eq!(info["backing-filename-format"], "raw");
    assert_eq!(info["format-specific"]["data"]["bitmaps"][0]["name"], "b");
    qemu::img(&["bitmap", "--clear", image.to_str().unwrap(), "b"]);
    qemu::assert_clean(&image);
}

#[test]
fn killed_daemon_leaves_inconsistent_bitmaps_that_can_be_removed() {
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 8 * MIB, "");
    qemu::img(&["bitmap", "--add", image.to_str().unwrap(), "b"]);
    let mount = scratch.empty_file("mount");
    let (mut daemon, mut qmp) = serve(&scratch, &EXPORT);
    assert_eq!(bitmaps_of(&mut qmp, "disk")[0]["recording"], true);
    let disk = OpenOptions::new().write(true).open(&mount).unwrap();
    disk.write_all_at(&[7; 4096], MIB).unwrap();
    disk.sync_all().unwrap();
    daemon.kill_hard();
    drop(disk);
    qemu::assert_no_corruption(&image);
    let (daemon, mut qmp) = serve(&scratch, &[]);
    let found = bitmaps_of(&mut qmp, "disk");
    assert_eq!(found[0]["inconsistent"], true, "{found}");
    for command in [CLEAR, DISABLE] {
        assert_eq!(
            qmp.refuse(command, named("b")),
            "Bitmap 'b' is inconsistent and cannot be used"
        );
    }
    let size = json!({"node-name": "disk", "size": 4 * MIB});
    assert_eq!(
        qmp.refuse("block_resize", size.clone()),
        "Bitmap 'b' is inconsistent and cannot be used"
    );
    qmp.execute(REMOVE, named("b"));
    qmp.execute("block_resize", size);
    daemon.quit(&mut qmp);
    qemu::assert_no_corruption(&image);
}

#[test]
fn commands_refuse_as_the_reference() {
    let scratch = Scratch::new();
    qemu::create(&scratch.path("disk.qcow2"), MIB, "");
    qemu::create(&scratch.path("old.qcow2"), MIB, "compat=0.10");
    scratch.file("small.raw", &[0; 4096]);
    let (daemon, mut qmp) = serve(
        &scratch,
        &[
            "--blockdev",
            "qcow2,node-name=old,file.driver=file,file.filename=old.qcow2",
            "--blockdev",
            "raw,node-name=raw,file.driver=file,file.filename=small.raw",
        ],
    );
    qmp.execute(ADD, named("x"));
    qmp.execute(ADD, json!({"node": "raw", "name": "x"}));
    qmp.execute(
        ADD,
        json!({"node": "disk", "name": "kept", "persistent": true}),
    );
    for (command, arguments, words) in [
        (
            ADD,
            json!({"node": "no", "name": "x"}),
            "Cannot find device='no' nor node-name='no'",
        ),
        (ADD, named(""), "Bitmap name cannot be empty"),
        (ADD, named("x"), "Bitmap already exists: x"),
        (
            ADD,
            json!({"node": "disk", "name": "y", "granularity": 1000}),
            "Granularity must be power of 2 and at least 512",
        ),
        (
            ADD,
            json!({"node": "old", "name": "y", "persistent": true}),
            "Can't make bitmap 'y' persistent in 'old': Cannot store dirty bitmaps in qcow2 v2 files",
        ),
        (
            ADD,
            json!({"node": "raw", "name": "y", "persistent": true}),
            "Can't store persistent bitmaps to raw: Operation not supported",
        ),
        (REMOVE, named("no"), "Dirty bitmap 'no' not found"),
        (
            REMOVE,
            json!({"node": "no", "name": "x"}),
            "Node 'no' not found",
        ),
        (
            MERGE,
            json!({"node": "disk", "target": "x", "bitmaps": [{"node": "raw", "name": "x"}]}),
            "Bitmaps are of different sizes (destination size is 1048576, source size is 4096) and can't be merged",
        ),
        (
            MERGE,
            json!({"node": "disk", "target": "x", "bitmaps": ["no"]}),
            "Dirty bitmap 'no' not found",
        ),
    ] {
        assert_eq!(qmp.refuse(command, arguments), words);
    }
    let read_only =
        json!({"driver": "qcow2", "node-name": "disk", "read-only": true, "file": "file"});
    qmp.execute("blockdev-reopen", json!({"options": [read_only]}));
    for command in [CLEAR, REMOVE] {
        assert_eq!(
            qmp.refuse(command, named("kept")),
            "Bitmap 'kept' is readonly and cannot be modified"
        );
    }
    qmp.execute(CLEAR, named("x"));
    let names: Vec<Value> = bitmaps_of(&mut qmp, "disk")
        .as_array()
        .unwrap()
        .iter()
        .map(|bitmap| bitmap["name"].clone())
        .collect();
    assert_eq!(names, ["x", "kept"], "those in memory stay, too");
    daemon.quit(&mut qmp);
    qemu::assert_clean(&scratch.path("disk.qcow2"));
}

#[test]
fn corruption_is_reported_once_and_ends_the_use_of_the_image() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, MIB, "");
    qemu::io(&image, "qcow2", &["write 0 128k".to_owned()]);
    // The second cluster's entry leads to no start of a cluster.
    let mut bytes = std::fs::read(&image).unwrap();
    let l1 = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = usize::try_from(word(&bytes, l1) & 0x00ff_ffff_ffff_fe00).unwrap();
    let entry = word(&bytes, l2 + 8) + 0x200;
    bytes[l2 + 8..l2 + 16].copy_from_slice(&entry.to_be_bytes());
    std::fs::write(&image, &bytes).unwrap();
    let mount = scratch.empty_file("mount");
    let (daemon, mut qmp) = serve(&scratch, &EXPORT);
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&mount)
        .unwrap();
    let mut buffer = [0; 512];
    assert!(disk.read_exact_at(&mut buffer, 65536).is_err());
    let event = qmp.event("BLOCK_IMAGE_CORRUPTED");
    let host = entry & 0x00ff_ffff_ffff_fe00;
    assert_eq!(
        event,
        json!({"device": "", "node-name": "disk", "fatal": true,
            "msg": format!("Cluster allocation offset {host:#x} unaligned (L2 offset: {l2:#x}, L2 index: 0x1)")})
    );
    assert!(
        disk.read_exact_at(&mut buffer, 0).is_err(),
        "of no more use"
    );
    assert!(disk.write_at(&buffer, 512 << 10).is_err());
    drop(disk);
    daemon.quit(&mut qmp);
    let info = qemu::img(&["info", image.to_str().unwrap()]);
    assert!(info.contains("corrupt: true"), "{info}");
}
