//! Clients of the QMP socket, well behaved and not: the daemon answers each as QEMU's does and outlives them all.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::needs;
use crate::support::daemon::{Daemon, is_qemu, program};
use crate::support::{Qmp, Scratch, eventually, mounts};

const SOCKET: [&str; 4] = [
    "--chardev",
    "socket,id=c,path=qmp.sock,server=on,wait=off",
    "--monitor",
    "chardev=c,mode=control",
];

fn start(scratch: &Scratch) -> Daemon {
    Daemon::start(scratch, &SOCKET)
}

#[test]
fn greeting_and_negotiation() {
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    let mut qmp = Qmp::connect_raw(&scratch.path("qmp.sock"));
    let version = &qmp.greeting["QMP"]["version"];
    for part in ["major", "minor", "micro"] {
        assert!(version["qemu"][part].is_u64(), "{}", qmp.greeting);
    }
    assert!(version["package"].is_string());
    assert!(qmp.greeting["QMP"]["capabilities"].is_array());

    let early = qmp.try_execute("query-version", json!({})).unwrap_err();
    assert_eq!(early.class, "CommandNotFound");
    assert_eq!(
        early.desc,
        "Expecting capabilities negotiation with 'qmp_capabilities'"
    );
    qmp.execute("qmp_capabilities", json!({}));
    let late = qmp.try_execute("qmp_capabilities", json!({})).unwrap_err();
    assert_eq!(late.class, "CommandNotFound");
    assert_eq!(
        late.desc,
        "Capabilities negotiation is already complete, command ignored"
    );
    assert_eq!(
        qmp.execute("query-version", json!({}))["qemu"],
        version_of(&qmp.greeting)
    );
    let unknown = qmp.try_execute("no-such-command", json!({})).unwrap_err();
    assert_eq!(unknown.class, "CommandNotFound");
    assert_eq!(
        unknown.desc,
        "The command no-such-command has not been found"
    );
    daemon.quit(&mut qmp);
    assert!(
        !scratch.path("qmp.sock").exists(),
        "the socket is removed at the end"
    );
}

fn version_of(greeting: &Value) -> Value {
    greeting["QMP"]["version"]["qemu"].clone()
}

#[test]
fn several_commands_in_one_write_are_answered_in_order() {
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    let mut qmp = Qmp::connect_raw(&scratch.path("qmp.sock"));
    qmp.send(
        b"{\"execute\":\"qmp_capabilities\",\"id\":1}{\"execute\":\"query-version\",\"id\":\"two\"}\n\n\
          {\"execute\":\"query-block-exports\",\"id\":{\"a\":[3]}} {\"execute\":\"bogus\",\"id\":null}",
    );
    assert_eq!(qmp.receive(), json!({"return": {}, "id": 1}));
    assert_eq!(qmp.receive()["id"], "two");
    assert_eq!(qmp.receive(), json!({"return": [], "id": {"a": [3]}}));
    assert_eq!(qmp.receive()["error"]["class"], "CommandNotFound");
    daemon.quit(&mut qmp);
}

#[test]
fn half_a_command_waits_for_its_other_half() {
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    for byte in b"{\"execute\": \"query-version\", \"id\": \"\\u00e9 \xc3\xa9\"}" {
        qmp.send(&[*byte]);
    }
    assert_eq!(qmp.receive()["id"], "é é");
    // A client that goes away in the middle of a command disturbs nobody.
    qmp.send(b"{\"execute\": \"que");
    drop(qmp);
    let mut next = Qmp::connect(&scratch.path("qmp.sock"));
    next.execute("query-version", json!({}));
    daemon.quit(&mut next);
}

#[test]
fn garbage_gets_errors_and_the_session_goes_on() {
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    let errors: &[(&[u8], &str)] = &[
        (b"garbage\n", "JSON parse error, invalid keyword 'garbage'"),
        (
            b"{\"execute\" \"query-version\"}\n",
            "JSON parse error, missing : in object pair",
        ),
        (b"}\n", "JSON parse error, expecting value"),
        (
            b"{\"execute\":\"query-version\",\"id\":12,}\n",
            "JSON parse error, expecting value",
        ),
        (
            b"{\"execute\":\"query-version\",\"id\":nul}\n",
            "JSON parse error, invalid keyword 'nul'",
        ),
        (
            b"{\"execute\":\"query-version\",\"id\":\"\xc3\"}\n",
            "JSON parse error, invalid UTF-8 sequence in string",
        ),
        (b"[]\n", "QMP input must be a JSON object"),
        (b"5\n", "QMP input must be a JSON object"),
        (b"\"x\"\n", "QMP input must be a JSON object"),
        (b"{}\n", "QMP input lacks member 'execute'"),
        (
            b"{\"execute\":5}\n",
            "QMP input member 'execute' must be a string",
        ),
        (
            b"{\"exec\":\"query-version\"}\n",
            "QMP input member 'exec' is unexpected",
        ),
        (
            b"{\"execute\":\"query-version\",\"extra\":1}\n",
            "QMP input member 'extra' is unexpected",
        ),
        (
            b"{\"execute\":\"query-version\",\"arguments\":[]}\n",
            "QMP input member 'arguments' must be an object",
        ),
        (
            b"{\"execute\":\"query-version\",\"arguments\":{\"x\":1}}\n",
            "Parameter 'x' is unexpected",
        ),
    ];
    for (input, message) in errors {
        qmp.send(input);
        let reply = qmp.receive();
        assert_eq!(reply["error"]["class"], "GenericError", "{reply}");
        assert_eq!(
            reply["error"]["desc"],
            *message,
            "{}",
            String::from_utf8_lossy(input)
        );
    }
    // Single quotes are QEMU's own extension, and the replies must not have fallen out of step.
    qmp.send(b"{'execute':'query-version','id':'still here'}\n");
    assert_eq!(qmp.receive()["id"], "still here");
    daemon.quit(&mut qmp);
}

