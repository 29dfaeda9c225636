//! The `nbd` driver against the servers of others and our own: content, errors, odd servers, and servers that go away.

mod filters;
mod hostile;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::needs;
use crate::support::daemon::{Daemon, run_to_end};
use crate::support::disk::MIB;
use crate::support::model::{assert_same, noise};
use crate::support::run::{limited, run, run_ok};
use crate::support::{Qmp, Scratch, eventually, qemu};

const BYTES: usize = 32 * MIB;

/// A server of somebody else, killed when dropped.
struct Server(Child);

impl Server {
    /// Starts it and waits for its socket.
    fn start(program: &str, args: &[&str], socket: &Path) -> Server {
        let child = limited(program)
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Server(child);
        eventually("the server listens", 30, || {
            UnixStream::connect(socket).is_ok()
        });
        server
    }

    fn nbdkit(socket: &Path, args: &[&str]) -> Server {
        let mut all = vec![
            "--foreground",
            "--exit-with-parent",
            "--unix",
            socket.to_str().unwrap(),
        ];
        all.extend(args);
        Server::start("nbdkit", &all, socket)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // timeout(1) passes it on; SIGKILL would not reach the server.
        let pid = nix::unistd::Pid::from_raw(self.0.id().try_into().unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// A daemon that passes on what a server at `server` has, as an export named `out`.
struct Passing {
    daemon: Daemon,
    uri: String,
}

impl Passing {
    fn start(scratch: &Scratch, server: &Path, options: &str) -> Passing {
        Passing::start_with(scratch, &[], server, options)
    }

    fn start_with(scratch: &Scratch, before: &[String], server: &Path, options: &str) -> Passing {
        let socket = scratch.path("out.sock");
        let mut args = before.to_vec();
        args.extend([
            "--blockdev".to_owned(),
            format!(
                "driver=nbd,node-name=disk,discard=unmap,server.type=unix,server.path={}{options}",
                server.display()
            ),
            "--nbd-server".to_owned(),
            format!("addr.type=unix,addr.path={}", socket.display()),
            "--export".to_owned(),
            "type=nbd,id=e,node-name=disk,name=out,writable=on".to_owned(),
            "--chardev".to_owned(),
            "socket,id=qmp,path=qmp.sock,server=on,wait=off".to_owned(),
            "--monitor".to_owned(),
            "chardev=qmp".to_owned(),
        ]);
        let daemon = Daemon::start(scratch, &args);
        let uri = format!("nbd+unix:///out?socket={}", socket.display());
        Passing { daemon, uri }
    }

    /// Writes all of `content` and reads it back.
    fn assert_carries(&self, scratch: &Scratch, content: &[u8]) {
        let source = scratch.file("source", content);
        run_ok(
            "nbdcopy",
            &[
                "--connections=4",
                "--requests=16",
                source.to_str().unwrap(),
                &self.uri,
            ],
        );
        let target = scratch.path("target");
        run_ok(
            "nbdcopy",
            &["--connections=2", &self.uri, target.to_str().unwrap()],
        );
        assert_same("the copy", &fs::read(&target).unwrap(), content);
    }
}

fn content(seed: u64) -> Vec<u8> {
    let mut content = noise(seed, BYTES);
    content[5 * MIB..17 * MIB].fill(0);
    content
}

#[test]
fn servers_of_others_are_spoken_with() {
    needs!("qemu-img", "qemu-nbd", "nbdkit", "nbdcopy");
    let scratch = Scratch::in_memory();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, BYTES as u64, "");
    let socket = scratch.path("in.sock");
    {
        let args = [
            "--persistent",
            "--shared=0",
            "--format=qcow2",
            "--discard=unmap",
            "--socket",
            socket.to_str().unwrap(),
            image.to_str().unwrap(),
        ];
        let _server = Server::start("qemu-nbd", &args, &socket);
        let passing = Passing::start(&scratch, &socket, "");
        passing.assert_carries(&scratch, &content(1));
        let map = run_ok("nbdinfo", &["--map", &passing.uri]);
        assert!(map.contains("hole,zero"), "{map}");
        passing.daemon.stop();
    }
    qemu::assert_clean(&image);
    assert_same(
        "the image",
        &qemu::content(&scratch, &image, "qcow2"),
        &content(1),
    );

    let size = format!("size={BYTES}");
    // The plug-in with everything, then without what a server need not have, and with constraints.
    for (number, filters) in [
        vec!["memory", &size],
        vec![
            "--filter=noextents",
            "--filter=nozero",
            "--filter=nofilter",
            "memory",
            &size,
        ],
        vec!["--filter=fua", "memory", &size, "fuamode=emulate"],
        vec!["--no-sr", "memory", &size],
        vec![
            "--filter=multi-conn",
            "memory",
            &size,
            "multi-conn-mode=disable",
        ],
        vec![
            "--filter=blocksize-policy",
            "memory",
            &size,
            "blocksize-minimum=4096",
            "blocksize-maximum=1M",
            "blocksize-preferred=4096",
            "blocksize-error-policy=error",
        ],
        vec![
            "--filter=delay",
            "memory",
            &size,
            "rdelay=1ms",
            "wdelay=1ms",
        ],
    ]
    .into_iter()
    .enumerate()
    {
        let socket = scratch.path(&format!("nbdkit{number}.sock"));
        let _server = Server::nbdkit(&socket, &filters);
        let passing = Passing::start(&scratch, &socket, "");
        passing.assert_carries(&scratch, &content(2 + number as u64));
        passing.daemon.stop();
    }
}

#[test]
fn errors_of_the_server_reach_the_user() {
    needs!("nbdkit", "qemu-io");
    let scratch = Scratch::in_memory();
    let socket = scratch.path("in.sock");
    let _server = Server::nbdkit(
        &socket,
        &[
            "--filter=error",
            "memory",
            "size=1M",
            "error-pwrite=ENOSPC",
            "error-pwrite-rate=100%",
            "error-pread=EIO",
            "error-pread-rate=100%",
        ],
    );
    let passing = Passing::start(&scratch, &socket, "");
    let ended = run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "read 0 4k",
            "-c",
            "write 0 4k",
            &passing.uri,
        ],
    );
    let text = ended.stdout + &ended.stderr;
    assert!(text.contains("Input/output error"), "{text}");
    assert!(text.contains("No space left on device"), "{text}");
    passing.daemon.stop();
}

