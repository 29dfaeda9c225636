//! Snapshots inside images: by QMP, with the words of the reference, while a disk is in use; and by `stord snapshot`.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::support::daemon::{Daemon, is_qemu, run_to_end};
use crate::support::model::{assert_same, noise};
use crate::support::run::Ended;
use crate::support::{Qmp, Scratch, qemu};

const MIB: u64 = 1 << 20;
const CREATE: &str = "blockdev-snapshot-internal-sync";
const DELETE: &str = "blockdev-snapshot-delete-internal-sync";

const MONITOR: [&str; 4] = [
    "--chardev",
    "socket,id=c,path=qmp.sock,server=on,wait=off",
    "--monitor",
    "c",
];

/// The content of a snapshot as QEMU reads it.
fn content_of(scratch: &Scratch, image: &Path, snapshot: &str) -> Vec<u8> {
    let raw = scratch.path("snapshot.raw");
    qemu::img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        "-l",
        &format!("snapshot.name={snapshot}"),
        image.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    std::fs::read(raw).unwrap()
}

#[test]
fn qmp_speaks_as_the_reference() {
    let scratch = Scratch::new();
    qemu::create(&scratch.path("a.qcow2"), MIB, "");
    qemu::create(&scratch.path("narrow.qcow2"), MIB, "refcount_bits=1");
    qemu::io(
        &scratch.path("narrow.qcow2"),
        "qcow2",
        &["write 0 64k".to_owned()],
    );
    let data = format!("data_file={}", scratch.path("data").display());
    qemu::create(&scratch.path("data.qcow2"), MIB, &data);
    scratch.file("plain.raw", &[0; 4096]);
    let daemon = Daemon::start(
        &scratch,
        &[
            &MONITOR[..],
            &["--blockdev", "file,node-name=file,filename=a.qcow2"],
            &["--blockdev", "qcow2,node-name=a,file=file"],
            &[
                "--blockdev",
                "qcow2,node-name=n,file.driver=file,file.filename=narrow.qcow2",
            ],
            &[
                "--blockdev",
                "qcow2,node-name=d,file.driver=file,file.filename=data.qcow2",
            ],
            &["--blockdev", "file,node-name=leaf,filename=plain.raw"],
            &[
                "--blockdev",
                "raw,node-name=raw,file.driver=file,file.filename=plain.raw,file.locking=off",
            ],
        ]
        .concat(),
    );
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    let create = |device: &str, name: &str| json!({"device": device, "name": name});
    qmp.execute(CREATE, create("a", "s"));
    qmp.execute(CREATE, create("a", "5"));
    for (command, arguments, words) in [
        (
            CREATE,
            create("no", "s"),
            "Cannot find device='no' nor node-name='no'",
        ),
        (CREATE, create("file", "s"), "Need a root block node"),
        (CREATE, create("a", ""), "Name is empty"),
        (
            CREATE,
            create("a", "s"),
            "Snapshot with name 's' already exists on device 'a'",
        ),
        (
            CREATE,
            create("n", "s"),
            "Failed to create snapshot 's' on device 'n': Invalid argument",
        ),
        (
            CREATE,
            create("d", "s"),
            "Failed to get a snapshot list: Operation not supported",
        ),
        (
            CREATE,
            create("leaf", "s"),
            "Block format 'file' used by device 'leaf' does not support internal snapshots",
        ),
        (
            CREATE,
            create("raw", "s"),
            "Block format 'raw' used by device 'raw' does not support internal snapshots",
        ),
        (
            DELETE,
            json!({"device": "a"}),
            "Name or id must be provided",
        ),
        (
            DELETE,
            create("a", "z"),
            "Snapshot with id 'null' and name 'z' does not exist on device 'a'",
        ),
        (
            DELETE,
            json!({"device": "a", "id": "2", "name": "s"}),
            "Snapshot with id '2' and name 's' does not exist on device 'a'",
        ),
        (
            DELETE,
            create("leaf", "s"),
            "Failed to get a snapshot list: Operation not supported",
        ),
        (DELETE, create("file", "s"), "Need a root block node"),
    ] {
        assert_eq!(qmp.refuse(command, arguments), words);
    }
    let deleted = qmp.execute(DELETE, json!({"device": "a", "id": "2"}));
    assert_eq!(deleted["name"], "5");
    assert_eq!(deleted["vm-state-size"], 0);
    assert_eq!(deleted["date-sec"], deleted["vm-clock-sec"]);
    qmp.execute(CREATE, create("a", "next"));
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
    let node = nodes
        .as_array()
        .unwrap()
        .iter()
        .find(|node| node["node-name"] == "a")
        .unwrap();
    let listed: Vec<(&Value, &Value)> = node["image"]["snapshots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|snapshot| (&snapshot["id"], &snapshot["name"]))
        .collect();
    assert_eq!(
        listed,
        [(&json!("1"), &json!("s")), (&json!("2"), &json!("next"))]
    );
    let read_only = json!({"driver": "qcow2", "node-name": "a", "read-only": true, "file": "file"});
    qmp.execute("blockdev-reopen", json!({"options": [read_only]}));
    assert_eq!(
        qmp.refuse(CREATE, create("a", "t")),
        "Device 'a' is read only"
    );
    assert_eq!(
        qmp.refuse(DELETE, create("a", "s")),
        "Failed to remove snapshot from snapshot list: Operation not permitted"
    );
    daemon.quit(&mut qmp);
    qemu::assert_clean(&scratch.path("a.qcow2"));
    qemu::assert_clean(&scratch.path("narrow.qcow2"));
}

#[test]
fn snapshot_of_a_disk_in_use_is_of_one_moment() {
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 8 * MIB, "cluster_size=4k");
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(
        &scratch,
        &[
            &MONITOR[..],
            &[
                "--blockdev",
                "qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2",
            ],
            &[
                "--export",
                "fuse,id=e,node-name=disk,mountpoint=mount,writable=on",
            ],
        ]
        .concat(),
    );
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&mount)
        .unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    // Counts up in turn at four places: in any one moment they differ by one at most, and fall from the first to the last.
    let places = [0u64, 3 * MIB, 5 * MIB + 4096, 7 * MIB];
    let writer = {
        let stop = Arc::clone(&stop);
        let disk = disk.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut round = 0u64;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                for place in places {
                    disk.write_all_at(&round.to_be_bytes().repeat(64), place)
                        .unwrap();
                }
            }
            round
        })
    };
    for name in ["one", "two", "three", "four"] {
        qmp.execute(CREATE, json!({"device": "disk", "name": name}));
    }
    qmp.execute(DELETE, json!({"device": "disk", "name": "two"}));
    stop.store(true, Ordering::Relaxed);
    let rounds = writer.join().unwrap();
    daemon.quit(&mut qmp);
    qemu::assert_clean(&image);
    let counters = |content: &[u8]| {
        places.map(|place| {
            let at = usize::try_from(place).unwrap();
            u64::from_be_bytes(content[at..at + 8].try_into().unwrap())
        })
    };
    for name in ["one", "three", "four"] {
        let found = counters(&content_of(&scratch, &image, name));
        assert!(
            found.is_sorted_by(|a, b| a >= b) && found[0] - found[3] <= 1,
            "{name}: {found:?}"
        );
    }
    assert_eq!(
        counters(&qemu::content(&scratch, &image, "qcow2")),
        [rounds; 4]
    );
}