#[test]
fn endless_garbage_is_bounded_and_ends_nothing() {
    if is_qemu() {
        return; // It chews on this for minutes.
    }
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    let before = daemon.memory_kib("VmRSS");
    for garbage in [
        &b"["[..],
        b"{\"a\":",
        b"\"",
        b"\x00",
        b"}",
        b"\xff",
        b"1",
        b"{\"execute\":\"",
    ] {
        let mut stream = UnixStream::connect(scratch.path("qmp.sock")).unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        // The daemon may stop reading or close the connection at any point: both are fine.
        let block = garbage.repeat(100_000);
        let mut reader = stream.try_clone().unwrap();
        let drain = std::thread::spawn(move || {
            let mut sink = vec![0; 1 << 16];
            while reader.read(&mut sink).is_ok_and(|count| count > 0) {}
        });
        for _ in 0..5 {
            if stream.write_all(&block).is_err() {
                break;
            }
        }
        let _ = stream.shutdown(Shutdown::Both);
        drain.join().unwrap();
    }
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    qmp.execute("query-version", json!({}));
    let grown = daemon.memory_kib("VmRSS").saturating_sub(before);
    assert!(grown < 100 << 10, "garbage left {grown} KiB behind");
    daemon.quit(&mut qmp);
}

#[test]
fn client_that_reads_nothing_does_not_stop_the_others() {
    let scratch = Scratch::new();
    let daemon = Daemon::start(
        &scratch,
        &[
            &SOCKET[..],
            &[
                "--chardev",
                "socket,id=d,path=other.sock,server=on,wait=off",
                "--monitor",
                "chardev=d",
            ],
        ]
        .concat(),
    );
    let deaf = UnixStream::connect(scratch.path("qmp.sock")).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let _ = (&deaf).write(b"{\"execute\":\"qmp_capabilities\"}\n");
    let question = b"{\"execute\":\"query-qmp-schema\"}\n".repeat(100);
    let _ = (&deaf).write(&question);
    let mut qmp = Qmp::connect(&scratch.path("other.sock"));
    for _ in 0..20 {
        qmp.execute("query-version", json!({}));
    }
    daemon.quit(&mut qmp);
    drop(deaf);
}

#[test]
fn connections_come_and_go() {
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    for _ in 0..50 {
        drop(UnixStream::connect(scratch.path("qmp.sock")).unwrap());
    }
    for _ in 0..5 {
        let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
        qmp.execute("query-version", json!({}));
    }
    daemon.stop();
}

