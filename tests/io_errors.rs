//! Requests of exports that fail are told as events, and not more of them than a client can follow.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use serde_json::json;

use crate::needs;
use crate::support::daemon::{Daemon, is_qemu};
use crate::support::{Qmp, Scratch};

#[test]
fn writes_that_find_no_space_are_told_and_the_flood_is_held_back() {
    needs!(root, "qemu-img");
    if is_qemu() {
        // It never says so for exports.
        return;
    }
    let scratch = Scratch::new();
    let small = scratch.path("small");
    std::fs::create_dir(&small).unwrap();
    let options = Some("size=64k");
    mount(
        Some("none"),
        &small,
        Some("tmpfs"),
        MsFlags::empty(),
        options,
    )
    .unwrap();
    let image = small.join("a.raw");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    scratch.empty_file("m");
    let daemon = Daemon::start(
        &scratch,
        &[
            "--chardev",
            "socket,id=q,path=q.sock,server=on,wait=off",
            "--monitor",
            "q",
            "--blockdev",
            "file,node-name=f,filename=small/a.raw",
            "--export",
            "fuse,id=e,node-name=f,mountpoint=m,writable=on,writethrough=on",
        ],
    );
    let mut qmp = Qmp::connect(&scratch.path("q.sock"));
    let file = OpenOptions::new().write(true).open(scratch.path("m"));
    let file = file.unwrap();
    let fail = || {
        let written = file.write_all_at(&[1; 128 << 10], 0);
        let error = written.expect_err("there is no space for that");
        assert_eq!(error.raw_os_error(), Some(Errno::ENOSPC as i32));
    };
    fail();
    let event = qmp.event("BLOCK_IO_ERROR");
    assert_eq!(
        event,
        json!({
            "qom-path": "", "device": "e", "node-name": "f", "operation": "write", "action": "report",
            "nospace": true, "reason": "No space left on device",
        })
    );
    for _ in 0..100 {
        fail();
    }
    // All of them came in less than the seconds in which two can be told.
    assert_eq!(qmp.event("BLOCK_IO_ERROR")["device"], "e");
    qmp.execute("block-export-del", json!({"id": "e"}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED")["id"], "e");
    drop(file);
    daemon.stop();
}
