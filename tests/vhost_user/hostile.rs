//! Front ends and drivers that break the rules: the one is let go, the other's ring stops, and the export serves whoever comes next.

use std::fs::File;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rand::{Rng, RngExt};

use super::driver::*;
use super::front_end::*;
use super::noise;
use super::{SIZE, Served};
use crate::support::model::rng;

const VERSION: u32 = 1;

/// Sees that the export still does what it is for.
#[track_caller]
fn still_serves(served: &Served, content: &[u8]) {
    let (_front, machine, mut queue) = served.guest();
    assert_eq!(queue.read(&machine, 7, 512), content[7 * 512..8 * 512]);
}

#[test]
fn what_is_no_message_ends_the_connection() {
    let content = noise(1, SIZE);
    let served = Served::start(&content, "");
    let null = File::open("/dev/null").unwrap();
    let many = [null.as_fd(); 40];
    let bad: [(Vec<u8>, usize); 8] = [
        // Of another version, a reply, too long, unknown.
        (message(GET_FEATURES, 2, 0, &[]), 0),
        (message(GET_FEATURES, VERSION | 4, 0, &[]), 0),
        (message(GET_FEATURES, VERSION, u32::MAX, &[]), 0),
        (message(SET_FEATURES, VERSION, 5000, &[0; 5000]), 0),
        (message(99, VERSION, 0, &[]), 0),
        // Payloads and descriptors that do not belong to them.
        (message(SET_FEATURES, VERSION, 4, &[0; 4]), 0),
        (message(SET_VRING_ADDR, VERSION, 8, &[0; 8]), 0),
        (message(GET_FEATURES, VERSION, 0, &[]), 40),
    ];
    for (bytes, descriptors) in bad {
        let mut front = FrontEnd::connect(&served.socket);
        front.is_cut_off_by(&bytes, &many[..descriptors]);
    }
    // It breaks off within a message.
    for len in 1..20 {
        let front = FrontEnd::connect(&served.socket);
        let bytes = message(SET_FEATURES, VERSION, 8, &[0; 8]);
        front.send_raw(&bytes[..len], &[]).unwrap();
    }
    still_serves(&served, &content);
    served.daemon.stop();
}

#[test]
fn message_in_pieces_is_one() {
    let served = Served::start(&[], "");
    let mut front = FrontEnd::connect(&served.socket);
    for byte in message(GET_FEATURES, VERSION, 0, &[]) {
        front.send_raw(&[byte], &[]).unwrap();
    }
    assert_ne!(front.receive().unwrap().number(), 0);
    served.daemon.stop();
}

