//! Clients that send what no client should: the daemon answers, or closes the connection, as QEMU's daemon does, takes no lasting memory
//! for it, and goes on serving the others.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::needs;
use crate::support::daemon::{Daemon, is_qemu};
use crate::support::{Qmp, Scratch, eventually};

fn monitors(first: &str, second: &str) -> Vec<String> {
    [("a", first), ("b", second)]
        .iter()
        .flat_map(|(id, path)| {
            [
                "--chardev".to_owned(),
                format!("socket,id={id},path={path},server=on,wait=off"),
                "--monitor".to_owned(),
                format!("chardev={id}"),
            ]
        })
        .collect()
}

/// Sends bytes to a monitor, after the negotiation if wanted, and gives what they are answered with up to the reply to a last, good
/// command, or `closed`.
fn answers(socket: &std::path::Path, negotiated: bool, bytes: &[u8]) -> Vec<Value> {
    let mut stream = UnixStream::connect(socket).unwrap();
    let limit = Some(Duration::from_secs(30));
    stream.set_read_timeout(limit).unwrap();
    stream.set_write_timeout(limit).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    lines.next().unwrap().unwrap();
    if negotiated {
        stream
            .write_all(b"{\"execute\":\"qmp_capabilities\"}\n")
            .unwrap();
        lines.next().unwrap().unwrap();
    }
    let mut sent = bytes.to_vec();
    // No byte of UTF-8: whatever is half-way is given up there.
    sent.extend(b"\n\xff{\"execute\":\"query-version\",\"id\":\"the end\"}\n");
    let _ = stream.write_all(&sent);
    let mut answers = Vec::new();
    for line in lines {
        let Ok(line) = line else { break };
        let mut answer: Value = serde_json::from_str(&line).unwrap();
        if answer.get("return").is_some() {
            // The version is another.
            answer["return"] = json!("done");
        }
        let is_last = answer["id"] == "the end";
        answers.push(answer);
        if is_last {
            return answers;
        }
    }
    answers.push(json!("closed"));
    answers
}

/// A command whose argument is this piece of JSON.
fn with_argument(value: &[u8]) -> Vec<u8> {
    let mut bytes = b"{\"execute\":\"query-version\",\"id\":1,\"arguments\":{\"x\":".to_vec();
    bytes.extend(value);
    bytes.extend(b"}}\n");
    bytes
}

fn bad_bytes() -> Vec<Vec<u8>> {
    let values: &[&[u8]] = &[
        // Text that is none.
        b"\"\xff\"",
        b"\"\xc3\"",
        b"\"\xc0\x80\"",
        b"\"\xe0\x80\x80\"",
        b"\"\xed\xa0\x80\"",
        b"\"\xf4\x90\x80\x80\"",
        b"\"\xf8\x88\x80\x80\x80\"",
        b"\"\xef\xbf\xbe\"",
        b"\"\xef\xb7\x90\"",
        b"\"\\ud800\"",
        b"\"\\udc00\"",
        b"\"\\ud800\\u0041\"",
        b"\"\\udc00\\ud800\"",
        b"\"\\ud83d\\ude00\"",
        b"\"\\uffff\"",
        b"\"\\u0000\"",
        b"\"\\u12\"",
        b"\"\\x41\"",
        b"\"a\x00b\"",
        b"\"a\nb\"",
        b"\"a\tb\"",
        b"\"a\x7fb\"",
        b"'single \"double\" inside'",
        b"\"%d %s %n\"",
        b"%d",
        b"\x00",
        // Numbers.
        b"18446744073709551615",
        b"18446744073709551616",
        b"-9223372036854775808",
        b"-9223372036854775809",
        b"9223372036854775808",
        b"1e400",
        b"-1e400",
        b"1e-400",
        b"0.1e1",
        b"1E+2",
        b"01",
        b"-01",
        b"+1",
        b"-",
        b"1.",
        b".5",
        b"1e",
        b"0x10",
        b"NaN",
        b"Infinity",
        b"-0",
        // Keys twice, and structures that are none.
        b"{\"a\":1,\"a\":2}",
        b"{\"a\":{\"b\":1,\"b\":1}}",
        b"{\"a\":1,}",
        b"{,}",
        b"[1,]",
        b"[,1]",
        b"[1 2]",
        b"{\"a\" 1}",
        b"{a:1}",
        b"{1:1}",
        b"True",
        b"nul",
        b"nulls",
        b"]",
        b"[}",
        b"\xef\xbb\xbf1",
    ];
    let mut all: Vec<Vec<u8>> = values.iter().map(|value| with_argument(value)).collect();
    for depth in [1020, 1022, 1023, 1024, 1025, 3000] {
        all.push(with_argument(
            &[b"[".repeat(depth), b"]".repeat(depth)].concat(),
        ));
        all.push(with_argument(
            &[b"{\"a\":".repeat(depth), b"1".to_vec(), b"}".repeat(depth)].concat(),
        ));
    }
    let whole: &[&[u8]] = &[
        b"{\"execute\":\"query-version\",\"execute\":\"quit\"}",
        b"{\"execute\":\"query-version\",\"id\":1,\"id\":2}",
        b"{\"execute\":\"query-version\",\"arguments\":{\"x\":1,\"x\":1}}",
        b"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"nope\"]}}",
        b"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\",\"oob\"]}}",
        b"{\"exec-oob\":\"query-version\"}",
        b"{\"execute\":\"\"}",
        b"{\"execute\":\"query-version\\u0000\"}",
        b"{\"execute\":null}",
        b"{\"execute\":\"query-version\"} {\"execute\":\"query-version\"",
        b"}{",
        b"]",
        b"\"",
        b"'",
        b"\x00\x00\x00",
        b"\xef\xbb\xbf{\"execute\":\"query-version\"}",
        b"null true false 1 1.5 \"x\" [] {}",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ];
    all.extend(whole.iter().map(|bytes| bytes.to_vec()));
    all
}