#[test]
fn nodes_and_exports_by_command() {
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    let refuse = Qmp::refuse;
    let null = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20, "read-zeroes": true});
    assert_eq!(
        refuse(&mut qmp, "blockdev-add", json!({"driver": "null-co"})),
        "'node-name' must be specified for the root node"
    );
    qmp.execute("blockdev-add", null.clone());
    assert_eq!(
        refuse(&mut qmp, "blockdev-add", null),
        "Duplicate nodes with node-name='n'"
    );
    qmp.execute(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "file": "n"}),
    );
    assert_eq!(
        refuse(&mut qmp, "blockdev-del", json!({"node-name": "n"})),
        "Block device n is in use"
    );
    assert_eq!(
        refuse(&mut qmp, "blockdev-del", json!({"node-name": "none"})),
        "Failed to find node with node-name='none'"
    );
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true}));
    let node = nodes
        .as_array()
        .unwrap()
        .iter()
        .find(|node| node["node-name"] == "r")
        .unwrap();
    assert_eq!(node["drv"], "raw");
    assert_eq!(node["ro"], false);
    assert_eq!(node["image"]["virtual-size"], 1 << 20);
    assert_eq!(node["image"]["format"], "raw");
    assert_eq!(
        node["cache"],
        json!({"no-flush": false, "direct": false, "writeback": true})
    );

    let mount = scratch.empty_file("mnt");
    let export = json!({"type": "fuse", "id": "e", "node-name": "r", "mountpoint": "mnt"});
    qmp.execute("block-export-add", export.clone());
    assert_eq!(fs::metadata(&mount).unwrap().len(), 1 << 20);
    assert_eq!(
        qmp.execute("query-block-exports", json!({})),
        json!([{"node-name": "r", "shutting-down": false, "type": "fuse", "id": "e"}])
    );
    assert_eq!(
        refuse(&mut qmp, "block-export-add", export),
        "Block export id 'e' is already in use"
    );
    assert_eq!(
        refuse(&mut qmp, "blockdev-del", json!({"node-name": "r"})),
        "Node r is in use"
    );
    assert_eq!(
        refuse(
            &mut qmp,
            "block-export-del",
            json!({"id": "e", "mode": "bad"})
        ),
        "Parameter 'mode' does not accept value 'bad'"
    );
    assert_eq!(
        refuse(&mut qmp, "block-export-del", json!({"id": "none"})),
        "Export 'none' is not found"
    );
    qmp.execute("block-export-del", json!({"id": "e"}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    assert!(mounts::on(&mount).is_none());
    assert_eq!(qmp.execute("query-block-exports", json!({})), json!([]));

    let resize = |qmp: &mut Qmp, node: &str, size: i64| {
        refuse(
            qmp,
            "block_resize",
            json!({"node-name": node, "size": size}),
        )
    };
    assert_eq!(
        resize(&mut qmp, "r", -1),
        "Parameter 'size' expects a >0 size"
    );
    assert_eq!(
        resize(&mut qmp, "zz", 1),
        "Cannot find device='' nor node-name='zz'"
    );
    qmp.execute("blockdev-del", json!({"node-name": "r"}));
    qmp.execute("blockdev-del", json!({"node-name": "n"}));
    assert_eq!(qmp.execute("query-named-block-nodes", json!({})), json!([]));

    let thread = json!({"qom-type": "iothread", "id": "i0", "poll-max-ns": 1000});
    qmp.execute("object-add", thread.clone());
    assert_eq!(
        refuse(&mut qmp, "object-add", thread),
        "attempt to add duplicate property 'i0' to object (type 'container')"
    );
    qmp.execute("object-del", json!({"id": "i0"}));
    assert_eq!(
        refuse(&mut qmp, "object-del", json!({"id": "i0"})),
        "object 'i0' not found"
    );
    daemon.quit(&mut qmp);
}

#[test]
fn export_with_an_open_file_is_removed_hard_or_not_at_all() {
    needs!(root);
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    qmp.execute(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n", "size": 1 << 20}),
    );
    let mount = scratch.empty_file("mnt");
    qmp.execute(
        "block-export-add",
        json!({"type": "fuse", "id": "e", "node-name": "n", "mountpoint": "mnt"}),
    );
    let file = fs::File::open(&mount).unwrap();
    qmp.execute("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    assert!(mounts::on(&mount).is_none());
    drop(file);
    daemon.quit(&mut qmp);
}

#[test]
fn schema_lists_what_there_is() {
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    let commands = qmp.execute("query-commands", json!({}));
    let mut commands: Vec<&str> = commands
        .as_array()
        .unwrap()
        .iter()
        .map(|command| command["name"].as_str().unwrap())
        .collect();
    commands.sort_unstable();
    for wanted in [
        "block-export-add",
        "block-export-del",
        "block_resize",
        "blockdev-add",
        "blockdev-del",
        "object-add",
        "object-del",
        "qmp_capabilities",
        "query-block-exports",
        "query-commands",
        "query-named-block-nodes",
        "query-qmp-schema",
        "query-version",
        "quit",
    ] {
        assert!(
            commands.contains(&wanted),
            "{wanted} is missing from {commands:?}"
        );
    }
    let schema = qmp.execute("query-qmp-schema", json!({}));
    let of_kind = |kind: &str| {
        let entries = schema.as_array().unwrap().iter();
        let mut names: Vec<&str> = entries
            .filter(|entry| entry["meta-type"] == kind)
            .map(|entry| entry["name"].as_str().unwrap())
            .collect();
        names.sort_unstable();
        names
    };
    assert_eq!(
        of_kind("command"),
        commands,
        "the schema and query-commands agree"
    );
    assert!(of_kind("event").contains(&"BLOCK_EXPORT_DELETED"));
    daemon.quit(&mut qmp);
}

#[test]
fn monitor_on_standard_input_and_output() {
    let scratch = Scratch::new();
    let mut child = Command::new(program())
        .args(["--chardev", "stdio,id=s", "--monitor", "s"])
        .current_dir(scratch.dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input
        .write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n")
        .unwrap();
    let mut output = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut output)
        .unwrap();
    eventually("the daemon ends", 30, || {
        child.try_wait().unwrap().is_some()
    });
    assert!(child.wait().unwrap().success());
    assert!(output.starts_with("{\"QMP\""), "{output}");
    assert_eq!(
        output
            .lines()
            .filter(|line| *line == "{\"return\": {}}")
            .count(),
        2,
        "{output}"
    );
}

#[test]
fn pretty_monitor_prints_over_several_lines() {
    let scratch = Scratch::new();
    let daemon = Daemon::start(
        &scratch,
        &[
            "--chardev",
            "socket,id=c,path=qmp.sock,server=on,wait=off",
            "--monitor",
            "chardev=c,pretty=on",
        ],
    );
    let mut stream = UnixStream::connect(scratch.path("qmp.sock")).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let mut text = Vec::new();
    let mut piece = [0; 4096];
    while serde_json::from_slice::<Value>(&text).is_err() {
        let count = stream.read(&mut piece).unwrap();
        assert_ne!(count, 0);
        text.extend_from_slice(&piece[..count]);
    }
    let text = String::from_utf8(text).unwrap().replace('\r', "");
    assert!(text.starts_with("{\n    \"QMP\": {\n"), "{text}");
    daemon.stop();
}

#[test]
fn monitor_over_tcp() {
    let scratch = Scratch::new();
    // The kernel picks a port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let chardev = format!("socket,id=c,host=127.0.0.1,port={port},server=on,wait=off");
    let daemon = Daemon::start(&scratch, &["--chardev", &chardev, "--monitor", "c"]);
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream
        .write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}")
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("{\"return\": {}}").count(), 2, "{text}");
    let mut daemon = daemon;
    daemon.assert_ends_well();
}

