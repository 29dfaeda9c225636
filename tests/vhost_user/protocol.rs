//! What a good front end finds: the features, the configuration, the requests, and changes of all kinds while requests run.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::Pid;
use rand::RngExt;
use serde_json::json;

use super::driver::*;
use super::front_end::*;
use super::noise;
use super::{SIZE, Served};
use crate::support::Scratch;
use crate::support::daemon::{Daemon, is_qemu, program, run_to_end};
use crate::support::model::rng;

const SECTOR: u64 = 512;

#[test]
fn front_end_finds_a_disk() {
    let served = Served::start(&noise(1, 1 << 20), ",num-queues=3,logical-block-size=4096");
    let mut front = served.front_end();
    assert_eq!(front.ask(GET_QUEUE_NUM, &[]).number(), 3);
    assert_eq!(front.capacity(), SIZE / SECTOR);
    let block_size = front.config(20, 4);
    assert_eq!(block_size, 4096_u32.to_le_bytes());
    let queues = front.config(34, 2);
    assert_eq!(queues, 3_u16.to_le_bytes());
    let features = front.ask(GET_FEATURES, &[]).number();
    // Read-only, for the export is not writable.
    assert_ne!(features & (1 << 5), 0);
    // No packed rings.
    assert_eq!(features & (1 << 34), 0);
    assert!(front.ask(GET_MAX_MEM_SLOTS, &[]).number() >= 8);
    served.daemon.stop();
}

#[test]
fn requests_reach_the_image() {
    let content = noise(2, SIZE);
    let served = Served::start(&content, ",writable=on");
    let (_front, machine, mut queue) = served.guest();
    assert_eq!(queue.read(&machine, 8, 8192), content[4096..12288]);
    let data = noise(3, 16384);
    queue.write(&machine, 100, &data);
    assert_eq!(queue.read(&machine, 100, 16384), data);
    assert_eq!(queue.carry_out(&machine, FLUSH, 0, 0), 0);
    assert_eq!(served.image()[100 * 512..][..16384], data);
    // Ranges of a discard and of zeroes: first sector, number of sectors, flags.
    let mut range = 2048_u64.to_le_bytes().to_vec();
    range.extend(2048_u32.to_le_bytes());
    range.extend(0_u32.to_le_bytes());
    machine.write(queue.buffer_at(0), &range);
    assert_eq!(queue.carry_out(&machine, WRITE_ZEROES, 0, 16), 0);
    assert_eq!(queue.read(&machine, 2048, 4096), [0; 4096]);
    machine.write(queue.buffer_at(0), &range);
    assert_eq!(queue.carry_out(&machine, DISCARD, 0, 16), 0);
    assert_eq!(queue.carry_out(&machine, GET_ID, 0, 20), 0);
    let serial = machine.read(queue.buffer_at(0), 20);
    assert_eq!(serial, b"vhost_user_blk\0\0\0\0\0\0");
    // Past the end, and of a kind that nobody knows.
    assert_eq!(queue.carry_out(&machine, IN, SIZE / 512, 512), 1);
    assert_eq!(queue.carry_out(&machine, 77, 0, 512), 2);
    served.daemon.stop();
}

#[test]
fn read_only_disk_is_not_written() {
    let content = noise(4, SIZE);
    let served = Served::start(&content, "");
    let (_front, machine, mut queue) = served.guest();
    machine.write(queue.buffer_at(0), &[1; 512]);
    assert_ne!(queue.carry_out(&machine, OUT, 0, 512), 0);
    assert_eq!(queue.read(&machine, 0, 512), content[..512]);
    served.daemon.stop();
}