#[test]
fn requests_wait_for_a_server_that_comes_back() {
    needs!("nbdkit", "fio");
    let scratch = Scratch::in_memory();
    let socket = scratch.path("in.sock");
    let disk = scratch.file("disk", &vec![0; BYTES]);
    let file = format!("file={}", disk.display());
    let start = || {
        // A killed server leaves its socket.
        let _ = fs::remove_file(&socket);
        Server::nbdkit(&socket, &["file", &file])
    };
    let mut server = start();
    let passing = Passing::start(&scratch, &socket, ",reconnect-delay=60");
    let uri = format!("--uri={}", passing.uri);
    let mut load = limited("fio")
        .args([
            "--name=verify",
            "--ioengine=nbd",
            "--iodepth=16",
            "--rw=randrw",
            "--bs=4k",
            "--size=24M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--time_based",
            "--runtime=6",
            &uri,
        ])
        .current_dir(scratch.dir())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(700));
        drop(server);
        server = start();
    }
    assert!(load.wait().unwrap().success());
    passing.daemon.stop();
    drop(server);
}

#[test]
fn without_a_delay_requests_fail_until_the_server_is_back() {
    needs!("nbdkit", "qemu-io");
    let scratch = Scratch::in_memory();
    let socket = scratch.path("in.sock");
    let server = Server::nbdkit(&socket, &["memory", "size=1M"]);
    let passing = Passing::start(&scratch, &socket, "");
    let read = || run("qemu-io", &["-f", "raw", "-c", "read 0 4k", &passing.uri]);
    assert!(read().success());
    drop(server);
    assert!(!read().success());
    let _ = fs::remove_file(&socket);
    let _server = Server::nbdkit(&socket, &["memory", "size=1M"]);
    eventually("the server is found again", 30, || read().success());
    passing.daemon.stop();
}

