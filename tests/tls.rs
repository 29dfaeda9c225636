//! TLS and WebSocket on sockets, with the peers that people have: OpenSSL's and GnuTLS's own clients, Python's, and QEMU's
//! daemon.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::needs;
use crate::support::daemon::{Daemon, is_qemu, run_to_end};
use crate::support::pki::{NAME, Pki};
use crate::support::prerequisites::{python_with_qmp, skip};
use crate::support::run::limited;
use crate::support::{Qmp, Scratch};

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// A daemon whose monitor is on a TCP socket with these options.
fn monitor(scratch: &Scratch, objects: &[&str], options: &str) -> (Daemon, u16) {
    let port = free_port();
    let chardev = format!("socket,id=c,host=127.0.0.1,port={port},server=on,wait=off,{options}");
    let mut args: Vec<&str> = Vec::new();
    for object in objects {
        args.extend(["--object", object]);
    }
    args.extend(["--chardev", &chardev, "--monitor", "c"]);
    (Daemon::start(scratch, &args), port)
}

/// What the Python client says came of it.
fn python(port: u16, dir: &Path, kind: &str, hostname: &str) -> Value {
    let program = python_with_qmp().unwrap_or_else(|| "python3".into());
    let ended = limited(program)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls_client.py"))
        .args([&port.to_string(), dir.to_str().unwrap(), kind, hostname])
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&ended.stderr);
    serde_json::from_slice(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {shown}"))
}

fn is_refused(result: &Value, reason: &str) -> bool {
    let error = result["error"].as_str();
    error.is_some_and(|error| error.contains(reason))
}

fn conversation(protocol: &str) -> Value {
    json!({"greeting": true, "version": true, "protocol": protocol})
}

#[test]
fn certificates_decide_who_comes_in() {
    needs!("certtool", "python3");
    let scratch = Scratch::new();
    let pki = Pki::new(&scratch);
    let good = pki.directory("good", "ca", "expiration_days = 1");
    pki.authority("other");
    let stranger = pki.directory("stranger", "other", "expiration_days = 1");
    fs::copy(good.join("ca-cert.pem"), stranger.join("ca-cert.pem")).unwrap();
    let past = "activation_date = 2020-01-01\nexpiration_date = 2021-01-01";
    let expired = pki.directory("expired", "ca", past);
    let nameless = scratch.path("nameless");
    fs::create_dir(&nameless).unwrap();
    fs::copy(good.join("ca-cert.pem"), nameless.join("ca-cert.pem")).unwrap();

    let credentials = "tls-creds-x509,id=tls,dir=good,endpoint=server";
    let (daemon, port) = monitor(&scratch, &[credentials], "tls-creds=tls");
    for _ in 0..2 {
        assert_eq!(
            python(port, &good, "plain", "localhost"),
            conversation("TLSv1.3")
        );
    }
    for dir in [&stranger, &expired, &nameless] {
        let result = python(port, dir, "plain", "localhost");
        assert!(result["error"].is_string(), "{result}");
    }
    let result = python(port, &good, "plain", "example.org");
    assert!(is_refused(&result, "certificate"), "{result}");
    assert_eq!(
        python(port, &good, "plain", "127.0.0.1"),
        conversation("TLSv1.3")
    );
    daemon.stop();

    let credentials = "tls-creds-x509,id=tls,dir=good,endpoint=server,verify-peer=no,\
        priority=NORMAL:-VERS-TLS1.3";
    let (daemon, port) = monitor(&scratch, &[credentials], "tls-creds=tls");
    assert_eq!(
        python(port, &nameless, "plain", "localhost"),
        conversation("TLSv1.2")
    );
    daemon.stop();

    let server = expired.join("server-cert.pem");
    let ended = run_to_end(
        &scratch,
        &[
            "--object",
            &format!(
                "tls-creds-x509,id=tls,dir={},endpoint=server",
                expired.display()
            ),
        ],
    );
    assert_eq!(ended.code, Some(1));
    let reason = format!("The server certificate {} has expired", server.display());
    assert!(ended.stderr.contains(&reason), "{}", ended.stderr);
}

