//! Programs of others that speak QMP: libraries, shells and plain pipes find the monitor that they know.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::needs;
use crate::support::daemon::Daemon;
use crate::support::prerequisites::{python_with_qmp, skip};
use crate::support::run::limited;
use crate::support::{Scratch, eventually, qemu};

fn start(scratch: &Scratch) -> Daemon {
    let socket = "socket,id=c,path=qmp.sock,server=on,wait=off";
    Daemon::start(scratch, &["--chardev", socket, "--monitor", "c"])
}

/// The package that Python programs use to talk to QEMU.
#[test]
fn python_client() {
    needs!(root, "qemu-img");
    let Some(python) = python_with_qmp() else {
        skip("no Python with the package qemu.qmp: run scripts/setup test");
        return;
    };
    let scratch = Scratch::new();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, 8 << 20, "");
    let mount = scratch.empty_file("mnt");
    let mut daemon = start(&scratch);
    let ended = limited(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qmp_client.py"))
        .args([&scratch.path("qmp.sock"), &image, &mount])
        .output()
        .unwrap();
    assert!(
        ended.status.success(),
        "{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    let seen: Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!(seen["greeting"], true);
    assert_eq!(seen["size"], 8 << 20);
    assert_eq!(seen["exports"][0]["id"], "export");
    assert_eq!(
        seen["error"],
        json!(["GenericError", "Node disk is in use"])
    );
    assert_eq!(seen["crowd"], 50);
    assert_eq!(seen["event"], json!({"id": "export"}));
    daemon.assert_ends_well();
    assert!(qemu::content(&scratch, &image, "qcow2").starts_with(b"written by a Python client"));
    qemu::assert_clean(&image);
}

/// What a program says that is given these lines as its input.
#[track_caller]
fn said(mut command: Command, scratch: &Scratch, lines: &str) -> String {
    let mut child = command
        .current_dir(scratch.dir())
        .env("HOME", scratch.dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(lines.as_bytes()).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The shell that people use with QEMU.
#[test]
fn shell_of_qemu() {
    let Some(python) = python_with_qmp() else {
        skip("no Python with the package qemu.qmp: run scripts/setup test");
        return;
    };
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    let mut shell = limited(python.with_file_name("qmp-shell"));
    shell.args(["--pretty", "qmp.sock"]);
    let text = said(
        shell,
        &scratch,
        "blockdev-add driver=null-co node-name=disk size=512\n\
         blockdev-del node-name=none\n\
         query-named-block-nodes flat=true\n",
    );
    assert!(text.contains("Connected to QEMU"), "{text}");
    assert!(
        text.contains("\"desc\": \"Failed to find node with node-name='none'\""),
        "{text}"
    );
    assert!(text.contains("\"virtual-size\": 512"), "{text}");
    daemon.stop();
}

/// The same with windows.
#[test]
fn terminal_client_of_qemu() {
    let has_windows = |python: &std::path::PathBuf| {
        let import = ["-c", "import urwid, urwid_readline, pygments"];
        let imported = limited(python).args(import).stderr(Stdio::null()).status();
        imported.is_ok_and(|status| status.success())
    };
    let Some(python) = python_with_qmp().filter(has_windows) else {
        skip("no Python with the package qemu.qmp[tui]: run scripts/setup test");
        return;
    };
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    let size = nix::pty::Winsize {
        ws_row: 50,
        ws_col: 150,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let terminal = nix::pty::openpty(&size, None).unwrap();
    let slave = || Stdio::from(terminal.slave.try_clone().unwrap());
    let mut client = limited(python.with_file_name("qmp-tui"));
    client
        .arg("qmp.sock")
        .current_dir(scratch.dir())
        .env("TERM", "xterm");
    let mut child = client
        .stdin(slave())
        .stdout(slave())
        .stderr(slave())
        .spawn()
        .unwrap();
    let mut keys = fs::File::from(terminal.master);
    let mut screen = keys.try_clone().unwrap();
    let (sender, shown) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = screen.read(&mut piece) {
            let text = String::from_utf8_lossy(&piece[..count]).into_owned();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    let mut text = String::new();
    let mut pressed = Instant::now();
    eventually("connected and negotiated", 60, || {
        text.extend(shown.try_iter());
        // It paints what came in the meantime when a key is pressed; this one does nothing else.
        if pressed.elapsed() > Duration::from_millis(300) {
            keys.write_all(b"\x1b[C").unwrap();
            pressed = Instant::now();
        }
        text.contains("Connected")
    });
    assert!(text.contains("qmp_capabilities"), "{text}");
    child.kill().unwrap();
    child.wait().unwrap();
    // The terminal must not be gone before its user is.
    drop(terminal.slave);
    daemon.stop();
}

#[test]
fn socat_as_a_client() {
    needs!("socat");
    let scratch = Scratch::new();
    let mut daemon = start(&scratch);
    let mut client = limited("socat");
    client.args(["-t60", "-", "UNIX-CONNECT:qmp.sock"]);
    let text = said(
        client,
        &scratch,
        "{\"execute\": \"qmp_capabilities\"}\n{\"execute\": \"quit\"}\n",
    );
    assert_eq!(text.matches("{\"return\": {}}").count(), 2, "{text}");
    daemon.assert_ends_well();
}

/// As libvirt does it: takes the input apart at CR LF, numbers its requests, and asks for the schema before anything else.
#[test]
fn client_in_the_manner_of_libvirt() {
    let scratch = Scratch::new();
    scratch.file("disk.raw", &[0; 4096]);
    let mut daemon = start(&scratch);
    let stream = UnixStream::connect(scratch.path("qmp.sock")).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut pending = Vec::new();
    let mut line = || {
        let end = loop {
            let found = pending.windows(2).position(|pair| pair == b"\r\n");
            if let Some(end) = found {
                break end;
            }
            let mut piece = [0; 1024];
            let count = (&stream).read(&mut piece).unwrap();
            assert_ne!(count, 0);
            pending.extend_from_slice(&piece[..count]);
        };
        let line: Vec<u8> = pending.drain(..end + 2).collect();
        serde_json::from_slice::<Value>(&line).unwrap()
    };
    assert!(line()["QMP"]["version"]["qemu"]["major"].is_u64());
    let path = scratch.path("disk.raw");
    let requests = [
        ("qmp_capabilities", None),
        ("query-version", None),
        ("query-commands", None),
        ("query-qmp-schema", None),
        (
            "object-add",
            Some(
                json!({"qom-type": "secret", "id": "masterKey0", "format": "base64", "data": "c2VjcmV0"}),
            ),
        ),
        (
            "blockdev-add",
            Some(
                json!({"driver": "file", "filename": path, "node-name": "libvirt-1-storage", "auto-read-only": true,
                "discard": "unmap", "cache": {"direct": false, "no-flush": false}}),
            ),
        ),
        (
            "blockdev-add",
            Some(
                json!({"node-name": "libvirt-1-format", "read-only": false, "driver": "raw",
                "file": "libvirt-1-storage"}),
            ),
        ),
        ("query-named-block-nodes", Some(json!({"flat": true}))),
        (
            "blockdev-del",
            Some(json!({"node-name": "libvirt-1-format"})),
        ),
        ("quit", None),
    ];
    for (number, (command, arguments)) in (1..).zip(requests) {
        let id = format!("libvirt-{number}");
        let mut request = json!({"execute": command, "id": id});
        if let Some(arguments) = arguments {
            request["arguments"] = arguments;
        }
        writeln!(&stream, "{request}").unwrap();
        let mut reply = line();
        while reply.get("event").is_some() {
            reply = line();
        }
        assert_eq!(reply["id"], json!(id), "{command}");
        assert!(reply.get("return").is_some(), "{command}: {reply}");
    }
    daemon.assert_ends_well();
}
