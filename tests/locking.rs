//! Image locks are QEMU's: its tools refuse an image stord writes to and stord refuses theirs, and readers share.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::json;

use crate::needs;
use crate::support::daemon::{Daemon, fuse_args, program, run_to_end};
use crate::support::run::{Ended, run};
use crate::support::{Qmp, Scratch, eventually, qemu};

/// QEMU's own tool holding the image open; ends when dropped.
pub struct Holder(Child);

impl Holder {
    /// Opens the image and waits until it is locked.
    pub fn new(image: &Path, read_only: bool) -> Holder {
        let mut command = Command::new("qemu-io");
        if read_only {
            command.arg("-r");
        }
        // Without commands it waits for some on its standard input, with the image open.
        let child = command
            .args(["-f", "qcow2"])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let holder = Holder(child);
        eventually("qemu-io holds the image", 30, || {
            let fds = std::fs::read_dir(format!("/proc/{}/fd", holder.0.id())).unwrap();
            let open = fds
                .flatten()
                .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == image));
            let locks = std::fs::read_to_string("/proc/locks").unwrap();
            let inode = format!(
                ":{} ",
                std::os::unix::fs::MetadataExt::ino(&image.metadata().unwrap())
            );
            open && locks.contains(&inode)
        });
        holder
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn image(scratch: &Scratch) -> std::path::PathBuf {
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 4 << 20, "");
    image
}

fn read_with_qemu_io(image: &Path) -> Ended {
    run(
        "qemu-io",
        &[
            "-r",
            "-f",
            "qcow2",
            "-c",
            "read 0 512",
            image.to_str().unwrap(),
        ],
    )
}

fn write_with_qemu_io(image: &Path) -> Ended {
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write 0 512", image.to_str().unwrap()],
    )
}

const QCOW2: &str = "qcow2,node-name=q,file.driver=file,file.filename=disk.qcow2";

#[test]
fn qemu_refuses_an_image_that_is_written_to() {
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = image(&scratch);
    let mount = scratch.empty_file("mount");
    let daemon = Daemon::start(
        &scratch,
        &fuse_args(&image, "qcow2", "", &mount, ",writable=on"),
    );
    let writer = write_with_qemu_io(&image);
    assert!(
        !writer.success() && writer.stderr.contains("Failed to get \"write\" lock"),
        "{writer:?}"
    );
    let reader = read_with_qemu_io(&image);
    assert!(
        !reader.success()
            && reader
                .stderr
                .contains("Failed to get shared \"write\" lock"),
        "{reader:?}"
    );
    let info = run("qemu-img", &["info", image.to_str().unwrap()]);
    assert!(!info.success() && info.stderr.contains("lock"), "{info:?}");
    qemu::img(&["info", "--force-share", image.to_str().unwrap()]);
    daemon.stop();
    assert!(write_with_qemu_io(&image).success());
}

#[test]
fn image_that_qemu_writes_to_is_refused() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = image(&scratch);
    let holder = Holder::new(&image, false);
    let name = program().file_name().unwrap().to_str().unwrap().to_owned();
    let ended = run_to_end(&scratch, &["--blockdev", QCOW2]);
    assert_eq!(ended.code, Some(1));
    assert_eq!(
        ended.stderr,
        format!(
            "{name}: --blockdev {QCOW2}: Failed to get \"write\" lock\n\
             Is another process using the image [disk.qcow2]?\n"
        )
    );
    let read_only = format!("{QCOW2},read-only=on,file.read-only=on");
    let ended = run_to_end(&scratch, &["--blockdev", &read_only]);
    assert_eq!(ended.code, Some(1));
    assert_eq!(
        ended.stderr,
        format!(
            "{name}: --blockdev {read_only}: Failed to get shared \"write\" lock\n\
             Is another process using the image [disk.qcow2]?\n"
        )
    );
    // Only a reader may look on regardless.
    let shared = format!("{read_only},force-share=on,file.force-share=on");
    Daemon::start(&scratch, &["--blockdev", &shared]).stop();
    drop(holder);
    Daemon::start(&scratch, &["--blockdev", QCOW2]).stop();
}

#[test]
fn readers_share() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = image(&scratch);
    let read_only = format!("{QCOW2},read-only=on,file.read-only=on");
    let holder = Holder::new(&image, true);
    let daemon = Daemon::start(&scratch, &["--blockdev", &read_only]);
    let second = Daemon::start(&scratch, &["--blockdev", &read_only]);
    assert!(read_with_qemu_io(&image).success());
    let writer = write_with_qemu_io(&image);
    assert!(
        !writer.success() && writer.stderr.contains("Failed to get \"write\" lock"),
        "{writer:?}"
    );
    let ended = run_to_end(&scratch, &["--blockdev", QCOW2]);
    assert!(
        ended.code == Some(1) && ended.stderr.contains("Failed to get \"write\" lock"),
        "{ended:?}"
    );
    daemon.stop();
    second.stop();
    drop(holder);
}

#[test]
fn two_daemons_do_not_write_to_one_image() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    image(&scratch);
    let daemon = Daemon::start(&scratch, &["--blockdev", QCOW2]);
    let ended = run_to_end(&scratch, &["--blockdev", QCOW2]);
    assert!(
        ended.code == Some(1) && ended.stderr.contains("Failed to get \"write\" lock"),
        "{ended:?}"
    );
    daemon.stop();
}

#[test]
fn backing_files_may_be_read_by_many_and_written_by_none() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let base = scratch.path("base.qcow2");
    qemu::create(&base, 4 << 20, "");
    for name in ["disk.qcow2", "other.qcow2"] {
        qemu::create(
            &scratch.path(name),
            4 << 20,
            "backing_file=base.qcow2,backing_fmt=qcow2",
        );
    }
    let daemon = Daemon::start(&scratch, &["--blockdev", QCOW2]);
    let second = Daemon::start(
        &scratch,
        &["--blockdev", &QCOW2.replace("disk.qcow2", "other.qcow2")],
    );
    assert!(read_with_qemu_io(&base).success());
    let writer = write_with_qemu_io(&base);
    assert!(
        !writer.success() && writer.stderr.contains("Failed to get \"write\" lock"),
        "{writer:?}"
    );
    daemon.stop();
    second.stop();
}

#[test]
fn lock_can_be_done_without() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = image(&scratch);
    let daemon = Daemon::start(
        &scratch,
        &["--blockdev", &format!("{QCOW2},file.locking=off")],
    );
    assert!(read_with_qemu_io(&image).success());
    daemon.stop();
}

#[test]
fn lock_goes_with_the_node() {
    needs!("qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let image = image(&scratch);
    let daemon = Daemon::start(
        &scratch,
        &[
            "--chardev",
            "socket,id=c,path=qmp.sock,server=on,wait=off",
            "--monitor",
            "c",
        ],
    );
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    let add = json!({"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": "disk.qcow2"}});
    for _ in 0..3 {
        qmp.execute("blockdev-add", add.clone());
        assert!(!write_with_qemu_io(&image).success());
        let again = json!({"driver": "file", "node-name": "f", "filename": "disk.qcow2"});
        // A second node on the same file within the daemon is one more user of it; as long as it does not write it may be.
        qmp.execute("blockdev-add", again);
        qmp.execute("blockdev-del", json!({"node-name": "f"}));
        qmp.execute("blockdev-del", json!({"node-name": "q"}));
        assert!(write_with_qemu_io(&image).success());
    }
    daemon.quit(&mut qmp);
}
