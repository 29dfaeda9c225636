//! Drivers that break the rules: their queue stops, whatever they do, and nobody else notices.

use super::driver::*;
use super::*;
use crate::virtio::memory::{Access, Fault};
use crate::virtio::ring::split::Place;

/// A way to break a rule: it prepares the ring of eight descriptors, and gives the first descriptor of what is to be offered.
type Attack = fn(&mut Guest) -> u16;

fn fault(addr: u64, len: u64, access: Access) -> Broken {
    Broken::Fault(Fault { addr, len, access })
}

/// A read whose table of descriptors, at the data of request 100, a test has written.
fn with_table(guest: &Guest, len: u32, flags: u16) -> u16 {
    guest.describe(0, BASE + Guest::data_at(100), len, flags, 1);
    0
}

const TABLE: fn() -> u64 = || Guest::data_at(100);
const END: u64 = BASE + RAM as u64;

#[tokio::test]
async fn every_broken_rule_stops_the_queue() {
    let attacks: Vec<(&str, Attack, Broken)> = vec![
        (
            "a loop of two",
            |guest| {
                let head = guest.build(0, OUT, 0, 512);
                guest.describe(1, BASE + Guest::data_at(0), 512, NEXT, 0);
                head
            },
            Broken::Endless,
        ),
        (
            "a descriptor that follows itself",
            |guest| {
                guest.build(0, OUT, 0, 512);
                guest.describe(0, BASE + Guest::data_at(0), 16, NEXT, 0);
                0
            },
            Broken::Endless,
        ),
        (
            "a first descriptor that does not exist",
            |_| 8,
            Broken::Descriptor(8),
        ),
        (
            "a next descriptor that does not exist",
            |guest| {
                guest.build(0, OUT, 0, 512);
                guest.describe(0, BASE + Guest::data_at(0), 16, NEXT, 0xffff);
                0
            },
            Broken::Descriptor(0xffff),
        ),
        (
            "a header before all memory",
            |guest| {
                guest.build(0, OUT, 0, 512);
                guest.describe(0, 0, 16, NEXT, 1);
                0
            },
            fault(0, 16, Access::Read),
        ),
        (
            "data that leaves memory",
            |guest| {
                guest.build(0, IN, 0, 512);
                guest.describe(1, END - 511, 512, NEXT | WRITE, 2);
                0
            },
            fault(END - 511, 512, Access::Write),
        ),
        (
            "data around the end of all addresses",
            |guest| {
                guest.build(0, IN, 0, 512);
                guest.describe(1, u64::MAX - 100, 512, NEXT | WRITE, 2);
                0
            },
            fault(u64::MAX - 100, 512, Access::Write),
        ),
        (
            "an empty descriptor",
            |guest| {
                guest.build(0, IN, 0, 512);
                guest.describe(1, BASE, 0, NEXT | WRITE, 2);
                0
            },
            Broken::Empty,
        ),
        (
            "something to read after something to write",
            |guest| {
                guest.build(0, OUT, 0, 512);
                guest.describe(2, BASE, 1, WRITE | NEXT, 3);
                guest.describe(3, BASE, 1, 0, 0);
                0
            },
            Broken::Order,
        ),
        (
            "no status",
            |guest| {
                guest.build(0, OUT, 0, 512);
                guest.describe(1, BASE, 512, 0, 0);
                0
            },
            Broken::Status,
        ),
        (
            "half a header",
            |guest| {
                guest.build(0, FLUSH, 0, 0);
                guest.describe(0, BASE, 15, NEXT, 1);
                0
            },
            Broken::Header,
        ),
        (
            "a table of no whole descriptors",
            |guest| with_table(guest, 40, INDIRECT),
            Broken::Table(40),
        ),
        (
            "an empty table",
            |guest| with_table(guest, 0, INDIRECT),
            Broken::Table(0),
        ),
        (
            "a huge table",
            |guest| with_table(guest, 0xffff_fff0, INDIRECT),
            Broken::Table(0xffff_fff0),
        ),
        (
            "a table longer than any",
            |guest| with_table(guest, 1025 * 16, INDIRECT),
            Broken::Table(1025 * 16),
        ),
        (
            "a table that is not there",
            |guest| {
                guest.describe(0, END, 32, INDIRECT, 0);
                0
            },
            fault(END, 32, Access::Read),
        ),
        (
            "something after a table",
            |guest| with_table(guest, 32, INDIRECT | NEXT),
            Broken::Indirect,
        ),
        (
            "a table in a table",
            |guest| {
                guest.describe_at(TABLE(), BASE + TABLE(), 32, INDIRECT, 0);
                with_table(guest, 32, INDIRECT)
            },
            Broken::Indirect,
        ),
        (
            "a loop in a table",
            |guest| {
                guest.describe_at(TABLE(), BASE, 16, NEXT, 1);
                guest.describe_at(TABLE() + 16, BASE, 16, NEXT, 0);
                with_table(guest, 32, INDIRECT)
            },
            Broken::Endless,
        ),
        (
            "a next descriptor outside of its table",
            |guest| {
                guest.describe_at(TABLE(), BASE, 16, NEXT, 2);
                with_table(guest, 32, INDIRECT)
            },
            Broken::Descriptor(2),
        ),
        (
            "more bytes than there can be",
            |guest| {
                for index in 0..512u16 {
                    let at = TABLE() + 16 * u64::from(index);
                    guest.describe_at(at, BASE, 16 << 20, NEXT, index + 1);
                }
                with_table(guest, 512 * 16, INDIRECT)
            },
            Broken::Length,
        ),
    ];
    let world = World::new(MIB).await;
    for (name, attack, expected) in attacks {
        let mut guest = Guest::new(8, FEATURES);
        let served = world.serve(&guest);
        // What was right before is answered.
        assert_eq!(guest.perform(IN, 0, 512), (0, 513), "{name}");
        let head = attack(&mut guest);
        guest.offer(head);
        guest.kick();
        assert_eq!(served.broken().await, expected, "{name}");
        assert_eq!(guest.returned(), [], "{name}");
    }
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    assert_eq!(guest.perform(IN, 0, 512), (0, 513));
    served.stop().await;
}