/// Two queues on two contexts, each with many requests of its own, compared with what a model says.
#[test]
fn queues_work_side_by_side() {
    let served = Served::start(&[], ",writable=on,num-queues=2");
    let mut front = served.front_end();
    let machine = Machine::new();
    machine.share(&mut front);
    let mut queues = [Queue::new(&machine, 0), Queue::new(&machine, 1)];
    for queue in &queues {
        queue.start(&mut front, 0);
    }
    let mut rng = rng(5);
    let mut model = vec![0; SIZE as usize];
    for round in 0..20_u64 {
        // Each queue writes blocks of its own half, no block twice in a round.
        let mut writes = Vec::new();
        for queue in &mut queues {
            let half = u64::from(queue.index) * (SIZE / 2);
            let start = rng.random_range(0..SIZE / 2 / BUFFER - u64::from(SLOTS));
            for slot in 0..SLOTS {
                let at = half + (start + u64::from(slot)) * BUFFER;
                let len = rng.random_range(1..=BUFFER / SECTOR) * SECTOR;
                let data = noise(round * 1000 + at, len);
                machine.write(queue.buffer_at(slot), &data);
                let len = u32::try_from(len).unwrap();
                queue.submit(&machine, slot, OUT, at / SECTOR, len);
                writes.push((at, data));
            }
            queue.kick();
        }
        for queue in &mut queues {
            let mut left = SLOTS;
            while left > 0 {
                for (_, status) in queue.complete(&machine) {
                    assert_eq!(status, 0);
                    left -= 1;
                }
            }
        }
        for (at, data) in writes {
            model[at as usize..][..data.len()].copy_from_slice(&data);
        }
    }
    // What one wrote, the other reads.
    for (index, queue) in queues.iter_mut().enumerate() {
        let other = (1 - index) as u64 * (SIZE / 2);
        for block in (0..SIZE / 2 / BUFFER).step_by(7) {
            let at = other + block * BUFFER;
            let data = queue.read(&machine, at / SECTOR, BUFFER as usize);
            assert!(data == model[at as usize..][..BUFFER as usize], "{at:#x}");
        }
    }
    drop(front);
    served.daemon.stop();
}

