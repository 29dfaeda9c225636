//! Clients that are too many, too slow, too greedy, or speak nonsense.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::oracle::{Style, handshake, judge, judge_handshake, number_requests, skip_handshake};
use super::{SIZE, Served};
use crate::needs;
use crate::support::disk::MIB;
use crate::support::model::{noise, rng};
use crate::support::run::run_ok;
use crate::support::{eventually, qemu};

#[test]
fn no_more_clients_than_allowed_and_none_without_end() {
    needs!("qemu-img", "nbdinfo");
    let served = Served::start(
        &[],
        ",max-connections=3,handshake-max-seconds=1",
        ",writable=on",
    );
    // They say nothing, so each of them is dropped after a second, and the client after them gets its turn.
    let silent: Vec<_> = (0..20).map(|_| served.connect()).collect();
    run_ok("nbdinfo", &["--size", &served.uri()]);
    for mut stream in silent {
        let mut greeting = Vec::new();
        stream.read_to_end(&mut greeting).unwrap();
        assert!(greeting.len() == 18 || greeting.is_empty());
    }
    let lone = Served::start(&[], ",max-connections=1", "");
    let info: Value = serde_json::from_str(&run_ok("nbdinfo", &["--json", &lone.uri()])).unwrap();
    assert_eq!(info["exports"][0]["can_multi_conn"], false);
    lone.daemon.stop();
    served.daemon.stop();
}

/// The handshake up to transmission, in the old way.
fn enter(stream: &mut UnixStream, name: &str) {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    let mut hello = 3_u32.to_be_bytes().to_vec();
    hello.extend(b"IHAVEOPT");
    hello.extend(1_u32.to_be_bytes());
    hello.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
    hello.extend(name.as_bytes());
    stream.write_all(&hello).unwrap();
    let mut export = [0; 10];
    stream.read_exact(&mut export).unwrap();
    assert_eq!(export[..8], SIZE.to_be_bytes());
}

fn request(kind: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(0_u16.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

#[test]
fn requests_in_pieces_and_in_heaps_are_served() {
    needs!("qemu-img");
    let served = Served::start(&[], "", ",writable=on");
    let mut stream = served.connect();
    enter(&mut stream, "disk");
    // A write byte by byte, then a hundred writes and reads in one piece.
    let mut slow = request(1, 1, 0, 600);
    slow.extend([7; 600]);
    for byte in &slow {
        stream.write_all(std::slice::from_ref(byte)).unwrap();
    }
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4]);
    let mut heap = Vec::new();
    for number in 0..100_u8 {
        heap.extend(request(1, number.into(), u64::from(number) * 8192, 8192));
        heap.extend([number; 8192]);
    }
    let mut writer = stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || writer.write_all(&heap).unwrap());
    for _ in 0..100 {
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4]);
    }
    sending.join().unwrap();
    let reads: Vec<u8> = (0..100_u8)
        .flat_map(|number| request(0, number.into(), u64::from(number) * 8192, 8192))
        .collect();
    stream.write_all(&reads).unwrap();
    for _ in 0..100 {
        stream.read_exact(&mut reply).unwrap();
        let mut data = vec![0; 8192];
        stream.read_exact(&mut data).unwrap();
        assert!(
            data.iter().all(|byte| *byte == reply[15]),
            "block {}",
            reply[15]
        );
    }
    served.daemon.stop();
}

