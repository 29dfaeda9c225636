//! Servers that die in the middle of a word, and servers that lie: the client neither hangs nor takes what is wrong.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::RngExt;
use serde_json::json;

use super::{BYTES, Passing, Server, content};
use crate::needs;
use crate::support::daemon::Daemon;
use crate::support::model::rng;
use crate::support::run::run;
use crate::support::{Qmp, Scratch};

/// A way to a server that ends after so many bytes of the server have come through.
struct Cutter {
    socket: PathBuf,
    /// For the connections to come, the bytes that come through; the last for all others.
    budgets: Arc<Mutex<Vec<usize>>>,
    /// Bytes that came through the longest-lived connection so far.
    longest: Arc<AtomicUsize>,
}

impl Cutter {
    fn start(scratch: &Scratch, server: &Path, budgets: Vec<usize>) -> Cutter {
        let socket = scratch.path("cut.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (server, budgets) = (server.to_owned(), Arc::new(Mutex::new(budgets)));
        let longest = Arc::new(AtomicUsize::new(0));
        let (left, seen) = (Arc::clone(&budgets), Arc::clone(&longest));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let budget = {
                    let mut left = left.lock().unwrap();
                    if left.len() > 1 {
                        left.remove(0)
                    } else {
                        left[0]
                    }
                };
                let client = client.unwrap();
                let Ok(server) = UnixStream::connect(&server) else {
                    continue;
                };
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || pass(from, to, usize::MAX, None));
                let seen = Arc::clone(&seen);
                std::thread::spawn(move || pass(server, client, budget, Some(&seen)));
            }
        });
        Cutter {
            socket,
            budgets,
            longest,
        }
    }

    fn set(&self, budgets: Vec<usize>) {
        *self.budgets.lock().unwrap() = budgets;
    }
}