#[test]
fn refused_messages_change_nothing() {
    let content = noise(2, SIZE);
    let served = Served::start(&content, "");
    let (mut front, machine, mut queue) = served.guest();
    let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let short = File::from(memfd_create(c"short", MFdFlags::MFD_CLOEXEC).unwrap());
    short.set_len(4096).unwrap();
    let image = File::open(served.scratch.path("disk.raw")).unwrap();
    let table = |regions: &[[u64; 4]]| {
        let mut payload = words(&[u32::try_from(regions.len()).unwrap(), 0]);
        regions
            .iter()
            .for_each(|region| payload.extend(longs(region)));
        payload
    };
    let whole = [GUEST, MEMORY, USER, 0];
    let other = 0x40_0000_0000;
    let memory = machine.memory.as_fd();
    let bad: Vec<(u32, Vec<u8>, Vec<std::os::fd::BorrowedFd<'_>>)> = vec![
        (SET_FEATURES, longs(&[1 << 34]), vec![]),
        (SET_PROTOCOL_FEATURES, longs(&[1 << 50]), vec![]),
        // Memory: longer than its file, wrapping around, overlapping, empty, of no file, too many, too few descriptors.
        (
            SET_MEM_TABLE,
            table(&[[GUEST, MEMORY, USER, 4096]]),
            vec![memory],
        ),
        (
            SET_MEM_TABLE,
            table(&[[GUEST, 8192, USER, 0]]),
            vec![short.as_fd()],
        ),
        (
            SET_MEM_TABLE,
            table(&[[GUEST, 4096, USER, u64::MAX - 4095]]),
            vec![short.as_fd()],
        ),
        (
            SET_MEM_TABLE,
            table(&[[u64::MAX - 4095, 8192, USER, 0]]),
            vec![memory],
        ),
        (
            SET_MEM_TABLE,
            table(&[[GUEST, 8192, u64::MAX - 4095, 0]]),
            vec![memory],
        ),
        (SET_MEM_TABLE, table(&[whole, whole]), vec![memory, memory]),
        (SET_MEM_TABLE, table(&[[GUEST, 0, USER, 0]]), vec![memory]),
        (SET_MEM_TABLE, table(&[whole]), vec![eventfd.as_fd()]),
        (SET_MEM_TABLE, table(&[whole]), vec![socket.as_fd()]),
        (SET_MEM_TABLE, table(&[whole]), vec![image.as_fd()]),
        (SET_MEM_TABLE, table(&[whole]), vec![]),
        (SET_MEM_TABLE, table(&[whole]), vec![memory, memory]),
        (SET_MEM_TABLE, table(&[]), vec![]),
        (SET_MEM_TABLE, words(&[9, 0]), vec![]),
        (SET_MEM_TABLE, words(&[u32::MAX, 0]), vec![memory]),
        (
            ADD_MEM_REG,
            longs(&[0, GUEST, MEMORY, USER, 0]),
            vec![memory],
        ),
        (ADD_MEM_REG, longs(&[0, other, MEMORY, other, 0]), vec![]),
        (REM_MEM_REG, longs(&[0, other, MEMORY, other, 0]), vec![]),
        // Rings: none of that number, sizes and places that cannot be.
        (SET_VRING_NUM, words(&[7, 128]), vec![]),
        (SET_VRING_NUM, words(&[0, 64]), vec![]),
        (SET_VRING_BASE, words(&[0, 1 << 16]), vec![]),
        (
            SET_VRING_ADDR,
            [words(&[0, 0]), longs(&[0, 0, 0, 0])].concat(),
            vec![],
        ),
        (SET_VRING_ENABLE, words(&[u32::MAX, 1]), vec![]),
        (SET_VRING_KICK, longs(&[9]), vec![eventfd.as_fd()]),
        // Polling, and counters that are none.
        (SET_VRING_KICK, longs(&[1 << 8]), vec![]),
        (SET_VRING_KICK, longs(&[0]), vec![]),
        (SET_VRING_KICK, longs(&[0]), vec![image.as_fd()]),
        (SET_VRING_CALL, longs(&[0]), vec![socket.as_fd()]),
        (SET_VRING_ERR, longs(&[0]), vec![memory]),
        // The log and what is in flight.
        (SET_LOG_BASE, longs(&[1 << 40, 0]), vec![short.as_fd()]),
        (SET_LOG_BASE, longs(&[4096, 0]), vec![]),
        (
            SET_INFLIGHT_FD,
            [longs(&[64, 0]), words(&[1024 << 16 | 1, 0])].concat(),
            vec![short.as_fd()],
        ),
        (
            SET_INFLIGHT_FD,
            [longs(&[u64::MAX, 0]), words(&[1024 << 16 | 1, 0])].concat(),
            vec![short.as_fd()],
        ),
        (SET_BACKEND_REQ_FD, vec![], vec![image.as_fd()]),
        (SET_CONFIG, words(&[32, 9, 0]), vec![]),
    ];
    for (number, (request, payload, descriptors)) in bad.iter().enumerate() {
        let done = front.is_done(*request, payload, descriptors);
        assert!(!done, "case {number}: message {request}");
        assert_eq!(queue.read(&machine, 7, 512), content[7 * 512..8 * 512]);
    }
    // Nobody is told where no acknowledgement is asked for.
    front.send(SET_VRING_NUM, &words(&[7, 128]), &[]);
    front.is_cut_off();
    still_serves(&served, &content);
    served.daemon.stop();
}

