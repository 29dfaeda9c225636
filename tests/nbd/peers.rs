//! What each of those who speak NBD finds: content, commands, block status, limits.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::{BYTES, Holder, SIZE, Served};
use crate::needs;
use crate::support::daemon::{Daemon, program, run_to_end};
use crate::support::disk::MIB;
use crate::support::model::{assert_same, noise};
use crate::support::run::{run, run_in, run_ok};
use crate::support::{Scratch, qemu};

#[test]
fn nbdinfo_describes_the_export() {
    needs!("qemu-img", "nbdinfo");
    let served = Served::start(
        &noise(1, 3 * MIB),
        "",
        ",name=disk,description=for you,writable=on",
    );
    let info: Value = serde_json::from_str(&run_ok("nbdinfo", &["--json", &served.uri()])).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], SIZE);
    assert_eq!(export["description"], "for you");
    for (flag, wanted) in [
        ("is_read_only", false),
        ("can_cache", true),
        ("can_df", true),
        ("can_fast_zero", true),
        ("can_flush", true),
        ("can_fua", true),
        ("can_multi_conn", true),
        ("can_trim", true),
        ("can_zero", true),
    ] {
        assert_eq!(export[flag], wanted, "{flag}");
    }
    let list = run_ok(
        "nbdinfo",
        &[
            "--list",
            "--json",
            &format!("nbd+unix:///?socket={}", served.socket.display()),
        ],
    );
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list["exports"][0]["export-name"], "disk");
    let map: Value =
        serde_json::from_str(&run_ok("nbdinfo", &["--map", "--json", &served.uri()])).unwrap();
    assert_eq!(
        map,
        json!([
            {"offset": 0, "length": 3 * MIB, "type": 0, "description": "data"},
            {"offset": 3 * MIB, "length": SIZE - 3 * MIB as u64, "type": 3, "description": "hole,zero"},
        ])
    );
    assert!(
        !run(
            "nbdinfo",
            &[format!(
                "nbd+unix:///other?socket={}",
                served.socket.display()
            )]
        )
        .success()
    );
    served.daemon.stop();
}

#[test]
fn read_only_export_refuses_changes() {
    needs!("qemu-img", "nbdsh");
    let content = noise(2, MIB);
    let served = Served::start(&content, "", "");
    served.nbdsh(
        "assert h.is_read_only()\n\
         h.set_strict_mode(0)\n\
         import errno\n\
         for act in (lambda: h.pwrite(b'x' * 512, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):\n\
         \x20   try:\n\
         \x20       act()\n\
         \x20       assert False\n\
         \x20   except nbd.Error as e:\n\
         \x20       assert e.errnum == errno.EPERM, e\n",
    );
    let mut wanted = content;
    wanted.resize(BYTES, 0);
    served.assert_image_is(&wanted);
}

#[test]
fn content_is_copied_both_ways_over_many_connections() {
    needs!("qemu-img", "nbdcopy");
    let served = Served::start(&[], "", ",writable=on");
    let mut content = noise(3, BYTES);
    content[MIB..20 * MIB].fill(0);
    let source = served.scratch.file("source", &content);
    let uri = served.uri();
    run_ok(
        "nbdcopy",
        &[
            "--connections=4",
            "--requests=32",
            source.to_str().unwrap(),
            &uri,
        ],
    );
    for options in [
        ["--connections=4", "--requests=64"],
        ["--connections=1", "--synchronous"],
    ] {
        let target = served.scratch.path("target");
        let target_text = target.to_str().unwrap();
        run_ok("nbdcopy", &[options[0], options[1], &uri, target_text]);
        assert_same("the copy", &fs::read(&target).unwrap(), &content);
        fs::remove_file(&target).unwrap();
    }
    // A whole read without holes told, and one in simple replies.
    served.nbdsh(
        "import hashlib\n\
         parts = []\n\
         def take(data, offset, status, error):\n\
         \x20   assert status == nbd.READ_DATA\n\
         \x20   parts.append(bytes(data))\n\
         h.pread_structured(8 << 20, 512 * 1024, take, nbd.CMD_FLAG_DF)\n\
         assert len(parts) == 1\n\
         a = parts[0]\n\
         b = h.pread(8 << 20, 512 * 1024)\n\
         assert a == b\n\
         s = nbd.NBD()\n\
         s.set_request_structured_replies(False)\n\
         s.connect_uri(h.get_uri())\n\
         assert not s.get_structured_replies_negotiated()\n\
         assert s.pread(8 << 20, 512 * 1024) == a\n",
    );
    served.assert_image_is(&content);
}