#[test]
fn ring_goes_on_where_it_was_stopped() {
    let content = noise(6, SIZE);
    let served = Served::start(&content, "");
    let (mut front, machine, mut queue) = served.guest();
    for sector in 0..300 {
        let data = queue.read(&machine, sector, 512);
        assert_eq!(data, content[sector as usize * 512..][..512]);
    }
    assert_eq!(queue.stop(&mut front), 300);
    queue.is_called(Duration::ZERO);
    // Nothing is served while it is stopped, but all of it afterwards.
    queue.submit(&machine, 0, IN, 9, 512);
    queue.kick();
    assert!(!queue.is_called(Duration::from_millis(100)));
    assert_eq!(queue.used_index(&machine), 300);
    queue.start(&mut front, 300);
    assert_eq!(queue.complete(&machine), [(0, 0)]);
    // Neither while it is disabled.
    front.order(SET_VRING_ENABLE, &words(&[0, 0]), &[]);
    queue.is_called(Duration::ZERO);
    queue.submit(&machine, 0, IN, 9, 512);
    queue.kick();
    assert!(!queue.is_called(Duration::from_millis(100)));
    front.order(SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    assert_eq!(queue.complete(&machine), [(0, 0)]);
    served.daemon.stop();
}

#[test]
fn other_counters_are_called_while_requests_run() {
    let served = Served::start(&noise(7, SIZE), "");
    let (mut front, machine, mut queue) = served.guest();
    for _ in 0..50 {
        for slot in 0..8 {
            queue.submit(&machine, slot, IN, 0, 4096);
        }
        queue.kick();
        let call = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        front.order(SET_VRING_CALL, &[0; 8], &one(&call));
        queue.call = call;
        let mut left = 8;
        while left > 0 {
            left -= queue.complete(&machine).len();
        }
    }
    served.daemon.stop();
}

/// Memory comes and goes in pieces while a queue runs in a piece that stays.
#[test]
fn memory_is_plugged_and_unplugged() {
    let content = noise(8, SIZE);
    let served = Served::start(&content, ",writable=on");
    let mut front = served.front_end();
    let machine = Machine::new();
    let slot = |guest: u64, user: u64| longs(&[0, guest, MEMORY, user, 0]);
    front.order(ADD_MEM_REG, &slot(GUEST, USER), &one(&machine.memory));
    let mut queue = Queue::new(&machine, 0);
    queue.start(&mut front, 0);
    let second = 0x20_0000_0000;
    for round in 0..20_u64 {
        let extra = memfd_create(c"more", MFdFlags::MFD_CLOEXEC).unwrap();
        let extra = std::fs::File::from(extra);
        extra.set_len(MEMORY).unwrap();
        front.order(ADD_MEM_REG, &slot(second, second), &one(&extra));
        // The same addresses cannot be taken twice.
        assert!(!front.is_done(ADD_MEM_REG, &slot(second, second), &one(&extra)));
        // A read into the new memory.
        let sector = round * 64;
        queue.submit(&machine, 0, IN, sector, 4096);
        queue.describe(&machine, 1, second + 8192, 4096, 3, 2);
        queue.kick();
        assert_eq!(queue.complete(&machine), [(0, 0)]);
        let mut data = vec![0; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&extra, &mut data, 8192).unwrap();
        assert_eq!(data, content[sector as usize * 512..][..4096]);
        front.order(REM_MEM_REG, &slot(second, second), &[]);
        assert!(!front.is_done(REM_MEM_REG, &slot(second, second), &[]));
        assert_eq!(queue.read(&machine, 1, 512), content[512..1024]);
    }
    served.daemon.stop();
}

#[test]
fn front_end_hears_of_another_length() {
    let served = Served::start(&[], ",writable=on");
    let mut front = served.front_end();
    let (ours, theirs) = UnixStream::pair().unwrap();
    front.order(SET_BACKEND_REQ_FD, &[], &one(&theirs));
    let mut qmp = served.qmp();
    qmp.execute(
        "block_resize",
        json!({"node-name": "disk", "size": 2 * SIZE}),
    );
    ours.set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let mut channel = FrontEnd { stream: ours };
    let notice = channel.receive().expect("the change is told");
    assert_eq!(notice.request, 2);
    assert_eq!(front.capacity(), 2 * SIZE / SECTOR);
    served.daemon.stop();
}

/// A front end whose channel is full holds nothing up.
#[test]
fn front_end_that_does_not_listen_holds_nothing_up() {
    let served = Served::start(&[], ",writable=on");
    let (mut front, machine, mut queue) = served.guest();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    front.order(SET_BACKEND_REQ_FD, &[], &one(&theirs));
    let mut qmp = served.qmp();
    for step in 1..500_u64 {
        qmp.execute(
            "block_resize",
            json!({"node-name": "disk", "size": SIZE + step * 512}),
        );
    }
    queue.read(&machine, 0, 512);
    served.daemon.stop();
}

#[test]
fn driver_turns_the_write_cache_off_and_a_reset_puts_it_back() {
    if is_qemu() {
        return;
    }
    let served = Served::start(&[], ",writable=on");
    let (mut front, machine, mut queue) = served.guest();
    assert_eq!(front.config(32, 1), [1]);
    let mut cache = words(&[32, 1, 0]);
    cache.push(0);
    front.order(SET_CONFIG, &cache, &[]);
    assert_eq!(front.config(32, 1), [0]);
    queue.write(&machine, 0, &[7; 512]);
    // The capacity is not the driver's.
    let mut capacity = words(&[0, 8, 0]);
    capacity.extend([0; 8]);
    assert!(!front.is_done(SET_CONFIG, &capacity, &[]));
    front.order(RESET_DEVICE, &[], &[]);
    assert_eq!(front.config(32, 1), [1]);
    assert!(!queue.is_called(Duration::from_millis(10)));
    front.order(SET_STATUS, &longs(&[15]), &[]);
    assert_eq!(front.ask(GET_STATUS, &[]).number(), 15);
    front.order(SET_STATUS, &longs(&[0]), &[]);
    assert_eq!(front.ask(GET_STATUS, &[]).number(), 0);
    served.daemon.stop();
}

/// What is written to memory is in the log once it is complete, and nothing of it without one.
#[test]
fn writes_to_memory_are_logged() {
    let served = Served::start(&noise(9, SIZE), "");
    let (mut front, machine, mut queue) = served.guest();
    let pages = (GUEST + MEMORY) / 4096;
    let log = std::fs::File::from(memfd_create(c"log", MFdFlags::MFD_CLOEXEC).unwrap());
    log.set_len(pages / 8).unwrap();
    let part = longs(&[pages / 8, 0]);
    front.send(SET_LOG_BASE, &part, &[log.as_fd()]);
    assert_eq!(front.receive().unwrap().request, SET_LOG_BASE);
    let is_dirty = |at: u64| {
        let page = (GUEST + at) / 4096;
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&log, &mut byte, page / 8).unwrap();
        byte[0] & (1 << (page % 8)) != 0
    };
    queue.read(&machine, 0, 512);
    assert!(!is_dirty(queue.buffer_at(0)));
    let features = front.ask(GET_FEATURES, &[]).number();
    front.order(SET_FEATURES, &features.to_ne_bytes(), &[]);
    front.order(SET_VRING_ADDR, &queue.addresses_with(1), &[]);
    // Three pages of data, the status, and the used ring.
    queue.read(&machine, 0, 3 * 4096);
    for at in [0, 4096, 8192] {
        assert!(is_dirty(queue.buffer_at(0) + at));
    }
    assert!(!is_dirty(queue.buffer_at(0) + 3 * 4096));
    assert!(is_dirty(queue.base + 0x8000));
    assert!(is_dirty(queue.base + 0x10000));
    assert!(!is_dirty(queue.buffer_at(1)));
    // What the device reads stays clean.
    assert!(!is_dirty(queue.base));
    front.order(SET_FEATURES, &(features & !F_LOG_ALL).to_ne_bytes(), &[]);
    std::os::unix::fs::FileExt::write_all_at(&log, &vec![0; pages as usize / 8], 0).unwrap();
    queue.read(&machine, 0, 4096);
    assert!(!is_dirty(queue.buffer_at(0)));
    served.daemon.stop();
}