/// Rings that a driver fills with nonsense stop, without harm to anything else.
#[test]
fn nonsense_in_a_ring_stops_it() {
    let content = noise(3, SIZE);
    let served = Served::start(&content, ",writable=on");
    let break_it: [fn(&mut Queue, &Machine); 7] = [
        // A descriptor that is none, and one far away.
        |queue, machine| queue.offer(machine, ENTRIES),
        |queue, machine| queue.offer(machine, 0xffff),
        // Memory that is not there, in whole and in part.
        |queue, machine| {
            queue.describe(machine, 0, 0x1000, 16, 1, 1);
            queue.describe(machine, 1, GUEST + MEMORY - 1, 2, 2, 0);
            queue.offer(machine, 0);
        },
        // A loop.
        |queue, machine| {
            queue.describe(machine, 0, GUEST + 0x10000, 16, 1, 1);
            queue.describe(machine, 1, GUEST + 0x20000, 16, 1, 0);
            queue.offer(machine, 0);
        },
        // An index far ahead.
        |queue, machine| {
            machine.write(queue.base + 0x4002, &1000_u16.to_le_bytes());
        },
        // Indirect tables within each other, and of an odd length.
        |queue, machine| {
            let table = queue.base + 0x20000;
            machine.write(table, &(GUEST + table).to_le_bytes());
            machine.write(table + 8, &[16, 0, 0, 0, 4, 0, 0, 0]);
            queue.describe(machine, 0, GUEST + table, 16, 4, 0);
            queue.offer(machine, 0);
        },
        |queue, machine| {
            queue.describe(machine, 0, GUEST + 0x20000, 17, 4, 0);
            queue.offer(machine, 0);
        },
    ];
    for (number, spoil) in break_it.into_iter().enumerate() {
        let (mut front, machine, mut queue) = served.guest();
        let broken = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
        front.order(SET_VRING_ERR, &[0; 8], &one(&broken));
        assert_eq!(queue.read(&machine, 7, 512), content[7 * 512..8 * 512]);
        spoil(&mut queue, &machine);
        queue.kick();
        assert_eq!(broken.read().unwrap(), 1, "case {number}");
        // It can be set up anew.
        queue.stop(&mut front);
        let mut queue = Queue::new(&machine, 0);
        queue.start(&mut front, 0);
        assert_eq!(queue.read(&machine, 7, 512), content[7 * 512..8 * 512]);
    }
    assert_eq!(served.image(), content);
    served.daemon.stop();
}

/// A kick counter that somebody else fills, and a call counter that nobody empties.
#[test]
fn counters_that_are_full_or_never_rest_harm_nobody() {
    let content = noise(4, SIZE);
    let served = Served::start(&content, "");
    let (_front, machine, mut queue) = served.guest();
    queue.is_called(Duration::ZERO);
    queue.call.write(u64::MAX - 1).unwrap();
    for slot in 0..SLOTS {
        queue.submit(&machine, slot, IN, 0, 4096);
    }
    queue.kick.write(u64::MAX - 1).unwrap();
    let mut left = usize::from(SLOTS);
    while left > 0 {
        // It is full as long as nobody has read it.
        let _ = queue.kick.write(1);
        left -= queue.take_used(&machine).len();
    }
    served.daemon.stop();
}

/// A record of requests in flight that is full of nonsense.
#[test]
fn nonsense_in_flight_is_not_served() {
    let content = noise(5, SIZE);
    let served = Served::start(&content, ",writable=on");
    let mut rng = rng(6);
    for _ in 0..50 {
        let mut front = served.front_end();
        let shape = [longs(&[0, 0]), words(&[u32::from(ENTRIES) << 16 | 1, 0])].concat();
        let reply = front.ask(GET_INFLIGHT_FD, &shape);
        let record = File::from(reply.descriptors.into_iter().next().expect("a record"));
        let len = u64::from_ne_bytes(reply.payload[..8].try_into().unwrap());
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        rng.fill_bytes(&mut bytes);
        // Its version is right.
        bytes[8..10].copy_from_slice(&1_u16.to_ne_bytes());
        record.write_all_at(&bytes, 0).unwrap();
        front.order(SET_INFLIGHT_FD, &reply.payload, &one(&record));
        let machine = Machine::new();
        machine.share(&mut front);
        let queue = Queue::new(&machine, 0);
        queue.start(&mut front, rng.random());
        queue.kick();
        queue.stop(&mut front);
    }
    assert_eq!(served.image(), content);
    still_serves(&served, &content);
    served.daemon.stop();
}