#[test]
fn every_command_and_flag_does_its_work() {
    needs!("qemu-img", "nbdsh");
    let served = Served::start(&[], "", ",writable=on");
    served.nbdsh(
        "import errno\n\
         F = nbd.CMD_FLAG_FUA\n\
         h.pwrite(b'a' * 100000, 1000, F)\n\
         h.pwrite(b'b' * 33, 5 << 20)\n\
         h.zero(5000, 2000, F | nbd.CMD_FLAG_NO_HOLE)\n\
         h.zero(1 << 20, 10 << 20, nbd.CMD_FLAG_FAST_ZERO)\n\
         h.pwrite(b'c' * (1 << 20), 20 << 20)\n\
         h.trim(1 << 20, 20 << 20, F)\n\
         h.cache(1 << 20, 0)\n\
         h.flush()\n\
         data = h.pread(100000, 1000)\n\
         assert data == b'a' * 1000 + bytes(5000) + b'a' * 94000\n\
         size = h.get_size()\n\
         h.set_strict_mode(0)\n\
         def refused(errnum, act):\n\
         \x20   try:\n\
         \x20       act()\n\
         \x20       assert False\n\
         \x20   except nbd.Error as e:\n\
         \x20       assert e.errnum == errnum, e\n\
         refused(errno.EINVAL, lambda: h.pread(512, size))\n\
         refused(errno.ENOSPC, lambda: h.pwrite(b'x' * 512, size - 511))\n\
         refused(errno.ENOSPC, lambda: h.zero(512, size))\n\
         refused(errno.EINVAL, lambda: h.trim(512, size))\n\
         refused(errno.EINVAL, lambda: h.cache(512, size))\n\
         refused(errno.EINVAL, lambda: h.pread(512, 0, nbd.CMD_FLAG_FAST_ZERO))\n\
         refused(errno.EINVAL, lambda: h.flush(nbd.CMD_FLAG_DF))\n\
         refused(errno.EINVAL, lambda: h.block_status(512, 0, lambda *a: 0))\n\
         assert h.pread(33, 5 << 20) == b'b' * 33\n",
    );
    let mut wanted = vec![0; BYTES];
    wanted[1000..101_000].fill(b'a');
    wanted[2000..7000].fill(0);
    wanted[5 * MIB..5 * MIB + 33].fill(b'b');
    served.assert_image_is(&wanted);
}

#[test]
fn block_status_tells_holes_and_stops_where_asked() {
    needs!("qemu-img", "nbdsh");
    let served = Served::start(&[], "", ",writable=on");
    served.nbdsh(
        "s = nbd.NBD()\n\
         s.add_meta_context('base:allocation')\n\
         s.connect_uri(h.get_uri())\n\
         s.pwrite(b'x' * 65536, 0)\n\
         s.pwrite(b'x' * 65536, 131072)\n\
         got = []\n\
         def take(context, offset, extents, error):\n\
         \x20   assert context == 'base:allocation' and error.value == 0\n\
         \x20   got.append((offset, list(extents)))\n\
         s.block_status(1 << 20, 0, take)\n\
         assert got == [(0, [65536, 0, 65536, 3, 65536, 0, (1 << 20) - 3 * 65536, 3])], got\n\
         got.clear()\n\
         s.block_status(1 << 20, 65536, take, nbd.CMD_FLAG_REQ_ONE)\n\
         assert got == [(65536, [65536, 3])], got\n",
    );
    served.daemon.stop();
}

#[test]
fn depth_tells_the_layer() {
    needs!("qemu-img", "nbdinfo");
    let scratch = Scratch::in_memory();
    let base = scratch.path("base.qcow2");
    qemu::create(&base, SIZE, "");
    qemu::io(&base, "qcow2", &["write 0 2M".to_owned()]);
    let image = scratch.path("top.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    qemu::img(
        &[
            &create[..],
            &[base.to_str().unwrap(), image.to_str().unwrap()],
        ]
        .concat(),
    );
    qemu::io(&image, "qcow2", &["write 1M 2M".to_owned()]);
    let served = Served::start_over(scratch, image, &[], "", ",allocation-depth=on");
    let map = run_ok(
        "nbdinfo",
        &["--map=qemu:allocation-depth", "--json", &served.uri()],
    );
    let map: Value = serde_json::from_str(&map).unwrap();
    let types: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|extent| {
            (
                extent["length"].as_u64().unwrap(),
                extent["type"].as_u64().unwrap(),
            )
        })
        .collect();
    let mib = MIB as u64;
    assert_eq!(types, [(mib, 2), (2 * mib, 1), (SIZE - 3 * mib, 0)]);
    served.daemon.stop();
}