#[test]
fn opening_waits_as_long_as_it_is_told() {
    needs!("nbdkit", "nbdinfo");
    let scratch = Scratch::in_memory();
    let socket = scratch.path("in.sock");
    let blockdev = format!(
        "driver=nbd,node-name=disk,server.type=unix,server.path={}",
        socket.display()
    );
    let ended = run_to_end(&scratch, &["--blockdev", &blockdev]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains(&format!(
            "Failed to connect to '{}': No such file or directory",
            socket.display()
        )),
        "{}",
        ended.stderr
    );
    let later = socket.clone();
    let starting = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        Server::nbdkit(&later, &["memory", "size=1M"])
    });
    let passing = Passing::start(&scratch, &socket, ",open-timeout=30");
    assert_eq!(
        run_ok("nbdinfo", &["--size", &passing.uri]).trim(),
        "1048576"
    );
    passing.daemon.stop();
    drop(starting.join().unwrap());
}

#[test]
fn what_cannot_be_had_is_said() {
    needs!("qemu-nbd", "nbdkit");
    let scratch = Scratch::in_memory();
    let socket = scratch.path("in.sock");
    let raw = scratch.file("raw", &vec![0; MIB]);
    let args = [
        "--persistent",
        "--shared=0",
        "--format=raw",
        "--read-only",
        "--export-name=x",
        "--socket",
        socket.to_str().unwrap(),
        raw.to_str().unwrap(),
    ];
    let _server = Server::start("qemu-nbd", &args, &socket);
    let blockdev = format!(
        "driver=nbd,node-name=disk,server.type=unix,server.path={}",
        socket.display()
    );
    for (options, message) in [
        ("", "Requested export not available"),
        (
            ",export=x",
            "request on write denied without write permission",
        ),
        (
            ",export=x,read-only=on,x-dirty-bitmap=qemu:dirty-bitmap:b",
            "requested x-dirty-bitmap qemu:dirty-bitmap:b not found",
        ),
        (",export=x,tls-creds=t", "No TLS credentials with id 't'"),
        (
            ",export=x,tls-hostname=h",
            "Parameter 'tls-hostname' has no effect without 'tls-creds'",
        ),
        (
            ",export=x,connections=0",
            "Parameter 'connections' expects a value of at least 1",
        ),
    ] {
        let ended = run_to_end(&scratch, &["--blockdev", &format!("{blockdev}{options}")]);
        assert_eq!(ended.code, Some(1), "{options}");
        assert!(
            ended.stderr.contains(message),
            "{options}: {}",
            ended.stderr
        );
    }
}

/// A server in the clear greets; what comes after is `after`.
fn false_server(socket: PathBuf, after: Vec<u8>, hold: Duration) {
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().take(3) {
            let mut stream = stream.unwrap();
            let _ = stream.write_all(&after);
            stream.set_read_timeout(Some(hold)).unwrap();
            while stream.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
        }
    });
}

#[test]
fn false_servers_do_no_harm() {
    let scratch = Scratch::in_memory();
    let mut good = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let greeting = good.clone();
    // A reply to another option; one that is endless; one with a bad magic.
    good.extend(0x0003_e889_0455_65a9_u64.to_be_bytes());
    let mut endless = good.clone();
    endless.extend(11_u32.to_be_bytes());
    endless.extend(1_u32.to_be_bytes());
    endless.extend(u32::MAX.to_be_bytes());
    let mut other = good.clone();
    other.extend(99_u32.to_be_bytes());
    other.extend([0; 8]);
    let cases = [
        (
            b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(),
            "Bad initial magic received",
        ),
        (
            b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0".to_vec(),
            "Bad server magic received",
        ),
        (b"NBDMAGICIHAVEOPT\0\0".to_vec(), "fixed newstyle handshake"),
        (endless, "too long"),
        (other, "Unexpected option reply"),
        (
            greeting[..10].to_vec(),
            "Failed to read from the NBD server",
        ),
        (Vec::new(), "Failed to read from the NBD server"),
    ];
    for (number, (after, message)) in cases.into_iter().enumerate() {
        let socket = scratch.path(&format!("{number}.sock"));
        false_server(socket.clone(), after, Duration::from_millis(300));
        let blockdev = format!(
            "driver=nbd,node-name=disk,server.type=unix,server.path={}",
            socket.display()
        );
        let ended = run_to_end(&scratch, &["--blockdev", &blockdev]);
        assert_eq!(ended.code, Some(1), "case {number}");
        assert!(
            ended.stderr.contains(message),
            "case {number}: {}",
            ended.stderr
        );
    }
}

