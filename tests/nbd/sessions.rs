//! The server's life as management programs lead it, with clients in the middle of their work.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};

use serde_json::{Value, json};

use super::{SIZE, Served, nbdsh};
use crate::needs;
use crate::support::daemon::Daemon;
use crate::support::disk::MIB;
use crate::support::model::noise;
use crate::support::run::run_ok;
use crate::support::{Scratch, qemu};

/// A client that works without end, until its connection does.
struct Busy(Child);

impl Busy {
    /// Starts one that writes and reads.
    fn start(uri: &str) -> Busy {
        Busy::start_with(
            uri,
            "h.aio_pwrite(data, at), h.aio_pread(nbd.Buffer(65536), at)",
        )
    }

    /// Starts one that reads.
    fn start_reading(uri: &str) -> Busy {
        Busy::start_with(uri, "h.aio_pread(nbd.Buffer(65536), at),")
    }

    fn start_with(uri: &str, requests: &str) -> Busy {
        let connect = format!("h.connect_uri('{uri}')");
        let script = format!(
            "data = nbd.Buffer.from_bytearray(bytearray(b'w' * 65536))\n\
             n = 0\n\
             while True:\n\
             \x20   cookies = []\n\
             \x20   for i in range(16):\n\
             \x20       at = (n + i) % 512 * 65536\n\
             \x20       cookies += [{requests}]\n\
             \x20   while cookies:\n\
             \x20       h.poll(-1)\n\
             \x20       cookies = [c for c in cookies if not h.aio_command_completed(c)]\n\
             \x20   n += 16\n\
             \x20   print('on', flush=True)\n"
        );
        let mut child = nbdsh()
            .args(["-c", &connect, "-c", &script])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "on");
        // It goes on printing, into a pipe that somebody has to empty.
        std::thread::spawn(move || lines.for_each(drop));
        Busy(child)
    }

    /// Its connection ends, and it with an error.
    #[track_caller]
    fn assert_cut_off(mut self) {
        assert!(!self.0.wait().unwrap().success());
    }
}

fn served() -> Served {
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, SIZE, "");
    let daemon = Daemon::start(
        &scratch,
        &[
            "--blockdev",
            &format!("driver=file,node-name=file,filename={}", image.display()),
            "--blockdev",
            "driver=qcow2,node-name=disk,file=file",
            "--chardev",
            "socket,id=qmp,path=qmp.sock,server=on,wait=off",
            "--monitor",
            "chardev=qmp",
        ],
    );
    let socket = scratch.path("nbd.sock");
    Served {
        scratch,
        image,
        socket,
        daemon,
    }
}

fn address(served: &Served) -> Value {
    json!({"addr": {"type": "unix", "data": {"path": served.socket}}})
}

/// As libvirt does it for the target of a migration with storage.
#[test]
fn target_of_a_migration() {
    needs!("qemu-img", "nbdsh", "nbdcopy");
    let served = served();
    let mut qmp = served.qmp();
    qmp.execute("nbd-server-start", address(&served));
    assert_eq!(
        qmp.refuse("nbd-server-start", address(&served)),
        "NBD server already running"
    );
    qmp.execute(
        "nbd-server-add",
        json!({"device": "disk", "name": "drive-virtio-disk0", "writable": true}),
    );
    assert_eq!(
        qmp.refuse(
            "nbd-server-add",
            json!({"device": "disk", "name": "drive-virtio-disk0", "writable": true})
        ),
        "Block export id 'drive-virtio-disk0' is already in use"
    );
    let uri = format!(
        "nbd+unix:///drive-virtio-disk0?socket={}",
        served.socket.display()
    );
    let content = noise(1, 64 * MIB);
    let source = served.scratch.file("source", &content);
    run_ok("nbdcopy", &[source.to_str().unwrap(), &uri]);
    let busy = Busy::start(&uri);
    assert_eq!(
        qmp.refuse("nbd-server-remove", json!({"name": "drive-virtio-disk0"})),
        "export 'drive-virtio-disk0' still in use"
    );
    // The end of a migration: everything goes at once, whoever is there.
    qmp.execute("nbd-server-stop", json!({}));
    busy.assert_cut_off();
    assert_eq!(
        qmp.event("BLOCK_EXPORT_DELETED"),
        json!({"id": "drive-virtio-disk0"})
    );
    assert_eq!(qmp.execute("query-block-exports", json!({})), json!([]));
    assert!(!served.socket.exists());
    assert_eq!(
        qmp.refuse("nbd-server-stop", json!({})),
        "NBD server not running"
    );
    served.daemon.quit(&mut qmp);
    qemu::assert_clean(&served.image);
}