#[test]
fn bitmaps_tell_what_has_changed() {
    needs!("qemu-img", "nbdsh");
    let served = Served::start(&noise(11, 8 * MIB), "", ",writable=on,name=other");
    let mut qmp = served.qmp();
    qmp.execute(
        "block-dirty-bitmap-add",
        json!({"node": "disk", "name": "b", "granularity": 65536}),
    );
    let export =
        json!({"type": "nbd", "id": "b", "node-name": "disk", "writable": true, "bitmaps": ["b"]});
    assert_eq!(
        qmp.refuse(
            "block-export-add",
            json!({"type": "nbd", "id": "b", "node-name": "disk", "bitmaps": ["b"]})
        ),
        "Enabled bitmap 'b' incompatible with readonly export"
    );
    assert_eq!(
        qmp.refuse(
            "block-export-add",
            json!({"type": "nbd", "id": "b", "node-name": "disk", "bitmaps": ["c"]})
        ),
        "Bitmap 'c' is not found"
    );
    qmp.execute("block-export-add", export);
    assert!(
        qmp.refuse(
            "block-dirty-bitmap-remove",
            json!({"node": "disk", "name": "b"})
        )
        .contains("in use by another operation")
    );
    served.nbdsh(
        "h.pwrite(b'x' * 100, 200000)\n\
         h.pwrite(b'x' * 70000, 1 << 20)\n\
         s = nbd.NBD()\n\
         s.add_meta_context('qemu:dirty-bitmap:b')\n\
         s.connect_uri(h.get_uri())\n\
         got = []\n\
         s.block_status(2 << 20, 0, lambda context, offset, extents, error: got.append(list(extents)) or 0)\n\
         k = 65536\n\
         assert got == [[3 * k, 0, k, 1, 12 * k, 0, 2 * k, 1, 14 * k, 0]], got\n",
    );
    qmp.execute("block-export-del", json!({"id": "b", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.execute(
        "block-dirty-bitmap-remove",
        json!({"node": "disk", "name": "b"}),
    );
    served.daemon.quit(&mut qmp);
}

/// QEMU asks for extended headers, which this libnbd does not know.
#[test]
fn qemu_talks_with_it_in_extended_headers() {
    needs!("qemu-img", "qemu-io");
    let served = Served::start(&noise(4, 2 * MIB), "", ",writable=on");
    let uri = served.uri();
    run_ok(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 3 4097 70000",
            "-c",
            "read -P 3 4097 70000",
            "-c",
            "write -z -u 8M 1M",
            "-c",
            "read -P 0 8M 1M",
            "-c",
            "discard 16M 1M",
            "-c",
            "flush",
            "-c",
            "write -f -P 9 32M 64k",
            &uri,
        ],
    );
    let map: Value = serde_json::from_str(&run_ok(
        "qemu-img",
        &["map", "-f", "raw", "--output=json", &uri],
    ))
    .unwrap();
    let stored: u64 = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["data"] == true)
        .map(|extent| extent["length"].as_u64().unwrap())
        .sum();
    assert_eq!(stored, 2 * MIB as u64 + 64 * 1024);
    let copy = served.scratch.path("copy");
    run_ok(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "raw",
            &uri,
            copy.to_str().unwrap(),
        ],
    );
    let content = fs::read(&copy).unwrap();
    served.assert_image_is(&content);
}

#[test]
fn fio_verifies_what_it_wrote() {
    needs!("qemu-img", "fio");
    let served = Served::start(&[], "", ",writable=on");
    let uri = format!("--uri={}", served.uri());
    for job in [
        ["--rw=randwrite", "--bs=4k", "--io_size=24M"],
        [
            "--rw=randwrite",
            "--bssplit=512/20:4k/20:60k/30:1m/30",
            "--io_size=48M",
        ],
    ] {
        let mut args = vec![
            "--name=verify",
            "--ioengine=nbd",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--size=48M",
            "--randrepeat=1",
            &uri,
        ];
        args.extend(job);
        let ended = run_in(served.scratch.dir(), "fio", &args);
        assert!(ended.success(), "{}\n{}", ended.stdout, ended.stderr);
    }
    served.daemon.stop();
}