fn pass(mut from: UnixStream, mut to: UnixStream, budget: usize, seen: Option<&AtomicUsize>) {
    let mut bytes = vec![0; 65536];
    let mut done = 0;
    while done < budget {
        let most = bytes.len().min(budget - done);
        let Ok(count) = from.read(&mut bytes[..most]) else {
            break;
        };
        if count == 0 || to.write_all(&bytes[..count]).is_err() {
            break;
        }
        done += count;
        if let Some(seen) = seen {
            seen.fetch_max(done, Ordering::Relaxed);
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn monitored(scratch: &Scratch) -> (Daemon, Qmp) {
    let monitor = "socket,id=qmp,path=qmp.sock,server=on,wait=off";
    let daemon = Daemon::start(scratch, &["--chardev", monitor, "--monitor", "chardev=qmp"]);
    let qmp = Qmp::connect(&scratch.path("qmp.sock"));
    (daemon, qmp)
}

/// The server ends after every single byte of its part of the handshake.
#[track_caller]
fn assert_opening_fails_wherever_it_is_cut(args: &[&str]) {
    let scratch = Scratch::in_memory();
    let socket = scratch.path("in.sock");
    let _server = Server::nbdkit(&socket, args);
    let cutter = Cutter::start(&scratch, &socket, vec![usize::MAX]);
    let (daemon, mut qmp) = monitored(&scratch);
    let options = json!({"driver": "nbd", "node-name": "disk", "server": {"type": "unix", "path": cutter.socket}});
    qmp.execute("blockdev-add", options.clone());
    qmp.execute("blockdev-del", json!({"node-name": "disk"}));
    let handshake = cutter.longest.load(Ordering::Relaxed);
    assert!(handshake > 100, "{handshake}");
    let begun = Instant::now();
    for budget in 0..handshake {
        cutter.set(vec![budget]);
        let message = qmp.refuse("blockdev-add", options.clone());
        assert!(
            message.contains("NBD server"),
            "after {budget} bytes: {message}"
        );
    }
    // It breaks off at once, wherever.
    assert!(
        begun.elapsed() < Duration::from_secs(60),
        "{:?}",
        begun.elapsed()
    );
    cutter.set(vec![usize::MAX]);
    qmp.execute("blockdev-add", options);
    daemon.quit(&mut qmp);
}

#[test]
fn server_that_dies_in_any_word_of_the_handshake() {
    needs!("nbdkit");
    assert_opening_fails_wherever_it_is_cut(&["memory", "size=1M"]);
    assert_opening_fails_wherever_it_is_cut(&["--no-sr", "memory", "size=1M"]);
}

#[test]
fn server_that_dies_while_it_speaks_tls() {
    needs!("nbdkit");
    let scratch = Scratch::in_memory();
    let keys = scratch.file("keys.psk", b"alice:000102030405060708090a0b0c0d0e0f\n");
    let socket = scratch.path("in.sock");
    let psk = format!("--tls-psk={}", keys.display());
    let _server = Server::nbdkit(&socket, &["--tls=require", &psk, "memory", "size=1M"]);
    let cutter = Cutter::start(&scratch, &socket, vec![usize::MAX]);
    let (daemon, mut qmp) = monitored(&scratch);
    qmp.execute(
        "object-add",
        json!({"qom-type": "tls-creds-psk", "id": "tls", "endpoint": "client", "username": "alice", "dir": scratch.dir()}),
    );
    let options = json!({"driver": "nbd", "node-name": "disk", "tls-creds": "tls",
        "server": {"type": "unix", "path": cutter.socket}});
    qmp.execute("blockdev-add", options.clone());
    qmp.execute("blockdev-del", json!({"node-name": "disk"}));
    let handshake = cutter.longest.load(Ordering::Relaxed);
    assert!(handshake > 300, "{handshake}");
    // The goodbye of TLS may come after the last word.
    for budget in (0..handshake - 64).step_by(7) {
        cutter.set(vec![budget]);
        let opened = qmp.try_execute("blockdev-add", options.clone());
        assert!(opened.is_err(), "after {budget} bytes");
    }
    cutter.set(vec![usize::MAX]);
    qmp.execute("blockdev-add", options);
    daemon.quit(&mut qmp);
}

/// The server ends somewhere in its replies, again and again, while much is under way: everything is made again.
#[test]
fn server_that_dies_in_any_reply() {
    needs!("qemu-nbd", "nbdcopy");
    let scratch = Scratch::in_memory();
    let socket = scratch.path("in.sock");
    let disk = scratch.file("disk", &vec![0; BYTES]);
    // Not nbdkit, which does not live through clients that are cut off like this.
    let args = [
        "--persistent",
        "--shared=0",
        "--format=raw",
        "--socket",
        socket.to_str().unwrap(),
        disk.to_str().unwrap(),
    ];
    let _server = Server::start("qemu-nbd", &args, &socket);
    let mut rng = rng(5);
    // The handshake takes some hundred bytes; some end in a header, some in data, some between.
    let mut budgets: Vec<usize> = (0..40).map(|_| rng.random_range(300..400_000)).collect();
    budgets.push(usize::MAX);
    let cutter = Cutter::start(&scratch, &socket, vec![usize::MAX]);
    let passing = Passing::start(&scratch, &cutter.socket, ",reconnect-delay=60");
    cutter.set(budgets.clone());
    passing.assert_carries(&scratch, &content(31));
    passing.daemon.stop();

    let cutter_socket = scratch.path("cut.sock");
    std::fs::remove_file(&cutter_socket).unwrap();
    let cutter = Cutter::start(&scratch, &socket, vec![usize::MAX]);
    let passing = Passing::start(
        &scratch,
        &cutter.socket,
        ",reconnect-delay=60,connections=1",
    );
    cutter.set(budgets);
    passing.assert_carries(&scratch, &content(32));
    passing.daemon.stop();
}

/// What a false server answers to a read, in place of the truth.
type Answer = fn(cookie: u64) -> Vec<u8>;

fn simple(magic: u32, byte: u8, cookie: u64, data: usize) -> Vec<u8> {
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(vec![byte; data]);
    bytes
}

const GOOD: u32 = 0x6744_6698;
const TRUTH: u8 = 0x55;
const LIE: u8 = 0x66;

/// A disk of 1 MiB with simple replies, in the oldest handshake that is spoken; `answer` is for the first read of each connection but the last.
fn lying_server(socket: &Path, answers: Vec<Answer>) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let mut answers = answers.into_iter();
        for client in listener.incoming() {
            let client = client.unwrap();
            let answer = answers.next();
            std::thread::spawn(move || serve_lies(client, answer));
        }
    });
}

