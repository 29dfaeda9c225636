//! The `virtio-blk-vhost-user` driver against QEMU's back end and false ones: content, errors, limits, and back ends that go away.

mod back_end;
mod hostile;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::needs;
use crate::support::daemon::{Daemon, program, run_to_end};
use crate::support::disk::{MIB, Writer, assert_mount_is};
use crate::support::model::{assert_same, noise};
use crate::support::run::{limited, run, run_ok};
use crate::support::{Qmp, Scratch, eventually, qemu};

const BYTES: usize = 32 * MIB;

/// QEMU's daemon with an image as a vhost-user disk at `in.sock`.
fn qemu_back_end(scratch: &Scratch, image: &Path, format: &str, export: &str) -> Daemon {
    let program = Command::new("qemu-storage-daemon");
    back_end_of(scratch, program, image, format, export)
}

fn back_end_of(
    scratch: &Scratch,
    program: Command,
    image: &Path,
    format: &str,
    export: &str,
) -> Daemon {
    let args = [
        "--blockdev".to_owned(),
        format!(
            "driver={format},node-name=disk,discard=unmap,file.driver=file,file.discard=unmap,file.filename={}",
            image.display()
        ),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={}{export}",
            scratch.path("in.sock").display()
        ),
        "--chardev".to_owned(),
        "socket,id=qmp,path=qemu.sock,server=on,wait=off".to_owned(),
        "--monitor".to_owned(),
        "chardev=qmp".to_owned(),
    ];
    // A killed one leaves its socket.
    let _ = fs::remove_file(scratch.path("in.sock"));
    Daemon::start_as(scratch, program, &args)
}

/// The options of a node named `disk` on the back end at `in.sock`.
fn node(scratch: &Scratch, options: &str) -> String {
    format!(
        "driver=virtio-blk-vhost-user,node-name=disk,discard=unmap,cache.direct=on,path={}{options}",
        scratch.path("in.sock").display()
    )
}

/// A daemon that passes on what the back end has, over NBD as an export named `out`.
struct Passing {
    daemon: Daemon,
    uri: String,
}

impl Passing {
    fn start(scratch: &Scratch, before: &[&str], options: &str) -> Passing {
        let socket = scratch.path("out.sock");
        let mut args: Vec<String> = before.iter().map(|&arg| arg.to_owned()).collect();
        let iothread = if before.is_empty() {
            ""
        } else {
            ",iothread.0=a,iothread.1=b,iothread.2=c"
        };
        args.extend([
            "--blockdev".to_owned(),
            node(scratch, options),
            "--nbd-server".to_owned(),
            format!("addr.type=unix,addr.path={}", socket.display()),
            "--export".to_owned(),
            format!("type=nbd,id=e,node-name=disk,name=out,writable=on{iothread}"),
            "--chardev".to_owned(),
            "socket,id=qmp,path=qmp.sock,server=on,wait=off".to_owned(),
            "--monitor".to_owned(),
            "chardev=qmp".to_owned(),
        ]);
        let daemon = Daemon::start(scratch, &args);
        let uri = format!("nbd+unix:///out?socket={}", socket.display());
        Passing { daemon, uri }
    }

    /// What qemu-io says to the commands.
    fn io(&self, commands: &[&str]) -> String {
        let mut args = vec!["-f", "raw"];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(&self.uri);
        let ended = run("qemu-io", &args);
        ended.stdout + &ended.stderr
    }

    fn reads_well(&self) -> bool {
        self.io(&["read 0 4k"]).contains("read 4096/4096 bytes")
    }
}

/// A disk in which no two blocks are alike; made of a little noise, since much takes long.
fn marked(seed: u64) -> Vec<u8> {
    let mut content = noise(seed, MIB).repeat(BYTES / MIB);
    for (number, block) in content.chunks_mut(4096).enumerate() {
        block[..8].copy_from_slice(&number.to_le_bytes());
    }
    content
}