fn stord(scratch: &Scratch, args: &[&str]) -> Ended {
    run_to_end(scratch, &[&["snapshot"], args].concat())
}

#[test]
fn command_line_makes_lists_applies_and_deletes() {
    if is_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 4 * MIB, "");
    let fill = |byte: u8, size: &str| {
        qemu::io(&image, "qcow2", &[format!("write -P {byte} 0 {size}")]);
    };
    fill(1, "4M");
    let done = |args: &[&str]| {
        let ended = stord(&scratch, args);
        assert!(ended.success(), "{ended:?}");
        ended.stdout
    };
    done(&["create", "disk.qcow2", "first"]);
    qemu::img(&["resize", "-q", image.to_str().unwrap(), "6M"]);
    fill(2, "6M");
    done(&["create", "disk.qcow2", "second"]);
    let list: Value = serde_json::from_str(&done(&["list", "--json", "disk.qcow2"])).unwrap();
    let info: Value = serde_json::from_str(&qemu::img(&[
        "info",
        "--output=json",
        image.to_str().unwrap(),
    ]))
    .unwrap();
    assert_eq!(list, info["snapshots"]);
    let shown = done(&["list", "disk.qcow2"]);
    assert!(
        shown.contains("first") && shown.contains("second"),
        "{shown}"
    );

    done(&["apply", "disk.qcow2", "first"]);
    qemu::assert_clean(&image);
    assert_same(
        "applied",
        &qemu::content(&scratch, &image, "qcow2"),
        &vec![1; 4 << 20],
    );
    done(&["apply", "disk.qcow2", "2"]);
    assert_same(
        "applied",
        &qemu::content(&scratch, &image, "qcow2"),
        &vec![2; 6 << 20],
    );
    done(&["delete", "disk.qcow2", "first"]);
    done(&["delete", "disk.qcow2", "second"]);
    qemu::assert_clean(&image);
    assert_eq!(done(&["list", "--json", "disk.qcow2"]).trim(), "[]");

    for (args, words) in [
        (
            ["apply", "disk.qcow2", "first"],
            "there is no snapshot 'first'",
        ),
        (["create", "disk.qcow2", ""], "Name is empty"),
        (["create", "plain.raw", "x"], "raw image"),
    ] {
        scratch.file("plain.raw", &noise(1, 4096));
        let ended = stord(&scratch, &args);
        assert_eq!(ended.code, Some(1), "{args:?}: {ended:?}");
        assert!(ended.stderr.contains(words), "{args:?}: {ended:?}");
    }
}