#[test]
fn rules_decide_who_comes_in() {
    needs!("certtool", "python3");
    let scratch = Scratch::new();
    let pki = Pki::new(&scratch);
    let good = pki.directory("good", "ca", "expiration_days = 1");
    let credentials = "tls-creds-x509,id=tls,dir=good,endpoint=server";
    let escaped = NAME.replace(',', ",,");
    for (rule, is_let_in) in [
        (format!("authz-simple,id=rule,identity={escaped}"), true),
        ("authz-simple,id=rule,identity=CN=localhost".to_owned(), false),
        (
            "authz-list,id=rule,policy=deny,rules.0.match=*CN=localhost,rules.0.policy=allow,rules.0.format=glob"
                .to_owned(),
            true,
        ),
        ("authz-simple,id=another,identity=x".to_owned(), false),
    ] {
        let options = "tls-creds=tls,tls-authz=rule";
        let (daemon, port) = monitor(&scratch, &[credentials, &rule], options);
        let result = python(port, &good, "plain", "localhost");
        assert_eq!(result["greeting"] == true, is_let_in, "{rule}: {result}");
        daemon.stop();
    }
}

/// Sends two commands through another program's TLS client, and gives all that it received.
fn through(program: &str, args: &[&str]) -> String {
    let mut child = limited(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut received = String::new();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    while lines.read_line(&mut received).unwrap() > 0 {
        if received.ends_with("\"capabilities\": [\"oob\"]}}\r\n")
            || received.ends_with("\"capabilities\": [\"oob\"]}}\n")
        {
            input
                .write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}\n")
                .unwrap();
        }
        if received.matches("{\"return\": {}}").count() == 2 {
            break;
        }
    }
    drop(input);
    let output = child.wait_with_output().unwrap();
    received + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn other_libraries_clients_speak_every_kind_of_credentials() {
    needs!("certtool", "gnutls-cli", "openssl");
    let scratch = Scratch::new();
    let pki = Pki::new(&scratch);
    let good = pki.directory("good", "ca", "expiration_days = 1");
    fs::write(
        scratch.path("good/keys.psk"),
        "fred:00112233445566778899aabbccddeeff\n",
    )
    .unwrap();
    let [ca, certificate, key] = ["ca-cert.pem", "client-cert.pem", "client-key.pem"]
        .map(|name| good.join(name).to_str().unwrap().to_owned());
    let x509 = "tls-creds-x509,id=tls,dir=good,endpoint=server";
    let psk = "tls-creds-psk,id=tls,dir=good,endpoint=server";
    let anonymous = "tls-creds-anon,id=tls,endpoint=server";
    let ours = "00112233445566778899aabbccddeeff";
    let [ca_, certificate_, key_] = [
        ("x509cafile", &ca),
        ("x509certfile", &certificate),
        ("x509keyfile", &key),
    ]
    .map(|(name, path)| format!("--{name}={path}"));
    let psk_key = format!("--pskkey={ours}");
    let openssl: &[(&str, &[&str])] = &[
        (
            x509,
            &[
                "-CAfile",
                &ca,
                "-cert",
                &certificate,
                "-key",
                &key,
                "-verify_return_error",
            ],
        ),
        (psk, &["-psk_identity", "fred", "-psk", ours]),
        (
            psk,
            &[
                "-psk_identity",
                "fred",
                "-psk",
                ours,
                "-tls1_2",
                "-cipher",
                "PSK",
            ],
        ),
        (anonymous, &["-cipher", "aNULL@SECLEVEL=0", "-tls1_2"]),
    ];
    for (object, args) in openssl {
        let (mut daemon, port) = monitor(&scratch, &[object], "tls-creds=tls");
        let place = format!("127.0.0.1:{port}");
        let mut all = vec!["s_client", "-quiet", "-connect", &place];
        all.extend(*args);
        let received = through("openssl", &all);
        assert_eq!(
            received.matches("{\"return\": {}}").count(),
            2,
            "{object}: {received}"
        );
        daemon.assert_ends_well();
    }
    let gnutls: &[(&str, &[&str])] = &[
        (
            x509,
            &[&ca_, &certificate_, &key_, "--verify-hostname=localhost"],
        ),
        (
            psk,
            &[
                "--pskusername=fred",
                &psk_key,
                "--priority=NORMAL:+ECDHE-PSK:+DHE-PSK:+PSK",
            ],
        ),
        // Its TLS 1.2 with pre-shared keys crashes it, whoever the server is.
        (anonymous, &["--priority=NORMAL:+ANON-DH:+ANON-ECDH"]),
    ];
    for (object, args) in gnutls {
        let (mut daemon, port) = monitor(&scratch, &[object], "tls-creds=tls");
        let port = format!("--port={port}");
        let mut all = vec!["127.0.0.1", &port];
        all.extend(*args);
        let received = through("gnutls-cli", &all);
        assert_eq!(
            received.matches("{\"return\": {}}").count(),
            2,
            "{object}: {received}"
        );
        daemon.assert_ends_well();
    }
}

/// QEMU's daemon connects to ours, and ours to QEMU's.
#[test]
fn daemons_of_both_makes_connect() {
    needs!("certtool", "qemu-storage-daemon");
    if is_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let pki = Pki::new(&scratch);
    pki.directory("good", "ca", "expiration_days = 1");
    fs::write(
        scratch.path("good/keys.psk"),
        "qemu:00112233445566778899aabbccddeeff\n",
    )
    .unwrap();
    for kind in ["x509", "psk", "anon"] {
        for ours_listens in [true, false] {
            let port = free_port();
            let creds = |endpoint| format!("tls-creds-{kind},id=tls,dir=good,endpoint={endpoint}");
            let server =
                format!("socket,id=c,host=127.0.0.1,port={port},server=on,wait=off,tls-creds=tls");
            let client =
                format!("socket,id=c,host=127.0.0.1,port={port},reconnect-ms=50,tls-creds=tls");
            let program = |is_ours| match is_ours {
                true => std::process::Command::new(crate::support::daemon::program()),
                false => std::process::Command::new("qemu-storage-daemon"),
            };
            // A monitor greets whoever is connected, so each side's greeting is proof for the other: it is no command.
            let start = |is_ours, endpoint, chardev: &str, control: &str| {
                let object = creds(endpoint);
                let control = format!("socket,id=m,path={control},server=on,wait=off");
                let args = [
                    "--object",
                    &object,
                    "--chardev",
                    chardev,
                    "--monitor",
                    "c",
                    "--chardev",
                    &control,
                    "--monitor",
                    "m",
                ];
                Daemon::start_as(&scratch, program(is_ours), &args)
            };
            let _ = fs::remove_file(scratch.path("s.sock"));
            let _ = fs::remove_file(scratch.path("c.sock"));
            let listening = start(ours_listens, "server", &server, "s.sock");
            let connecting = start(!ours_listens, "client", &client, "c.sock");
            for control in ["s.sock", "c.sock"] {
                let mut qmp = Qmp::connect(&scratch.path(control));
                crate::support::eventually(&format!("{kind} {ours_listens} {control}"), 30, || {
                    let devices = qmp.execute("query-chardev", json!({}));
                    let device = |label: &str| {
                        let mut devices = devices.as_array().unwrap().iter();
                        devices.find(|device| device["label"] == label).unwrap()["filename"].clone()
                    };
                    device("c").as_str().unwrap().starts_with("tcp:127.0.0.1:")
                });
            }
            connecting.stop();
            listening.stop();
        }
    }
}

#[test]
fn websocket_clients_talk_to_monitors() {
    needs!("certtool", "python3");
    let Some(python_program) = python_with_qmp() else {
        skip("no Python with the package websockets: run scripts/setup test");
        return;
    };
    let has_package = limited(python_program)
        .args(["-c", "import websockets"])
        .status()
        .unwrap();
    if !has_package.success() {
        skip("no Python with the package websockets: run scripts/setup test");
        return;
    }
    let scratch = Scratch::new();
    let pki = Pki::new(&scratch);
    let good = pki.directory("good", "ca", "expiration_days = 1");
    let (daemon, port) = monitor(&scratch, &[], "websocket=on");
    for _ in 0..2 {
        assert_eq!(
            python(port, Path::new("-"), "websocket", "localhost"),
            conversation("binary")
        );
    }
    daemon.stop();
    let credentials = "tls-creds-x509,id=tls,dir=good,endpoint=server";
    let (daemon, port) = monitor(&scratch, &[credentials], "websocket=on,tls-creds=tls");
    assert_eq!(
        python(port, &good, "websocket", "localhost"),
        conversation("binary")
    );
    daemon.stop();
}

#[test]
fn contradicting_options_are_refused() {
    let scratch = Scratch::new();
    let daemon = Daemon::start(
        &scratch,
        &[
            "--object",
            "tls-creds-anon,id=s,endpoint=server",
            "--object",
            "tls-creds-anon,id=c,endpoint=client",
            "--object",
            "secret,id=word,data=x",
            "--chardev",
            "socket,id=m,path=qmp.sock,server=on,wait=off",
            "--monitor",
            "m",
        ],
    );
    let mut qmp = Qmp::connect(&scratch.path("qmp.sock"));
    let unix = json!({"type": "unix", "data": {"path": "x.sock"}});
    let inet = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}});
    let fd = json!({"type": "fd", "data": {"str": "5"}});
    let vsock = json!({"type": "vsock", "data": {"cid": "1", "port": "5"}});
    for (addr, options, message) in [
        (
            &unix,
            json!({"tls-creds": "s"}),
            "'tls_creds' option is incompatible with 'unix' address type",
        ),
        (
            &unix,
            json!({"tls-creds": "c"}),
            "Expected TLS credentials for a server endpoint",
        ),
        (
            &unix,
            json!({"tls-creds": "none"}),
            "No TLS credentials with id 'none'",
        ),
        (
            &inet,
            json!({"tls-creds": "word"}),
            "Object with id 'word' is not TLS credentials",
        ),
        (
            &vsock,
            json!({"tls-creds": "s"}),
            "'tls_creds' option is incompatible with 'vsock' address type",
        ),
        (
            &fd,
            json!({"server": false, "tls-creds": "c"}),
            "'tls_creds' option is incompatible with 'fd' address type as client",
        ),
        (
            &fd,
            json!({"server": false, "reconnect": 1}),
            "'reconnect' option is incompatible with 'fd' address type",
        ),
        (&fd, json!({}), "only QEMU supports file descriptor passing"),
        (
            &inet,
            json!({"tls-authz": "word"}),
            "'tls_authz' option requires 'tls_creds' option",
        ),
        (
            &inet,
            json!({"server": false, "websocket": true}),
            "Websocket client is not implemented",
        ),
    ] {
        let mut data = json!({"addr": addr, "server": true, "wait": false});
        if options["server"] == false {
            data.as_object_mut().unwrap().remove("wait");
        }
        for (name, value) in options.as_object().unwrap() {
            data[name] = value.clone();
        }
        let backend = json!({"type": "socket", "data": data});
        let error = qmp
            .try_execute("chardev-add", json!({"id": "x", "backend": backend}))
            .unwrap_err();
        assert_eq!(error.desc, format!("Failed to add chardev 'x': {message}"));
    }
    daemon.quit(&mut qmp);
}