fn copy(from: &str, to: &str) {
    run_ok("nbdcopy", &["--connections=4", "--requests=32", from, to]);
}

#[test]
fn what_is_written_arrives_over_one_queue_and_several() {
    needs!("qemu-img", "qemu-io", "qemu-storage-daemon", "nbdcopy");
    let threads = [
        "--object",
        "iothread,id=a",
        "--object",
        "iothread,id=b",
        "--object",
        "iothread,id=c",
    ];
    let qemu = PathBuf::from("qemu-storage-daemon");
    // One queue for one context; one for three, so that requests are carried over; two for three; four. Then our own back end.
    for (program, queues, block, before) in [
        (&qemu, 1, 512, &threads[..0]),
        (&qemu, 1, 512, &threads[..]),
        (&qemu, 2, 4096, &threads[..]),
        (&qemu, 4, 512, &threads[..]),
        (&program(), 1, 512, &threads[..0]),
        (&program(), 2, 512, &threads[..]),
        (&program(), 4, 4096, &threads[..]),
    ] {
        let scratch = Scratch::in_memory();
        let image = scratch.path("disk.qcow2");
        qemu::create(&image, BYTES as u64, "");
        let export = format!(",writable=on,num-queues={queues},logical-block-size={block}");
        let program = Command::new(program);
        let back_end = back_end_of(&scratch, program, &image, "qcow2", &export);
        let passing = Passing::start(&scratch, before, "");
        let mut content = marked(queues);
        let source = scratch.file("source", &content);
        copy(source.to_str().unwrap(), &passing.uri);
        let said = passing.io(&[
            "write -P 5 1000 10000",
            "write -z -u 1M 2M",
            "write -z 5M 64k",
            "discard 8M 4M",
            "write -f -P 6 33554431 1",
            "flush",
            "read -P 5 1000 10000",
        ]);
        assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
        content[1000..11_000].fill(5);
        content[MIB..3 * MIB].fill(0);
        content[5 * MIB..5 * MIB + (64 << 10)].fill(0);
        content[8 * MIB..12 * MIB].fill(0);
        content[BYTES - 1] = 6;
        let target = scratch.path("target");
        copy(&passing.uri, target.to_str().unwrap());
        assert_same("the copy", &fs::read(&target).unwrap(), &content);
        passing.daemon.stop();
        back_end.stop();
        qemu::assert_clean(&image);
        assert_same(
            "the image",
            &qemu::content(&scratch, &image, "qcow2"),
            &content,
        );
    }
}

#[test]
fn what_cannot_be_opened_is_refused_in_the_references_words() {
    needs!("qemu-storage-daemon");
    let scratch = Scratch::in_memory();
    let refused = |blockdev: &str, message: &str| {
        let ended = run_to_end(&scratch, &["--blockdev", blockdev]);
        assert_eq!(ended.code, Some(1));
        assert!(ended.stderr.contains(message), "{}", ended.stderr);
    };
    let socket = scratch.path("in.sock");
    refused(
        &format!(
            "driver=virtio-blk-vhost-user,node-name=disk,path={}",
            socket.display()
        ),
        "cache.direct=off is not supported",
    );
    refused(
        "driver=virtio-blk-vhost-user,node-name=disk,cache.direct=on",
        "Parameter 'path' is missing",
    );
    refused(
        &node(&scratch, ""),
        &format!(
            "blkio_connect failed: Failed to connect to '{}': No such file or directory",
            socket.display()
        ),
    );
    let image = scratch.file("disk", &vec![1; MIB]);
    let back_end = qemu_back_end(&scratch, &image, "raw", "");
    refused(
        &node(&scratch, ""),
        "blkio_start failed: Device is read-only: Read-only file system",
    );
    // A node that does not want to write may.
    for options in [",read-only=on", ",auto-read-only=on"] {
        let daemon = Daemon::start(
            &scratch,
            &[
                "--blockdev",
                &node(&scratch, options),
                "--nbd-server",
                &format!(
                    "addr.type=unix,addr.path={}",
                    scratch.path("out.sock").display()
                ),
                "--export",
                "type=nbd,id=e,node-name=disk,name=out",
            ],
        );
        let uri = format!(
            "nbd+unix:///out?socket={}",
            scratch.path("out.sock").display()
        );
        let said = run(
            "qemu-io",
            &["-r", "-f", "raw", "-c", "read -P 1 0 1M", &uri],
        );
        assert!(said.stdout.contains("read 1048576/1048576"), "{said:?}");
        daemon.stop();
    }
    back_end.stop();
}