#[test]
fn clients_share_one_coherent_disk() {
    needs!("qemu-img", "nbdsh");
    let served = Served::start(&[], "", ",writable=on");
    served.nbdsh(
        "clients = [h] + [nbd.NBD() for _ in range(7)]\n\
         for c in clients[1:]:\n\
         \x20   c.connect_uri(h.get_uri())\n\
         for round in range(200):\n\
         \x20   writer, reader = clients[round % 8], clients[(round * 3 + 1) % 8]\n\
         \x20   data = bytes([round]) * 70000\n\
         \x20   writer.pwrite(data, round * 4096)\n\
         \x20   assert reader.pread(70000, round * 4096) == data\n\
         \x20   reader.flush()\n",
    );
    served.daemon.stop();
}

#[test]
fn removal_is_safe_or_hard() {
    needs!("qemu-img", "nbdsh");
    let served = Served::start(&[], "", ",writable=on");
    let mut qmp = served.qmp();
    let holder = Holder::start(&served);
    assert_eq!(
        qmp.refuse("block-export-del", json!({"id": "e"})),
        "export 'e' still in use"
    );
    qmp.execute("block-export-del", json!({"id": "e", "mode": "hard"}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    drop(holder);
    assert_eq!(qmp.execute("query-block-exports", json!({})), json!([]));
    qmp.execute(
        "nbd-server-add",
        json!({"device": "disk", "writable": true}),
    );
    served.nbdsh("h.pwrite(b'x' * 512, 0)");
    assert_eq!(
        qmp.refuse("nbd-server-add", json!({"device": "disk"})),
        "Block export id 'disk' is already in use"
    );
    qmp.execute("nbd-server-stop", json!({}));
    assert!(UnixStream::connect(&served.socket).is_err());
    assert_eq!(
        qmp.refuse("nbd-server-add", json!({"device": "disk"})),
        "NBD server not running"
    );
    let address = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}});
    qmp.execute("nbd-server-start", json!({"addr": address}));
    qmp.execute("blockdev-del", json!({"node-name": "disk"}));
    served.daemon.quit(&mut qmp);
}

#[test]
fn resized_disk_is_seen_by_new_clients() {
    needs!("qemu-img", "nbdinfo");
    let served = Served::start(&[], "", ",writable=on");
    let mut qmp = served.qmp();
    qmp.execute(
        "block_resize",
        json!({"node-name": "disk", "size": SIZE * 2}),
    );
    assert_eq!(
        run_ok("nbdinfo", &["--size", &served.uri()]).trim(),
        (SIZE * 2).to_string()
    );
    served.daemon.quit(&mut qmp);
}

#[test]
fn nbdkit_passes_it_on() {
    needs!("qemu-img", "nbdkit", "nbdcopy");
    let content = noise(7, 4 * MIB);
    let served = Served::start(&content, "", "");
    let copy = served.scratch.path("copy");
    let socket = format!("socket={}", served.socket.display());
    let copying = format!("nbdcopy \"$uri\" {}", copy.display());
    run_ok(
        "nbdkit",
        &["-U", "-", "nbd", &socket, "export=disk", "--run", &copying],
    );
    let mut wanted = content;
    wanted.resize(BYTES, 0);
    assert_same("the copy", &fs::read(copy).unwrap(), &wanted);
    served.daemon.stop();
}

#[test]
fn serve_prints_where_the_image_is() {
    needs!("qemu-img", "nbdcopy");
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, SIZE, "");
    let serve = |options: &[&str]| {
        let mut args = vec!["serve", image.to_str().unwrap()];
        args.extend(options);
        let mut child = Command::new(program())
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut uri = String::new();
        let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut output, &mut uri).unwrap();
        (
            Daemon::adopt(&scratch, child.id().try_into().unwrap()),
            child,
            uri.trim().to_owned(),
        )
    };
    let (daemon, mut child, uri) = serve(&[]);
    assert_eq!(uri, format!("nbd+unix:///?socket={}.nbd", image.display()));
    let content = noise(9, BYTES);
    let source = scratch.file("source", &content);
    run_ok("nbdcopy", &[source.to_str().unwrap(), &uri]);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(daemon.pid()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    assert!(child.wait().unwrap().success());
    drop(daemon);
    qemu::assert_clean(&image);
    let (daemon, mut child, uri) =
        serve(&["--read-only", "--name", "x", "--nbd", "127.0.0.1:10899"]);
    assert_eq!(uri, "nbd://127.0.0.1:10899/x");
    let target = scratch.path("target");
    run_ok("nbdcopy", &[&uri, target.to_str().unwrap()]);
    assert_same("the copy", &fs::read(&target).unwrap(), &content);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(daemon.pid()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    assert!(child.wait().unwrap().success());
    let ended = run_to_end(&scratch, &["serve", "missing.qcow2"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended
            .stderr
            .contains("cannot open 'missing.qcow2': No such file or directory"),
        "{}",
        ended.stderr
    );
}