#[tokio::test]
async fn an_index_that_jumps_stops_the_queue() {
    let world = World::new(MIB).await;
    for (size, start, jump) in [(8, 0, 9), (8, 65530, 9), (8, 0, 65535), (1024, 7, 1025)] {
        let guest = Guest::starting_at(size, FEATURES, start);
        let served = world.serve(&guest);
        let to = start.wrapping_add(jump);
        guest.set_available(to);
        guest.kick();
        let from = start;
        let expected = Broken::AvailableIndex { from, to, size };
        assert_eq!(served.broken().await, expected);
    }
}

#[tokio::test]
async fn a_table_needs_the_feature() {
    let world = World::new(MIB).await;
    let mut guest = Guest::new(8, FEATURES & !crate::virtio::F_INDIRECT_DESC);
    let served = world.serve(&guest);
    with_table(&guest, 32, INDIRECT);
    guest.offer(0);
    guest.kick();
    assert_eq!(served.broken().await, Broken::Indirect);
}

#[tokio::test]
async fn a_chain_that_is_offered_twice_stops_the_queue_and_comes_back_once() {
    let world = World::slow().await;
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    let head = guest.build(0, IN, 0, 512);
    guest.offer(head);
    guest.offer(head);
    guest.kick();
    assert_eq!(guest.wait(1), [(0, 513)]);
    assert_eq!(served.broken().await, Broken::Twice(0));
    assert_eq!(guest.returned(), []);
}