#[test]
fn a_node_takes_over_the_length_that_the_device_has_got() {
    needs!("qemu-storage-daemon", "qemu-io");
    let scratch = Scratch::in_memory();
    let image = scratch.file("disk", &vec![1; MIB]);
    let back_end = qemu_back_end(&scratch, &image, "raw", ",writable=on");
    let passing = Passing::start(&scratch, &[], "");
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    let mut qemu = Qmp::connect(&scratch.path("qemu.sock"));
    let sizes = |size: usize| json!({"node-name": "disk", "size": size});
    let refusal = qmp.refuse("block_resize", sizes(2 * MIB));
    assert!(refusal.contains("Invalid argument"), "{refusal}");
    qemu.execute("block_resize", sizes(2 * MIB));
    qmp.execute("block_resize", sizes(2 * MIB));
    let nodes = qmp.execute("query-named-block-nodes", json!({}));
    assert_eq!(nodes[0]["image"]["virtual-size"], 2 * MIB);
    assert_eq!(nodes[0]["drv"], "virtio-blk-vhost-user");
    let said = passing.io(&["write -P 3 1M 1M", "read -P 3 1M 1M"]);
    assert!(said.contains("read 1048576/1048576"), "{said}");
    passing.daemon.stop();
    back_end.stop();
    assert_eq!(fs::read(&image).unwrap()[MIB..], vec![3; MIB]);
}

/// fio on `file`, verifying what it reads.
fn verified_load(scratch: &Scratch, file: &Path, seconds: u32) -> std::process::Child {
    limited("fio")
        .args([
            "--name=verify",
            "--ioengine=io_uring",
            "--direct=1",
            "--iodepth=32",
            "--rw=randrw",
            "--bsrange=512-128k",
            "--bs_unaligned=0",
            "--size=24M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--time_based",
            &format!("--runtime={seconds}"),
            &format!("--filename={}", file.display()),
        ])
        .current_dir(scratch.dir())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// A daemon with the disk as a file, over FUSE.
fn mounted(scratch: &Scratch, options: &str) -> (Daemon, PathBuf) {
    let mount = scratch.empty_file("mount");
    let args = [
        "--object".to_owned(),
        "iothread,id=a".to_owned(),
        "--object".to_owned(),
        "iothread,id=b".to_owned(),
        "--blockdev".to_owned(),
        node(scratch, options),
        "--export".to_owned(),
        format!(
            "type=fuse,id=e,node-name=disk,mountpoint={},writable=on,iothread.0=a,iothread.1=b",
            mount.display()
        ),
    ];
    (Daemon::start(scratch, &args), mount)
}

#[test]
fn whatever_is_done_to_the_disk_is_done_to_the_back_ends() {
    needs!(root, "qemu-img", "qemu-storage-daemon");
    const PART: usize = 4 * MIB;
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 3 * PART as u64, "");
    let back_end = qemu_back_end(&scratch, &image, "qcow2", ",writable=on,num-queues=2");
    let (daemon, mount) = mounted(&scratch, "");
    let mut model = vec![0; 3 * PART];
    // Everybody in a part of his own, so that each knows what it holds.
    std::thread::scope(|scope| {
        for (number, part) in model.chunks_mut(PART).enumerate() {
            let mount = &mount;
            scope.spawn(move || {
                let mut writer = Writer::open(mount, 40 + number as u64);
                let start = number * PART;
                let mut whole = vec![0; start];
                whole.extend_from_slice(part);
                for _ in 0..400 {
                    writer.act(&mut whole, start..start + PART, 300_000);
                }
                part.copy_from_slice(&whole[start..]);
            });
        }
    });
    assert_mount_is(&mount, &model);
    daemon.stop();
    back_end.stop();
    qemu::assert_clean(&image);
    assert_same(
        "the image",
        &qemu::content(&scratch, &image, "qcow2"),
        &model,
    );
}