/// Messages at random, most of them nearly right, with descriptors at random.
#[test]
fn random_messages_do_no_harm() {
    let content = noise(7, SIZE);
    let served = Served::start(&content, "");
    let machine = Machine::new();
    let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let null = File::open("/dev/null").unwrap();
    let mut rng = rng(8);
    for _ in 0..300 {
        let mut front = FrontEnd::connect(&served.socket);
        if rng.random() {
            front.agree();
        }
        // Answers are not read: whoever is cut off for that is not served longer.
        for _ in 0..rng.random_range(1..40) {
            let mut payload: Vec<u8> = match rng.random_range(0..5) {
                0 => machine.table(),
                1 => words(&[rng.random_range(0..2), rng.random_range(0..200)]),
                2 => longs(&[rng.random_range(0..2)]),
                3 => longs(&[0, GUEST, MEMORY, USER, 0]),
                _ => Queue::new(&machine, 0).addresses(),
            };
            if rng.random_range(0..4) == 0 && !payload.is_empty() {
                let at = rng.random_range(0..payload.len());
                payload[at] = rng.random();
            }
            let descriptors = [eventfd.as_fd(), machine.memory.as_fd(), null.as_fd()];
            let from = rng.random_range(0..3);
            let count = rng.random_range(0..=1);
            let flags = VERSION | if rng.random() { 8 } else { 0 };
            let size = u32::try_from(payload.len()).unwrap();
            let bytes = message(rng.random_range(1..42), flags, size, &payload);
            if front
                .send_raw(&bytes, &descriptors[from..from + count])
                .is_err()
            {
                break;
            }
        }
    }
    still_serves(&served, &content);
    served.daemon.stop();
}

#[test]
fn a_thousand_front_ends_leave_nothing_behind() {
    let content = noise(9, SIZE);
    let served = Served::start(&content, ",writable=on");
    let descriptors = || {
        let open = format!("/proc/{}/fd", served.daemon.pid());
        std::fs::read_dir(open).unwrap().count()
    };
    still_serves(&served, &content);
    let before = descriptors();
    for number in 0..1000 {
        let (front, machine, mut queue) = served.guest();
        match number % 4 {
            // In the middle of requests.
            0 => {
                for slot in 0..8 {
                    queue.submit(&machine, slot, IN, 0, 4096);
                }
                queue.kick();
            }
            1 => {
                queue.read(&machine, 0, 512);
            }
            2 => front.stream.shutdown(Shutdown::Both).unwrap(),
            // In the middle of a message.
            _ => (&front.stream).write_all(&[1, 0, 0]).unwrap(),
        }
    }
    still_serves(&served, &content);
    crate::support::eventually("no descriptor is left", 30, || descriptors() <= before);
    served.daemon.stop();
}

/// A front end that asks and asks and reads no answer.
#[test]
fn front_end_that_does_not_read_holds_nobody_up() {
    let served = Served::start(&[], "");
    let front = FrontEnd::connect(&served.socket);
    front.stream.set_nonblocking(true).unwrap();
    let question = message(GET_FEATURES, VERSION, 0, &[]);
    while front.send_raw(&question, &[]).is_ok() {}
    let mut qmp = served.qmp();
    let exports = qmp.execute("query-block-exports", serde_json::json!({}));
    assert_eq!(exports[0]["id"], "export");
    qmp.execute("block-export-del", serde_json::json!({"id": "export"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    front.stream.set_nonblocking(false).unwrap();
    front
        .stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    served.daemon.stop();
}