#[test]
fn requests_wait_out_a_drained_section_and_the_end() {
    let content = noise(10, SIZE);
    let served = Served::start(&content, ",writable=on");
    let (front, machine, mut queue) = served.guest();
    let mut qmp = served.qmp();
    for round in 0..20_u64 {
        for slot in 0..SLOTS {
            queue.submit(&machine, slot, IN, round * 16, 4096);
        }
        queue.kick();
        // Each of these is a drained section.
        qmp.execute(
            "blockdev-reopen",
            json!({"options": [{"driver": "file", "node-name": "disk", "filename": "disk.raw",
                "discard": if round % 2 == 0 { "ignore" } else { "unmap" }}]}),
        );
        let mut left = usize::from(SLOTS);
        while left > 0 {
            for (slot, status) in queue.complete(&machine) {
                assert_eq!(status, 0);
                let data = machine.read(queue.buffer_at(slot), 4096);
                assert!(data == content[round as usize * 8192..][..4096]);
                left -= 1;
            }
        }
    }
    for slot in 0..SLOTS {
        queue.submit(&machine, slot, IN, 0, 4096);
    }
    queue.kick();
    qmp.execute("block-export-del", json!({"id": "export"}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED")["id"], "export");
    // What was taken was completed before.
    let taken = queue.take_used(&machine).len();
    assert!(taken <= usize::from(SLOTS));
    drop(front);
    assert!(!served.socket.exists());
    served.daemon.stop();
}

#[test]
fn a_front_end_comes_after_the_other() {
    let content = noise(11, SIZE);
    let served = Served::start(&content, ",writable=on");
    let (front, machine, mut queue) = served.guest();
    queue.read(&machine, 0, 512);
    // One that comes meanwhile waits for its turn.
    let mut second = FrontEnd::connect(&served.socket);
    second
        .stream
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    second.send(GET_FEATURES, &[], &[]);
    assert!(second.receive().is_err());
    drop((front, queue));
    second
        .stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    assert_ne!(second.receive().unwrap().number(), 0);
    second.agree();
    machine.share(&mut second);
    let mut queue = Queue::new(&machine, 0);
    queue.start(&mut second, 0);
    assert_eq!(queue.read(&machine, 3, 512), content[3 * 512..4 * 512]);
    served.daemon.stop();
}

/// Without protocol features there is no message to enable a ring, and none that is acknowledged.
#[test]
fn front_end_without_protocol_features_is_served() {
    let content = noise(12, SIZE);
    let served = Served::start(&content, "");
    let mut front = FrontEnd::connect(&served.socket);
    front.send(SET_OWNER, &[], &[]);
    front.send(SET_FEATURES, &longs(&[1 << 32]), &[]);
    let machine = Machine::new();
    front.send(SET_MEM_TABLE, &machine.table(), &one(&machine.memory));
    let mut queue = Queue::new(&machine, 0);
    front.send(SET_VRING_NUM, &words(&[0, ENTRIES.into()]), &[]);
    front.send(SET_VRING_BASE, &words(&[0, 0]), &[]);
    front.send(SET_VRING_ADDR, &queue.addresses(), &[]);
    front.send(SET_VRING_KICK, &[0; 8], &one(&queue.kick));
    front.send(SET_VRING_CALL, &[0; 8], &one(&queue.call));
    assert_eq!(queue.read(&machine, 5, 1024), content[5 * 512..7 * 512]);
    assert_eq!(queue.stop(&mut front), 1);
    served.daemon.stop();
}

/// The export at a socket that the daemon finds as its standard input.
#[track_caller]
fn start_at(served: &Served, socket: OwnedFd) -> Child {
    let export = "vhost-user-blk,id=second,node-name=disk,addr.type=fd,addr.str=0";
    Command::new(program())
        .args(["--blockdev", "file,node-name=disk,filename=disk.raw"])
        .args(["--export", export])
        .current_dir(served.scratch.dir())
        .stdin(socket)
        .spawn()
        .unwrap()
}

#[test]
fn passed_sockets_are_served() {
    if is_qemu() {
        return;
    }
    let content = noise(13, SIZE);
    let served = Served::start(&content, "");
    let path = served.scratch.path("passed.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let listening = start_at(&served, listener.into());
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let connected = start_at(&served, theirs.into());
    for mut front in [FrontEnd::connect(&path), FrontEnd { stream: ours }] {
        front.agree();
        let machine = Machine::new();
        machine.share(&mut front);
        let mut queue = Queue::new(&machine, 0);
        queue.start(&mut front, 0);
        assert_eq!(queue.read(&machine, 3, 512), content[3 * 512..4 * 512]);
    }
    for mut daemon in [listening, connected] {
        let process = Pid::from_raw(i32::try_from(daemon.id()).unwrap());
        kill(process, Signal::SIGTERM).unwrap();
        assert!(daemon.wait().unwrap().success());
    }
    served.daemon.stop();
}

#[test]
fn serve_is_for_machines_too() {
    if is_qemu() {
        return;
    }
    let content = noise(14, SIZE);
    let scratch = Scratch::new();
    std::fs::write(scratch.path("disk.raw"), &content).unwrap();
    let args = [
        "serve",
        "disk.raw",
        "--vhost-user",
        "vm.sock",
        "--background",
    ];
    let ended = run_to_end(&scratch, &args);
    assert!(ended.success(), "{ended:?}");
    let socket = scratch.path("vm.sock");
    assert_eq!(ended.stdout.trim(), socket.to_str().unwrap());
    let mut front = FrontEnd::connect(&socket);
    let process = getsockopt(&front.stream, PeerCredentials).unwrap().pid();
    let daemon = Daemon::adopt(&scratch, process);
    front.agree();
    assert_eq!(front.ask(GET_QUEUE_NUM, &[]).number(), 16);
    let machine = Machine::new();
    machine.share(&mut front);
    let mut queue = Queue::new(&machine, 5);
    queue.start(&mut front, 0);
    queue.write(&machine, 9, &[9; 512]);
    drop(front);
    daemon.stop();
    let image = std::fs::read(scratch.path("disk.raw")).unwrap();
    assert_eq!(image[9 * 512..10 * 512], [9; 512]);
}