#[test]
fn requests_wait_for_a_back_end_that_comes_back() {
    needs!(root, "qemu-storage-daemon", "fio");
    let scratch = Scratch::in_memory();
    let image = scratch.file("disk", &vec![0; BYTES]);
    let start = || qemu_back_end(&scratch, &image, "raw", ",writable=on,num-queues=2");
    let mut back_end = start();
    let (daemon, mount) = mounted(&scratch, ",reconnect-delay=60");
    let mut load = verified_load(&scratch, &mount, 6);
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(700));
        back_end.kill_hard();
        back_end = start();
    }
    assert!(load.wait().unwrap().success(), "{}", daemon.log());
    let log = daemon.log();
    assert_eq!(log.matches("is lost: it was closed").count(), 5, "{log}");
    let content = fs::read(&mount).unwrap();
    daemon.stop();
    back_end.stop();
    assert_same("the image", &fs::read(&image).unwrap(), &content);
}

#[test]
fn without_a_delay_requests_fail_until_the_back_end_is_back() {
    needs!("qemu-storage-daemon", "qemu-io");
    let scratch = Scratch::in_memory();
    let image = scratch.file("disk", &vec![0; MIB]);
    let mut back_end = qemu_back_end(&scratch, &image, "raw", ",writable=on");
    let passing = Passing::start(&scratch, &[], "");
    assert!(passing.reads_well());
    back_end.kill_hard();
    eventually("requests fail", 30, || {
        passing.io(&["read 0 4k"]).contains("Input/output error")
    });
    let _back_end = qemu_back_end(&scratch, &image, "raw", ",writable=on");
    eventually("the back end is found again", 30, || passing.reads_well());
    let log = passing.daemon.log();
    let socket = scratch.path("in.sock");
    assert!(
        log.contains(&format!(
            "the connection to the vhost-user back end at '{}' is lost",
            socket.display()
        )) && log.contains("is there again"),
        "{log}"
    );
    passing.daemon.stop();
}

#[test]
fn the_io_uring_driver_reads_and_writes_files() {
    needs!("qemu-io");
    let scratch = Scratch::in_memory();
    let image = scratch.file("disk", &vec![1; MIB]);
    let socket = scratch.path("out.sock");
    let daemon = Daemon::start(
        &scratch,
        &[
            "--blockdev",
            &format!(
                "driver=io_uring,node-name=disk,filename={}",
                image.display()
            ),
            "--nbd-server",
            &format!("addr.type=unix,addr.path={}", socket.display()),
            "--export",
            "type=nbd,id=e,node-name=disk,name=out,writable=on",
        ],
    );
    let uri = format!("nbd+unix:///out?socket={}", socket.display());
    let passing = Passing { daemon, uri };
    let said = passing.io(&["read -P 1 0 1M", "write -P 2 4k 8k", "flush"]);
    assert!(said.contains("wrote 8192/8192"), "{said}");
    passing.daemon.stop();
    assert_eq!(fs::read(&image).unwrap()[4096..12288], [2; 8192]);
    let ended = run_to_end(
        &scratch,
        &[
            "--blockdev",
            "driver=io_uring,node-name=disk,filename=/dev/null",
        ],
    );
    assert!(
        ended.stderr.contains(
            "'io_uring' driver requires '/dev/null' to be either a regular file or a block device"
        ),
        "{}",
        ended.stderr
    );
}