#[test]
fn monitor_that_connects_to_its_client() {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.path("client.sock")).unwrap();
    let mut daemon = Daemon::start(
        &scratch,
        &[
            "--chardev",
            "socket,id=c,path=client.sock",
            "--monitor",
            "c",
        ],
    );
    let (mut stream, _) = listener.accept().unwrap();
    stream
        .write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}")
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("{\"QMP\""), "{text}");
    daemon.assert_ends_well();
}

/// With `wait=on` the daemon goes on starting only once a client is there.
#[test]
fn server_socket_that_waits() {
    let scratch = Scratch::new();
    let scratch_dir = scratch.dir().to_owned();
    let client = std::thread::spawn(move || {
        let socket = scratch_dir.join("qmp.sock");
        let mut stream = None;
        eventually("the socket listens", 30, || {
            stream = UnixStream::connect(&socket).ok();
            stream.is_some()
        });
        assert!(!scratch_dir.join("daemon.done").exists());
        stream
    });
    let daemon = Daemon::start(
        &scratch,
        &[
            "--chardev",
            "socket,id=c,path=qmp.sock,server=on,wait=on",
            "--monitor",
            "c",
        ],
    );
    let stream = client.join().unwrap();
    assert!(stream.is_some());
    daemon.stop();
}

/// `add-fd` is no command of a storage daemon, so that no set of descriptors can be there.
#[test]
fn names_of_descriptor_sets_lead_nowhere() {
    let scratch = Scratch::new();
    let daemon = start(&scratch);
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    let chardev = |kind: &str, member: &str, path: &str| {
        let backend = json!({"type": kind, "data": {member: path}});
        ("chardev-add", json!({"id": "x", "backend": backend}))
    };
    let node = |driver: &str, path: &str| {
        let node = json!({"driver": driver, "node-name": "x", "filename": path});
        ("blockdev-add", node)
    };
    let unopenable = "Could not open '/dev/fdset/1': Function not implemented";
    let invalid = "Could not open '/dev/fdset/x': Invalid argument";
    for ((command, arguments), message) in [
        (node("file", "/dev/fdset/1"), unopenable),
        (node("host_device", "/dev/fdset/1"), unopenable),
        (
            node("file", "/dev/fdset/x"),
            "Could not parse fdset /dev/fdset/x",
        ),
        (chardev("file", "out", "/dev/fdset/1"), unopenable),
        (chardev("file", "out", "/dev/fdset/x"), invalid),
        (chardev("pipe", "device", "/dev/fdset/1"), unopenable),
        (chardev("serial", "device", "/dev/fdset/1"), unopenable),
        (chardev("parallel", "device", "/dev/fdset/x"), invalid),
    ] {
        let refused = qmp.refuse(command, arguments.clone());
        // Character devices say whose error it is.
        let refused = refused.trim_start_matches("Failed to add chardev 'x': ");
        assert_eq!(refused, message, "{command} {arguments}");
    }
    daemon.quit(&mut qmp);
}