#[tokio::test]
async fn rings_that_are_nowhere_or_odd_are_not_served() {
    let world = World::new(MIB).await;
    let place = Guest::new(8, FEATURES).place;
    let odd = [
        (Place { size: 0, ..place }, Broken::Size(0)),
        (Place { size: 12, ..place }, Broken::Size(12)),
        (
            Place {
                size: 65535,
                ..place
            },
            Broken::Size(65535),
        ),
        (
            Place {
                descriptors: place.descriptors + 8,
                ..place
            },
            Broken::Alignment,
        ),
        (
            Place {
                available: place.available + 1,
                ..place
            },
            Broken::Alignment,
        ),
        (
            Place {
                used: place.used + 2,
                ..place
            },
            Broken::Alignment,
        ),
        (
            Place {
                used: END - 4,
                ..place
            },
            fault(END - 4, 70, Access::Write),
        ),
        (
            Place {
                descriptors: 0,
                ..place
            },
            fault(0, 128, Access::Read),
        ),
        (
            Place {
                available: u64::MAX - 1,
                ..place
            },
            fault(u64::MAX - 1, 22, Access::Read),
        ),
    ];
    for (place, expected) in odd {
        let mut guest = Guest::new(8, FEATURES);
        guest.place = place;
        assert_eq!(world.serve(&guest).broken().await, expected, "{place:?}");
    }
}

/// Descriptors that share memory with each other and with the ring spoil the driver's own data at worst.
#[tokio::test]
async fn overlapping_descriptors_harm_the_driver_alone() {
    let world = World::new(MIB).await;
    std::fs::write(world.image.path(), vec![0xff; 1 << 20]).unwrap();
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    let (header, status, data) = Guest::addresses(0);
    guest.head(0, IN, 0);
    guest.describe(0, header, 16, NEXT, 1);
    guest.describe(1, data, 1024, NEXT | WRITE, 2);
    guest.describe(2, data + 512, 1024, NEXT | WRITE, 3);
    guest.describe(3, status, 1, WRITE, 0);
    guest.offer(0);
    guest.kick();
    assert_eq!(guest.wait(1), [(0, 2049)]);
    assert_eq!(guest.status(0), 0);
    // The whole ring, and its own header.
    guest.head(0, IN, 0);
    guest.describe(1, BASE, 0x10000, NEXT | WRITE, 2);
    guest.describe(2, header, 512, NEXT | WRITE, 3);
    guest.offer(0);
    guest.kick();
    // The index of the available ring is 0xffff now, and the used ring was written to afterwards.
    assert!(matches!(
        served.broken().await,
        Broken::AvailableIndex { to: 0xffff, .. }
    ));
}

#[tokio::test]
async fn memory_that_is_taken_away_breaks_its_queue_alone() {
    let world = World::new(MIB).await;
    let mut guest = Guest::new(8, FEATURES);
    let mut other = Guest::new(8, FEATURES);
    let (served, others) = (world.serve(&guest), world.serve(&other));
    assert_eq!(guest.perform(IN, 0, 512).0, 0);
    guest.map.change(|regions| regions.remove(BASE, 1));
    let head = guest.build(0, IN, 0, 512);
    guest.offer(head);
    guest.kick();
    assert!(matches!(served.broken().await, Broken::Fault(_)));
    assert_eq!(other.perform(IN, 0, 512).0, 0);
    others.stop().await;
}

#[tokio::test]
async fn a_queue_that_cannot_be_kicked_ends_when_told() {
    let world = World::new(MIB).await;
    let guest = Guest::new(8, FEATURES);
    let map = Arc::clone(&guest.map);
    let setup = QueueSetup {
        index: 0,
        disk: Arc::clone(&world.disk),
        memory: move || map.local(),
        place: guest.place,
        next_available: 0,
        features: guest.features,
        // Always ready, and no eventfd.
        kick: std::fs::File::open("/dev/null").unwrap().into(),
        call: guest.call(),
        in_flight: None,
        on_broken: Box::new(|_| {}),
    };
    let queue = Queue::start(&world.contexts.main(), setup);
    assert_eq!(queue.stop().await, 0);
}