/// Ends when the client goes.
fn serve_lies(mut client: UnixStream, answer: Option<Answer>) -> Option<()> {
    fn take<const N: usize>(client: &mut UnixStream) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        client.read_exact(&mut bytes).ok()?;
        Some(bytes)
    }
    client.write_all(b"NBDMAGICIHAVEOPT\0\x03").ok()?;
    take::<4>(&mut client)?;
    loop {
        take::<8>(&mut client)?;
        let option = u32::from_be_bytes(take(&mut client)?);
        let length = u32::from_be_bytes(take(&mut client)?);
        client.read_exact(&mut vec![0; length as usize]).ok()?;
        if option == 1 {
            break;
        }
        let mut reply = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        reply.extend(option.to_be_bytes());
        reply.extend(0x8000_0001_u32.to_be_bytes());
        reply.extend([0; 4]);
        client.write_all(&reply).ok()?;
    }
    let mut export = (1_u64 << 20).to_be_bytes().to_vec();
    export.extend([0, 1]);
    client.write_all(&export).ok()?;
    loop {
        let header: [u8; 28] = take(&mut client)?;
        let kind = u16::from_be_bytes([header[6], header[7]]);
        let cookie = u64::from_be_bytes(header[8..16].try_into().unwrap());
        let length = u32::from_be_bytes(header[24..28].try_into().unwrap()) as usize;
        if kind == 2 {
            return None;
        }
        let reply = match answer {
            Some(answer) if kind == 0 => answer(cookie),
            _ => simple(GOOD, TRUTH, cookie, if kind == 0 { length } else { 0 }),
        };
        client.write_all(&reply).ok()?;
    }
}

#[test]
fn replies_to_nothing_are_not_taken() {
    needs!("qemu-io");
    let lies: [Answer; 5] = [
        // Another request's cookie; one that was never given; one of an earlier request; a structured reply; a bad magic.
        |cookie| simple(GOOD, LIE, cookie ^ 1, 4096),
        |_| simple(GOOD, LIE, u64::MAX, 4096),
        |cookie| simple(GOOD, LIE, cookie.wrapping_add(1 << 32), 65536),
        |cookie| {
            [
                &0x668e_33ef_u32.to_be_bytes()[..],
                &[0, 1, 0, 1],
                &cookie.to_be_bytes(),
                &[0, 0, 0, 8],
                &[0; 8],
            ]
            .concat()
        },
        |cookie| simple(0, LIE, cookie, 4096),
    ];
    let scratch = Scratch::in_memory();
    for (number, lie) in lies.into_iter().enumerate() {
        // Without patience the read fails, and the next connection serves the next.
        let socket = scratch.path(&format!("{number}.sock"));
        lying_server(&socket, vec![lie]);
        let passing = Passing::start(&scratch, &socket, ",connections=1");
        let begun = Instant::now();
        let read = || {
            let command = ["-f", "raw", "-c", "read -P 0x55 0 4k", &passing.uri];
            let ended = run("qemu-io", &command);
            assert!(
                !ended.stdout.contains("Pattern verification failed"),
                "lie {number}"
            );
            ended.success()
        };
        // An error, or else the truth of a connection that was there in time.
        let _ = read();
        assert!(begun.elapsed() < Duration::from_secs(20), "lie {number}");
        crate::support::eventually("the next connection tells the truth", 30, read);
        assert!(passing.daemon.log().contains("sent what was not asked for"));
        passing.daemon.stop();
    }
    // With patience nobody notices.
    let socket = scratch.path("patient.sock");
    lying_server(&socket, lies.to_vec());
    let passing = Passing::start(&scratch, &socket, ",connections=1,reconnect-delay=60");
    let read = run(
        "qemu-io",
        &["-f", "raw", "-c", "read -P 0x55 0 4k", &passing.uri],
    );
    assert!(read.success(), "{}{}", read.stdout, read.stderr);
    passing.daemon.stop();
}

/// One reply twice: the second is a reply to nothing.
#[test]
fn reply_that_comes_twice_ends_the_connection() {
    needs!("qemu-io");
    let scratch = Scratch::in_memory();
    let socket = scratch.path("in.sock");
    lying_server(
        &socket,
        vec![|cookie| {
            [
                simple(GOOD, TRUTH, cookie, 4096),
                simple(GOOD, LIE, cookie, 4096),
            ]
            .concat()
        }],
    );
    let passing = Passing::start(&scratch, &socket, ",connections=1,reconnect-delay=60");
    let commands = [
        "-f",
        "raw",
        "-c",
        "read -P 0x55 0 4k",
        "-c",
        "read -P 0x55 8k 4k",
        &passing.uri,
    ];
    let read = run("qemu-io", &commands);
    assert!(read.success(), "{}{}", read.stdout, read.stderr);
    assert!(
        passing.daemon.log().contains("sent what was not asked for"),
        "{}",
        passing.daemon.log()
    );
    passing.daemon.stop();
}