/// Whoever asks for much and takes nothing is not served without bound.
#[test]
fn client_that_does_not_read_costs_bounded_memory() {
    needs!("qemu-img", "nbdinfo");
    let served = Served::start(&noise(5, 48 * MIB), "", "");
    let before = served.daemon.memory_kib("VmRSS");
    let mut stream = served.connect();
    enter(&mut stream, "disk");
    stream
        .set_write_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    for number in 0..2000 {
        if stream.write_all(&request(0, number, 0, 1 << 20)).is_err() {
            break;
        }
    }
    run_ok("nbdinfo", &["--size", &served.uri()]);
    let peak = served.daemon.memory_kib("VmHWM");
    assert!(peak < before + 80 * 1024, "{before} kB grew to {peak} kB");
    drop(stream);
    served.daemon.stop();
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    needs!("qemu-img", "nbdinfo");
    let served = Served::start(&[], "", ",writable=on");
    let garbage = noise(6, 100_000);
    for end in [1, 4, 5, 20, 100, 5000, 100_000] {
        let mut stream = served.connect();
        // The server may hang up in the middle.
        let _ = stream.write_all(&garbage[..end]);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
        let mut stream = served.connect();
        enter(&mut stream, "disk");
        let _ = stream.write_all(&garbage[..end]);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    // A payload that is longer than any may be; one that never comes; a client that goes while its requests are served.
    for length in [u32::MAX, 33 << 20, 1 << 20] {
        let mut stream = served.connect();
        enter(&mut stream, "disk");
        let mut bytes = request(1, 1, 0, length);
        bytes.extend([9; 1000]);
        let _ = stream.write_all(&bytes);
    }
    for _ in 0..50 {
        let mut stream = served.connect();
        enter(&mut stream, "disk");
        let reads: Vec<u8> = (0..64).flat_map(|n| request(0, n, 0, 1 << 20)).collect();
        stream.write_all(&reads).unwrap();
    }
    run_ok("nbdinfo", &["--size", &served.uri()]);
    let mut qmp = served.qmp();
    eventually("the clients have gone", 30, || {
        qmp.try_execute("block-export-del", json!({"id": "e"}))
            .is_ok()
    });
    served.daemon.quit(&mut qmp);
}

/// Conversations of a client, each with some bytes changed.
#[test]
fn damaged_conversations_do_no_harm() {
    needs!("qemu-img", "nbdinfo");
    let served = Served::start(
        &[],
        ",max-connections=0,handshake-max-seconds=2",
        ",writable=on",
    );
    let option = |kind: u32, data: &[u8]| {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        bytes
    };
    let query = [
        &4_u32.to_be_bytes()[..],
        b"disk",
        &1_u32.to_be_bytes(),
        &15_u32.to_be_bytes(),
        b"base:allocation",
    ]
    .concat();
    let go = [
        &4_u32.to_be_bytes()[..],
        b"disk",
        &1_u16.to_be_bytes(),
        &3_u16.to_be_bytes(),
    ]
    .concat();
    let mut conversation = 3_u32.to_be_bytes().to_vec();
    for bytes in [
        option(8, &[]),
        option(3, &[]),
        option(10, &query),
        option(6, &go),
        option(7, &go),
    ] {
        conversation.extend(bytes);
    }
    let start = conversation.len();
    for kind in [0, 1, 3, 4, 5, 6, 7] {
        conversation.extend(request(kind, 7, 0, 4096));
        if kind == 1 {
            conversation.extend([3; 4096]);
        }
    }
    let mut rng = rng(10);
    for round in 0..400 {
        let mut bytes = conversation.clone();
        let span = if round % 2 == 0 {
            0..start
        } else {
            0..bytes.len()
        };
        for _ in 0..rng.random_range(1..6) {
            let at = rng.random_range(span.clone());
            bytes[at] = rng.random();
        }
        let mut stream = served.connect();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        judge_handshake(&said).unwrap();
    }
    run_ok("nbdinfo", &["--size", &served.uri()]);
    assert!(served.daemon.memory_kib("VmRSS") < 100 * 1024);
    served.daemon.stop();
    qemu::assert_clean(&served.image);
}

/// Requests of every kind, well and ill, in every style, in pieces of any length: each is answered once, in full.
#[test]
fn random_requests_are_answered_once() {
    needs!("qemu-img");
    let served = Served::start(&noise(8, 4 * MIB), ",max-connections=0", ",writable=on");
    let mut rng = rng(21);
    for round in 0..300 {
        let style = [Style::Simple, Style::Structured, Style::Extended][round % 3];
        let mut stream = Vec::new();
        for _ in 0..rng.random_range(1..40) {
            random_request(&mut rng, style, &mut stream);
        }
        if rng.random_bool(0.3) {
            let at = rng.random_range(0..stream.len());
            stream[at] ^= 1 << rng.random_range(0..8);
        }
        let sent = number_requests(style, &mut stream, usize::MAX);
        let mut client = served.connect();
        client.write_all(&handshake(style, "disk")).unwrap();
        skip_handshake(&mut client).unwrap();
        let mut writer = client.try_clone().unwrap();
        let pieces: Vec<usize> = (0..20).map(|_| rng.random_range(1..30_000)).collect();
        let sending = std::thread::spawn(move || {
            let mut rest = &stream[..];
            for piece in pieces.into_iter().cycle() {
                let (piece, more) = rest.split_at(piece.min(rest.len()));
                // The server hangs up on what is no request.
                if piece.is_empty() || writer.write_all(piece).is_err() {
                    break;
                }
                rest = more;
            }
            let _ = writer.shutdown(std::net::Shutdown::Write);
        });
        let mut replies = Vec::new();
        match client.read_to_end(&mut replies) {
            Ok(_) => {}
            // It hung up on what is no request, and did not look at the rest.
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
        sending.join().unwrap();
        if let Err(fault) = judge(style, &sent, &replies) {
            panic!("round {round}, {style:?}: {fault}");
        }
    }
    served.daemon.stop();
    qemu::assert_clean(&served.image);
}

fn random_request(rng: &mut StdRng, style: Style, stream: &mut Vec<u8>) {
    let kind: u16 = match rng.random_range(0..20) {
        0 => rng.random(),
        1 => 8,
        2 => 2,
        _ => [0, 1, 3, 4, 5, 6, 7][rng.random_range(0..7)],
    };
    // A disconnection ends it all, so it is rare.
    let kind = if kind == 2 && rng.random_bool(0.8) {
        0
    } else {
        kind
    };
    let flags: u16 = if rng.random_bool(0.1) {
        rng.random()
    } else {
        1 << rng.random_range(0..6) & 0b1_1111
    };
    let length: u64 = match rng.random_range(0..10) {
        0 => 0,
        1 => u64::from(rng.random::<u32>()),
        2..5 => rng.random_range(1..300_000),
        _ => rng.random_range(1..64) * 512,
    };
    let length = if kind == 1 {
        length.min(200_000)
    } else {
        length
    };
    let offset = match rng.random_range(0..12) {
        0 => rng.random(),
        1 => SIZE - length.min(SIZE),
        2 => SIZE,
        _ => rng.random_range(0..SIZE / 512) * 512 / 4,
    };
    let has_payload = kind == 1 || (style == Style::Extended && flags & 1 << 5 != 0);
    let length = if has_payload {
        length.min(200_000)
    } else {
        length
    };
    let magic: u32 = if style == Style::Extended {
        0x21e4_1c71
    } else {
        0x2560_9513
    };
    stream.extend(magic.to_be_bytes());
    stream.extend(flags.to_be_bytes());
    stream.extend(kind.to_be_bytes());
    stream.extend([0; 8]);
    stream.extend(offset.to_be_bytes());
    if style == Style::Extended {
        stream.extend(length.to_be_bytes());
    } else {
        stream.extend(u32::try_from(length).unwrap().to_be_bytes());
    }
    if has_payload {
        stream.extend(std::iter::repeat_n(
            rng.random::<u8>(),
            usize::try_from(length).unwrap(),
        ));
    }
}