#[test]
fn bad_bytes_are_answered_as_qemu_answers_them() {
    needs!("qemu-storage-daemon");
    let scratch = Scratch::new();
    let ours = Daemon::start(&scratch, &monitors("a", "b"));
    let qemu = Command::new("qemu-storage-daemon");
    let theirs = Daemon::start_as(&scratch, qemu, &monitors("c", "d"));
    let mut differ = Vec::new();
    for bytes in bad_bytes() {
        for negotiated in [true, false] {
            let our_answers = answers(&scratch.path("a"), negotiated, &bytes);
            let their_answers = answers(&scratch.path("c"), negotiated, &bytes);
            if our_answers != their_answers {
                let shown = &bytes[..bytes.len().min(120)];
                differ.push(format!(
                    "{} (negotiated: {negotiated})\n  ours: {our_answers:?}\n  QEMU: {their_answers:?}",
                    String::from_utf8_lossy(shown)
                ));
            }
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
    ours.stop();
    theirs.stop();
}

#[test]
fn megabytes_of_nonsense_leave_nothing_behind() {
    if is_qemu() {
        return; // It takes minutes over this.
    }
    let scratch = Scratch::new();
    let daemon = Daemon::start(&scratch, &monitors("a", "b"));
    let mut other = Qmp::connect(&scratch.path("b"));
    other.execute("query-version", json!({}));
    let before = daemon.memory_kib("VmRSS");
    const SIZE: usize = 10 << 20;
    let inputs = [
        b"[".repeat(SIZE),
        b"{\"a\":".repeat(SIZE / 5),
        [b"\"".to_vec(), b"x".repeat(SIZE)].concat(),
        b"1".repeat(SIZE),
        b"[1,".repeat(SIZE / 3),
        b"\xff".repeat(SIZE),
    ];
    for input in &inputs {
        let mut stream = UnixStream::connect(scratch.path("a")).unwrap();
        let mut reader = stream.try_clone().unwrap();
        let drain = std::thread::spawn(move || {
            let mut sink = vec![0; 1 << 16];
            while reader.read(&mut sink).is_ok_and(|count| count > 0) {}
        });
        for block in input.chunks(1 << 20) {
            if stream.write_all(block).is_err() {
                break;
            }
            // Others are served meanwhile.
            other.execute("query-version", json!({}));
        }
        let peak = daemon.memory_kib("VmRSS").saturating_sub(before);
        assert!(peak < 100 << 10, "{peak} KiB for {:x?}..", &input[..8]);
        let _ = stream.shutdown(std::net::Shutdown::Both);
        drain.join().unwrap();
    }
    // What was held for a client goes when the next comes, at the latest.
    let mut next = Qmp::connect(&scratch.path("a"));
    next.execute("query-version", json!({}));
    let left = daemon.memory_kib("VmRSS").saturating_sub(before);
    assert!(left < 40 << 10, "{left} KiB are left");
    drop(next);
    daemon.quit(&mut other);
}

#[test]
fn a_thousand_connections_leave_nothing_behind() {
    let scratch = Scratch::new();
    let daemon = Daemon::start(&scratch, &monitors("a", "b"));
    let mut other = Qmp::connect(&scratch.path("b"));
    let descriptors = || {
        fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
            .unwrap()
            .count()
    };
    let visit = |number: usize| {
        let mut stream = UnixStream::connect(scratch.path("a")).unwrap();
        match number % 4 {
            0 => {}
            1 => drop(stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")),
            2 => drop(stream.write_all(b"{\"execute\": \"qmp_capa")),
            _ => drop(stream.read(&mut [0; 10])),
        }
    };
    (0..100).for_each(visit);
    other.execute("query-version", json!({}));
    let (before, open) = (daemon.memory_kib("VmRSS"), descriptors());
    for number in 0..1000 {
        visit(number);
        if number % 100 == 0 {
            other.execute("query-version", json!({}));
        }
    }
    let mut next = Qmp::connect(&scratch.path("a"));
    next.execute("query-version", json!({}));
    drop(next);
    eventually("the descriptors are closed", 20, || descriptors() <= open);
    let grown = daemon.memory_kib("VmRSS").saturating_sub(before);
    assert!(grown < 2048, "{grown} KiB for a thousand connections");
    daemon.quit(&mut other);
}