/// As libvirt does it for a backup that somebody pulls.
#[test]
fn backup_that_is_pulled() {
    needs!("qemu-img", "nbdsh");
    let served = served();
    let mut qmp = served.qmp();
    qmp.execute(
        "block-dirty-bitmap-add",
        json!({"node": "disk", "name": "backup-vda", "disabled": true}),
    );
    for round in 0..3 {
        qmp.execute("nbd-server-start", address(&served));
        let export = json!({"type": "nbd", "id": "libvirt-nbd-vda", "name": "vda", "node-name": "disk", "writable": false,
            "bitmaps": ["backup-vda"]});
        qmp.execute("block-export-add", export);
        let uri = format!("nbd+unix:///vda?socket={}", served.socket.display());
        let script = "s = nbd.NBD()\n\
             s.add_meta_context('base:allocation')\n\
             s.add_meta_context('qemu:dirty-bitmap:backup-vda')\n\
             s.connect_uri(h.get_uri())\n\
             seen = set()\n\
             s.block_status(1 << 20, 0, lambda name, *rest: seen.add(name) or 0)\n\
             assert seen == {'base:allocation', 'qemu:dirty-bitmap:backup-vda'}, seen\n";
        let connect = format!("h.connect_uri('{uri}')");
        assert!(
            nbdsh()
                .args(["-c", &connect, "-c", script])
                .status()
                .unwrap()
                .success()
        );
        // Clients that have only connected so far, and one in its work.
        let waiting: Vec<_> = (0..5)
            .map(|_| UnixStream::connect(&served.socket).unwrap())
            .collect();
        if round == 1 {
            let busy = Busy::start_reading(&uri);
            assert_eq!(
                qmp.refuse("block-export-del", json!({"id": "libvirt-nbd-vda"})),
                "export 'libvirt-nbd-vda' still in use"
            );
            qmp.execute(
                "block-export-del",
                json!({"id": "libvirt-nbd-vda", "mode": "hard"}),
            );
            busy.assert_cut_off();
        }
        qmp.execute("nbd-server-stop", json!({}));
        drop(waiting);
    }
    qmp.execute(
        "block-dirty-bitmap-remove",
        json!({"node": "disk", "name": "backup-vda"}),
    );
    served.daemon.quit(&mut qmp);
}

/// Commands in quick succession, with clients coming all the time.
#[test]
fn server_comes_and_goes_under_load() {
    needs!("qemu-img", "nbdsh");
    let served = served();
    let mut qmp = served.qmp();
    for round in 0..10 {
        qmp.execute("nbd-server-start", address(&served));
        for name in ["a", "b", "c"] {
            qmp.execute(
                "nbd-server-add",
                json!({"device": "disk", "name": name, "writable": true}),
            );
        }
        let uri = |name: &str| format!("nbd+unix:///{name}?socket={}", served.socket.display());
        let (first, second) = (Busy::start(&uri("a")), Busy::start(&uri("b")));
        qmp.execute("nbd-server-remove", json!({"name": "c"}));
        if round % 2 == 0 {
            qmp.execute("nbd-server-remove", json!({"name": "a", "mode": "hard"}));
            first.assert_cut_off();
            let third = Busy::start(&uri("b"));
            qmp.execute("nbd-server-stop", json!({}));
            third.assert_cut_off();
        } else {
            qmp.execute("nbd-server-stop", json!({}));
            first.assert_cut_off();
        }
        second.assert_cut_off();
        assert_eq!(qmp.execute("query-block-exports", json!({})), json!([]));
    }
    // The end of the daemon itself.
    qmp.execute("nbd-server-start", address(&served));
    qmp.execute(
        "nbd-server-add",
        json!({"device": "disk", "writable": true}),
    );
    let busy = Busy::start(&served.uri());
    served.daemon.quit(&mut qmp);
    busy.assert_cut_off();
    qemu::assert_clean(&served.image);
}