#[test]
fn tls_with_our_own_server_and_nbdkit() {
    needs!("nbdkit", "nbdcopy");
    let scratch = Scratch::in_memory();
    let keys = scratch.file("keys.psk", b"alice:000102030405060708090a0b0c0d0e0f\n");
    let socket = scratch.path("in.sock");
    let size = format!("size={BYTES}");
    let psk = format!("--tls-psk={}", keys.display());
    let _server = Server::nbdkit(&socket, &["--tls=require", &psk, "memory", &size]);
    let object = format!(
        "tls-creds-psk,id=tls,endpoint=client,username=alice,dir={}",
        scratch.dir().display()
    );
    let plain = format!(
        "driver=nbd,node-name=disk,server.type=unix,server.path={}",
        socket.display()
    );
    let ended = run_to_end(&scratch, &["--blockdev", &plain]);
    assert!(
        ended.stderr.contains("server requires TLS"),
        "{}",
        ended.stderr
    );
    let passing = Passing::start_with(
        &scratch,
        &["--object".to_owned(), object],
        &socket,
        ",tls-creds=tls",
    );
    passing.assert_carries(&scratch, &content(20));
    passing.daemon.stop();
}

#[test]
fn image_and_backing_file_on_servers() {
    needs!("qemu-img", "qemu-nbd", "nbdcopy");
    let scratch = Scratch::in_memory();
    let base = scratch.path("base.qcow2");
    qemu::create(&base, BYTES as u64, "");
    qemu::io(&base, "qcow2", &["write -P 7 1M 3M".to_owned()]);
    let socket = scratch.path("in.sock");
    let args = [
        "--persistent",
        "--shared=0",
        "--format=qcow2",
        "--read-only",
        "--socket",
        socket.to_str().unwrap(),
        base.to_str().unwrap(),
    ];
    let _server = Server::start("qemu-nbd", &args, &socket);
    let top = scratch.path("top.qcow2");
    let name = format!("nbd+unix:///?socket={}", socket.display());
    let create = [
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        &name,
        top.to_str().unwrap(),
        "32M",
    ];
    qemu::img(&create);
    qemu::io(&top, "qcow2", &["write -P 9 2M 1M".to_owned()]);
    let mut wanted = vec![0; BYTES];
    wanted[MIB..4 * MIB].fill(7);
    wanted[2 * MIB..3 * MIB].fill(9);
    let out = scratch.path("out.sock");
    let daemon = Daemon::start(
        &scratch,
        &[
            "--blockdev".to_owned(),
            format!(
                "driver=qcow2,node-name=disk,file.driver=file,file.filename={}",
                top.display()
            ),
            "--nbd-server".to_owned(),
            format!("addr.type=unix,addr.path={}", out.display()),
            "--export".to_owned(),
            "nbd,id=e,node-name=disk,name=".to_owned(),
            "--chardev".to_owned(),
            "socket,id=qmp,path=qmp.sock,server=on,wait=off".to_owned(),
            "--monitor".to_owned(),
            "chardev=qmp".to_owned(),
        ],
    );
    let target = scratch.path("target");
    run_ok(
        "nbdcopy",
        &[
            &format!("nbd+unix:///?socket={}", out.display()),
            target.to_str().unwrap(),
        ],
    );
    assert_same("the copy", &fs::read(&target).unwrap(), &wanted);
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    let nodes = qmp.execute("query-named-block-nodes", json!({}));
    let nodes = nodes.as_array().unwrap();
    let server = nodes.iter().find(|node| node["drv"] == "nbd").unwrap();
    assert_eq!(
        server["file"],
        format!("nbd+unix:///?socket={}", socket.display())
    );
    daemon.quit(&mut qmp);
}
