//! Clients that are too many, too slow, too greedy, or speak nonsense.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rand::RngExt;
use serde_json::{Value, json};

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
        let _ = stream.read_to_end(&mut Vec::new());
    }
    run_ok("nbdinfo", &["--size", &served.uri()]);
    assert!(served.daemon.memory_kib("VmRSS") < 100 * 1024);
    served.daemon.stop();
    qemu::assert_clean(&served.image);
}
