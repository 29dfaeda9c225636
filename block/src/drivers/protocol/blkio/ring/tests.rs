//! The ring against a device that is played here, on the same memory.

use super::*;
use crate::testing::Random;

const BASE: u64 = 0x1_0000_0000;

/// Address, length and flags of each part of a request.
type Chain = Vec<(usize, u32, u16)>;

struct Device {
    memory: IoBuffer,
    seen: u16,
    used: u16,
}

impl Device {
    fn word(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read_at(at, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// The next request: its head and its parts.
    fn next(&mut self) -> Option<(u16, Chain)> {
        if self.memory.load_u16(AVAILABLE + INDEX, Ordering::Acquire) == self.seen {
            return None;
        }
        let entry = AVAILABLE + ENTRIES + 2 * usize::from(self.seen % SIZE);
        let head = self.memory.load_u16(entry, Ordering::Relaxed);
        self.seen = self.seen.wrapping_add(1);
        let (mut table, mut at) = (0, usize::from(head));
        let mut parts = Vec::new();
        loop {
            let addr = usize::try_from(self.word(table + at * DESCRIPTOR) - BASE).unwrap();
            let rest = self.word(table + at * DESCRIPTOR + 8).to_le_bytes();
            let len = u32::from_le_bytes(rest[..4].try_into().unwrap());
            let flags = u16::from_le_bytes([rest[4], rest[5]]);
            if flags & INDIRECT != 0 {
                assert_eq!(len, 48);
                (table, at) = (addr, 0);
                continue;
            }
            parts.push((addr, len, flags & !NEXT));
            if flags & NEXT == 0 {
                return Some((head, parts));
            }
            at = u16::from_le_bytes([rest[6], rest[7]]).into();
        }
    }

    fn complete(&mut self, head: u32) {
        let entry = USED + ENTRIES + 8 * usize::from(self.used % SIZE);
        self.memory.store_u32(entry, head, Ordering::Relaxed);
        self.used = self.used.wrapping_add(1);
        self.memory
            .store_u16(USED + INDEX, self.used, Ordering::Release);
    }
}

fn pair(shape: Shape, position: u16) -> (Ring, Device) {
    let memory = IoBuffer::zeroed(HEAD);
    // As after so many requests.
    memory.store_u16(USED + INDEX, position, Ordering::Relaxed);
    memory.store_u16(AVAILABLE + INDEX, position, Ordering::Relaxed);
    let device = Device {
        memory: memory.clone(),
        seen: position,
        used: position,
    };
    (Ring::new(memory, BASE, shape, position), device)
}

fn shapes() -> [Shape; 4] {
    [(false, false), (false, true), (true, false), (true, true)].map(|(indirect, event_index)| {
        Shape {
            indirect,
            event_index,
        }
    })
}

#[test]
fn requests_arrive_whole_and_come_back_in_any_order() {
    for shape in shapes() {
        // Both indices wrap around on the way.
        let (mut ring, mut device) = pair(shape, 65_000);
        let mut random = Random::new(3);
        let mut free: Vec<u16> = (0..shape.places()).collect();
        let mut at_device = Vec::new();
        for round in 0..3000_u64 {
            while let (Some(place), false) = (free.last().copied(), random.one_in(3)) {
                free.pop();
                let payload = match random.below(4) {
                    0 => Payload::None,
                    1 => Payload::Segment {
                        sector: round,
                        sectors: 9,
                        flags: 1,
                    },
                    2 => Payload::ToDevice(HEAD + 4096, 512),
                    _ => Payload::FromDevice(HEAD + 8192, 1024),
                };
                ring.offer(place, 7, round, payload);
                assert!(device.next().is_none());
                assert!(ring.publish() || shape.event_index);
                let (head, parts) = device.next().unwrap();
                let (first, rest) = parts.split_first().unwrap();
                let (status, data) = rest.split_last().unwrap();
                assert_eq!(first.1, 16);
                assert_eq!(device.word(first.0), 7);
                assert_eq!(device.word(first.0 + 8), round);
                assert_eq!((status.1, status.2), (1, WRITE));
                match payload {
                    Payload::None => assert_eq!(data, []),
                    Payload::Segment { .. } => {
                        assert_eq!((data[0].1, data[0].2), (16, 0));
                        assert_eq!(device.word(data[0].0), round);
                        assert_eq!(device.word(data[0].0 + 8), 9 | 1 << 32);
                    }
                    Payload::ToDevice(at, len) => assert_eq!(data, [(at, len, 0)]),
                    Payload::FromDevice(at, len) => assert_eq!(data, [(at, len, WRITE)]),
                }
                device.memory.write_at(status.0, &[place.to_le_bytes()[0]]);
                at_device.push((head, place));
            }
            while !at_device.is_empty() && !random.one_in(3) {
                let at = usize::try_from(random.below(at_device.len() as u64)).unwrap();
                let (head, place) = at_device.swap_remove(at);
                assert!(!ring.listen());
                device.complete(head.into());
                assert!(ring.has_completions());
                let taken = ring.take().unwrap();
                assert_eq!(taken, Some((place, place.to_le_bytes()[0])));
                assert_eq!(ring.take(), Ok(None));
                free.push(place);
            }
            assert_eq!(ring.busy().count(), at_device.len());
            assert_eq!(ring.position().is_some(), at_device.is_empty());
        }
    }
}

#[test]
fn completions_of_what_the_device_does_not_have_break_the_queue() {
    for shape in shapes() {
        let two = || {
            let (mut ring, mut device) = pair(shape, 0);
            ring.offer(4, 0, 0, Payload::None);
            ring.offer(9, 0, 0, Payload::None);
            ring.publish();
            let heads = [device.next().unwrap().0, device.next().unwrap().0];
            (ring, device, heads.map(u32::from))
        };
        // The same one twice.
        let (mut ring, mut device, heads) = two();
        device.complete(heads[0]);
        device.complete(heads[0]);
        assert_eq!(ring.take(), Ok(Some((4, NO_STATUS))));
        assert_eq!(ring.take(), Err(Broken::Unknown(heads[0])));
        for other in [1, 2, 126, 127, 128, 384, 65_536, u32::MAX] {
            let (mut ring, mut device, _) = two();
            device.complete(other);
            assert_eq!(ring.take(), Err(Broken::Unknown(other)));
        }
        let (mut ring, mut device, heads) = two();
        for head in [heads[0], heads[1], heads[0]] {
            device.complete(head);
        }
        assert_eq!(ring.take(), Err(Broken::TooMany(3)));
        // Backwards.
        let (mut ring, device, _) = two();
        device
            .memory
            .store_u16(USED + INDEX, u16::MAX, Ordering::Relaxed);
        assert_eq!(ring.take(), Err(Broken::TooMany(u16::MAX)));
    }
}

#[test]
fn the_device_is_told_when_it_wants_to_be() {
    let (mut ring, device) = pair(
        Shape {
            indirect: true,
            event_index: true,
        },
        0,
    );
    let mut offer = |place, event: u16| {
        device
            .memory
            .store_u16(AVAILABLE_EVENT, event, Ordering::Relaxed);
        ring.offer(place, 0, 0, Payload::None);
        ring.publish()
    };
    assert!(offer(0, 0));
    assert!(!offer(1, 0), "it is awake");
    assert!(!offer(2, 5));
    assert!(offer(3, 3));
    let (mut ring, device) = pair(
        Shape {
            indirect: true,
            event_index: false,
        },
        0,
    );
    ring.offer(0, 0, 0, Payload::None);
    assert!(ring.publish());
    assert!(!ring.publish(), "there is nothing new");
    device.memory.store_u16(USED, NO_NOTIFY, Ordering::Relaxed);
    ring.offer(1, 0, 0, Payload::None);
    assert!(!ring.publish());
}
