//! nbdkit in the moods that its filters give it.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;

use super::{BYTES, Passing, Server, content};
use crate::needs;
use crate::support::daemon::Daemon;
use crate::support::pki::Pki;
use crate::support::run::{limited, run, run_ok};
use crate::support::{Qmp, Scratch, eventually};

/// The server goes when its last client has taken leave: so all connections have.
#[test]
fn node_that_is_removed_takes_leave_on_every_connection() {
    needs!("nbdkit", "nbdcopy");
    let scratch = Scratch::in_memory();
    let socket = scratch.path("in.sock");
    let pid_file = scratch.path("nbdkit.pid");
    let size = format!("size={BYTES}");
    let mut child = limited("nbdkit")
        .args([
            "--foreground",
            "--unix",
            socket.to_str().unwrap(),
            "--pidfile",
            pid_file.to_str().unwrap(),
        ])
        .args(["--filter=exitlast", "memory", &size])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the server listens", 30, || pid_file.exists());
    let passing = Passing::start(&scratch, &socket, ",connections=4");
    passing.assert_carries(&scratch, &content(40));
    assert!(child.try_wait().unwrap().is_none());
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    qmp.execute("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.execute("blockdev-del", json!({"node-name": "disk"}));
    assert!(child.wait().unwrap().success());
    passing.daemon.quit(&mut qmp);
}

/// Who speaks no TLS gets another disk.
#[test]
fn server_that_shows_the_disk_only_over_tls() {
    needs!("nbdkit", "nbdcopy", "nbdinfo");
    let scratch = Scratch::in_memory();
    let keys = scratch.file("keys.psk", b"alice:000102030405060708090a0b0c0d0e0f\n");
    let socket = scratch.path("in.sock");
    let (size, psk) = (
        format!("size={BYTES}"),
        format!("--tls-psk={}", keys.display()),
    );
    let _server = Server::nbdkit(
        &socket,
        &["--tls=on", &psk, "--filter=tls-fallback", "memory", &size],
    );
    let daemon = Daemon::start(
        &scratch,
        &[
            "--blockdev",
            &format!(
                "driver=nbd,node-name=disk,read-only=on,server.type=unix,server.path={}",
                socket.display()
            ),
            "--nbd-server",
            "addr.type=unix,addr.path=plain.sock",
            "--export",
            "nbd,id=e,node-name=disk,name=",
        ],
    );
    let copy = scratch.path("copy");
    let uri = format!(
        "nbd+unix:///?socket={}",
        scratch.path("plain.sock").display()
    );
    run_ok("nbdcopy", &[&uri, copy.to_str().unwrap()]);
    let text = fs::read(&copy).unwrap();
    assert_eq!(text.len(), 512);
    assert!(text.starts_with(b"This NBD server requires TLS"));
    daemon.stop();
    let object = format!(
        "tls-creds-psk,id=tls,endpoint=client,username=alice,dir={}",
        scratch.dir().display()
    );
    let passing = Passing::start_with(
        &scratch,
        &["--object".to_owned(), object],
        &socket,
        ",tls-creds=tls",
    );
    passing.assert_carries(&scratch, &content(41));
    passing.daemon.stop();
}

/// Errors now and then, and slow replies in any order.
#[test]
fn other_filters() {
    needs!("nbdkit", "nbdcopy");
    let scratch = Scratch::in_memory();
    let size = format!("size={BYTES}");
    for (number, filters) in [
        // Errors that the client makes good by asking again are nbdkit's own to mend.
        vec![
            "--filter=retry-request",
            "--filter=error",
            "memory",
            &size,
            "error-rate=1%",
            "retry-request-retries=50",
            "retry-request-delay=1",
        ],
        vec!["--filter=noextents", "memory", &size],
        vec!["--filter=nozero", "memory", &size, "zeromode=emulate"],
        vec!["--filter=nozero", "memory", &size, "zeromode=notrim"],
        vec![
            "--filter=blocksize-policy",
            "memory",
            &size,
            "blocksize-minimum=512",
            "blocksize-error-policy=error",
        ],
        vec!["--filter=checkwrite", "pattern", &size],
        vec!["--filter=noparallel", "memory", &size],
        vec!["--filter=truncate", "memory", "size=40M", "truncate=32M"],
    ]
    .into_iter()
    .enumerate()
    {
        let socket = scratch.path(&format!("{number}.sock"));
        let _server = Server::nbdkit(&socket, &filters);
        let passing = Passing::start(&scratch, &socket, "");
        if filters.contains(&"--filter=checkwrite") {
            // It takes only what it has, so it must have come as it was read.
            let copy = scratch.path("copy");
            run_ok("nbdcopy", &[&passing.uri, copy.to_str().unwrap()]);
            run_ok("nbdcopy", &[copy.to_str().unwrap(), &passing.uri]);
            let wrong = scratch.file("wrong", &vec![1; BYTES]);
            assert!(!run("nbdcopy", &[wrong.to_str().unwrap(), &passing.uri]).success());
        } else {
            passing.assert_carries(&scratch, &content(50 + number as u64));
        }
        passing.daemon.stop();
    }
}

/// The server's certificate is for `localhost`: who knows it by another name says so.
#[test]
fn certificate_is_for_the_name_that_was_asked_for() {
    needs!("nbdkit", "nbdcopy", "certtool");
    let scratch = Scratch::in_memory();
    let pki = Pki::new(&scratch);
    let dir = pki.directory("creds", "ca", "expiration_days = 1");
    let socket = scratch.path("in.sock");
    let (size, certificates) = (
        format!("size={BYTES}"),
        format!("--tls-certificates={}", dir.display()),
    );
    let _server = Server::nbdkit(
        &socket,
        &[
            "--tls=require",
            "--tls-verify-peer",
            &certificates,
            "memory",
            &size,
        ],
    );
    let object = format!(
        "tls-creds-x509,id=tls,endpoint=client,dir={}",
        dir.display()
    );
    let blockdev = format!(
        "driver=nbd,node-name=disk,tls-creds=tls,server.type=unix,server.path={}",
        socket.display()
    );
    for (hostname, message) in [
        ("", "No hostname for certificate validation"),
        (
            ",tls-hostname=elsewhere.example.org",
            "Certificate does not match the hostname elsewhere.example.org",
        ),
    ] {
        let args = [
            "--object",
            &object,
            "--blockdev",
            &format!("{blockdev}{hostname}"),
        ];
        let ended = crate::support::daemon::run_to_end(&scratch, &args);
        assert_eq!(ended.code, Some(1));
        assert!(ended.stderr.contains(message), "{}", ended.stderr);
    }
    let before = ["--object".to_owned(), object];
    let passing = Passing::start_with(
        &scratch,
        &before,
        &socket,
        ",tls-creds=tls,tls-hostname=localhost",
    );
    passing.assert_carries(&scratch, &content(60));
    passing.daemon.stop();
}

/// Requests wait for `reconnect-delay`, and not longer.
#[test]
fn requests_wait_as_long_as_they_are_told() {
    needs!("nbdkit", "qemu-io");
    let scratch = Scratch::in_memory();
    let socket = scratch.path("in.sock");
    let server = Server::nbdkit(&socket, &["memory", "size=1M"]);
    let passing = Passing::start(&scratch, &socket, ",reconnect-delay=2");
    let read = || run("qemu-io", &["-f", "raw", "-c", "read 0 4k", &passing.uri]);
    assert!(read().success());
    drop(server);
    let begun = std::time::Instant::now();
    assert!(!read().success());
    let waited = begun.elapsed();
    assert!(
        waited > Duration::from_millis(1500) && waited < Duration::from_secs(30),
        "{waited:?}"
    );
    // The delay counts from the loss on: later requests fail at once.
    let begun = std::time::Instant::now();
    assert!(!read().success());
    assert!(
        begun.elapsed() < Duration::from_millis(1900),
        "{:?}",
        begun.elapsed()
    );
    let _ = fs::remove_file(&socket);
    let _server = Server::nbdkit(&socket, &["memory", "size=1M"]);
    eventually("the server is found again", 30, || read().success());
    passing.daemon.stop();
}
