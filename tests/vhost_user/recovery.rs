//! The daemon dies with requests in flight, and the next one goes on where it was: nothing is lost and nothing is done twice after
//! something newer.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rand::RngExt;

use super::driver::*;
use super::front_end::*;
use super::{SIZE, Served};
use crate::support::daemon::{Daemon, is_qemu};
use crate::support::model::rng;

/// A block is the unit of every write here, in bytes; what it holds says which write it was.
const BLOCK: u64 = 4096;

/// What the guest knows of its requests.
#[derive(Clone, Copy, Default)]
struct Slot {
    is_busy: bool,
    is_write: bool,
    block: u64,
    number: u64,
}

fn fill(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK as usize / 8)
}

/// Checks what came back and puts new requests in its place.
struct Load {
    slots: Vec<Slot>,
    /// The last write of each block that was completed.
    content: Vec<u64>,
    next: u64,
    completed: u64,
}

impl Load {
    fn new() -> Self {
        Self {
            slots: vec![Slot::default(); usize::from(SLOTS)],
            content: vec![0; (SIZE / BLOCK) as usize],
            next: 1,
            completed: 0,
        }
    }

    fn submit(&mut self, machine: &Machine, queue: &mut Queue, rng: &mut impl rand::Rng) {
        let mut any = false;
        for number in 0..SLOTS {
            if self.slots[usize::from(number)].is_busy {
                continue;
            }
            let block = rng.random_range(0..SIZE / BLOCK);
            let is_free = |slot: &Slot| !slot.is_busy || slot.block != block;
            if !self.slots.iter().all(is_free) {
                continue;
            }
            let is_write = rng.random_range(0..4) > 0;
            let slot = Slot {
                is_busy: true,
                is_write,
                block,
                number: self.next,
            };
            let data = if is_write {
                fill(self.next)
            } else {
                vec![0xff; BLOCK as usize]
            };
            machine.write(queue.buffer_at(number), &data);
            let kind = if is_write { OUT } else { IN };
            queue.submit(machine, number, kind, block * (BLOCK / 512), BLOCK as u32);
            self.slots[usize::from(number)] = slot;
            self.next += 1;
            any = true;
        }
        if any {
            queue.kick();
        }
    }

    #[track_caller]
    fn note(&mut self, machine: &Machine, queue: &Queue, done: Vec<(u16, u8)>) {
        for (number, status) in done {
            let slot = std::mem::take(&mut self.slots[usize::from(number)]);
            assert!(slot.is_busy, "request {number} is completed twice");
            assert_eq!(status, 0);
            if slot.is_write {
                self.content[slot.block as usize] = slot.number;
            } else {
                let data = machine.read(queue.buffer_at(number), BLOCK as usize);
                let expected = fill(self.content[slot.block as usize]);
                assert!(data == expected, "block {} is another", slot.block);
            }
            self.completed += 1;
        }
    }
}

#[test]
fn requests_survive_a_daemon_that_is_killed() {
    if is_qemu() {
        return;
    }
    let mut served = Served::start(&[], ",writable=on");
    let mut rng = rng(1);
    let machine = Machine::new();
    let mut queue = Queue::new(&machine, 0);
    let mut front = served.front_end();
    let shape = [longs(&[0, 0]), words(&[u32::from(ENTRIES) << 16 | 1, 0])].concat();
    let reply = front.ask(GET_INFLIGHT_FD, &shape);
    let record = File::from(reply.descriptors.into_iter().next().expect("a record"));
    let shape = reply.payload;
    let mut load = Load::new();
    for life in 0..12 {
        front.order(SET_INFLIGHT_FD, &shape, &one(&record));
        machine.share(&mut front);
        // As QEMU does: from where the ring's used index says.
        let base = queue.used_index(&machine);
        queue.start(&mut front, base);
        // One request may have been made available while nobody was there.
        queue.kick();
        let until = load.completed + rng.random_range(1..3000);
        while load.completed < until {
            load.submit(&machine, &mut queue, &mut rng);
            let done = queue.complete(&machine);
            load.note(&machine, &queue, done);
        }
        load.submit(&machine, &mut queue, &mut rng);
        if life == 11 {
            break;
        }
        served.daemon.kill_hard();
        front.is_cut_off();
        // What it published before it died counts.
        let done = queue.take_used(&machine);
        load.note(&machine, &queue, done);
        served.daemon = Daemon::start(&served.scratch, &served.args);
        front = served.front_end();
    }
    while load.slots.iter().any(|slot| slot.is_busy) {
        let done = queue.complete(&machine);
        load.note(&machine, &queue, done);
    }
    // The record has nothing under way.
    let mut marks = vec![0; usize::from(ENTRIES) * 16];
    record.read_exact_at(&mut marks, 16).unwrap();
    assert!(marks.iter().step_by(16).all(|mark| *mark == 0));
    drop(front);
    let image = served.image();
    for (block, number) in load.content.iter().enumerate() {
        let at = block * BLOCK as usize;
        assert!(
            image[at..][..BLOCK as usize] == fill(*number),
            "block {block}"
        );
    }
    served.daemon.stop();
}
