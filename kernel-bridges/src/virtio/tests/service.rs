//! How a queue waits, stops, and is held.

use std::collections::HashSet;

use super::driver::*;
use super::*;
use crate::virtio::F_EVENT_IDX;

#[tokio::test]
async fn stopping_waits_for_what_is_under_way_and_takes_no_more() {
    let world = World::slow().await;
    let mut guest = Guest::starting_at(64, FEATURES, 65534);
    let served = world.serve(&guest);
    for slot in 0..5 {
        let head = guest.build(slot, IN, 0, 512);
        guest.offer(head);
    }
    guest.kick();
    guest.until_asked();
    assert_eq!(guest.returned(), [], "all are under way");
    let next = served.stop().await;
    assert_eq!(next, 65534u16.wrapping_add(5));
    assert_eq!(guest.returned().len(), 5);
    let head = guest.build(0, IN, 0, 512);
    guest.offer(head);
    guest.kick();
    // Somebody else goes on.
    let served = world.serve_from(&guest, next, None);
    assert_eq!(guest.wait(1), [(0, 513)]);
    assert_eq!(served.stop().await, guest.available);
}

#[tokio::test]
async fn nothing_is_taken_in_a_drained_section() {
    let world = World::new(MIB).await;
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    assert_eq!(guest.perform(IN, 0, 512).0, 0);
    let node = world.graph.find("n").unwrap();
    let section = world.graph.drain(&[node]).await;
    let head = guest.build(0, IN, 0, 512);
    guest.offer(head);
    guest.kick();
    // Long enough for the queue to look.
    let other = world.contexts.main().run(|| async {
        for _ in 0..100 {
            stord_aio::yield_now().await;
        }
    });
    other.await.unwrap();
    assert_eq!(guest.returned(), []);
    assert_eq!(guest.status(0), 0xaa);
    drop(section);
    assert_eq!(guest.wait(1), [(0, 513)]);
    served.stop().await;
}

#[tokio::test]
async fn a_queue_can_be_stopped_in_a_drained_section() {
    let world = World::new(MIB).await;
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    let node = world.graph.find("n").unwrap();
    let section = world.graph.drain(&[node]).await;
    let head = guest.build(0, IN, 0, 512);
    guest.offer(head);
    guest.kick();
    assert_eq!(served.stop().await, 0);
    drop(section);
    let served = world.serve_from(&guest, 0, None);
    assert_eq!(guest.wait(1), [(0, 513)]);
    served.stop().await;
}

#[tokio::test]
async fn chains_that_are_there_together_come_back_with_one_notification() {
    let world = World::new(MIB).await;
    for features in [FEATURES, FEATURES & !F_EVENT_IDX] {
        let mut guest = Guest::new(64, features);
        for slot in 0..16 {
            let head = guest.build(slot, IN, 0, 512);
            guest.offer(head);
        }
        let served = world.serve_from(&guest, 0, None);
        assert_eq!(guest.wait(16).len(), 16);
        served.stop().await;
        assert_eq!(guest.notifications(), 1);
    }
}

#[tokio::test]
async fn a_driver_that_wants_no_notification_gets_none() {
    let world = World::new(MIB).await;
    let mut guest = Guest::new(8, FEATURES & !F_EVENT_IDX);
    // VIRTQ_AVAIL_F_NO_INTERRUPT
    guest.put(0x8000, &[1, 0]);
    let head = guest.build(0, IN, 0, 512);
    guest.offer(head);
    let served = world.serve_from(&guest, 0, None);
    guest.kick();
    while guest.returned().is_empty() {
        std::thread::yield_now();
    }
    served.stop().await;
    assert_eq!(guest.notifications(), 0);
}

/// A driver that asks and is asked for every wake-up loses none, and neither does the device.
#[tokio::test]
async fn no_wake_up_is_lost() {
    const REQUESTS: usize = 5_000;
    let world = World::new(MIB).await;
    for features in [FEATURES, FEATURES & !F_EVENT_IDX] {
        let mut guest = Guest::starting_at(64, features, 65000);
        let served = world.serve(&guest);
        let mut random = 0x9e37_79b9u32;
        let mut free: Vec<u16> = (0..16).collect();
        let mut under_way = HashSet::new();
        let mut done = 0;
        while done < REQUESTS {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let wanted = usize::try_from(random >> 28).unwrap() + 1;
            let mut offered = 0;
            while offered < wanted
                && let Some(slot) = free.pop()
            {
                let head = guest.build(slot, IN, 0, 512);
                guest.offer(head);
                under_way.insert(head);
                offered += 1;
            }
            guest.kick_if_wanted(u16::try_from(offered).unwrap());
            for (head, len) in guest.wait(1) {
                assert!(under_way.remove(&head), "{head} came back twice");
                assert_eq!((len, guest.status(head / 3)), (513, 0));
                free.push(head / 3);
                done += 1;
            }
        }
        guest.wait(under_way.len());
        assert_eq!(served.stop().await, guest.available);
    }
}

#[tokio::test]
async fn a_polling_context_needs_no_kick() {
    let world = World::new(MIB).await;
    world.contexts.main().set_polling(stord_aio::PollParams {
        max_ns: 1_000_000_000,
        grow: 1_000_000,
        shrink: 1,
    });
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    // The time grows when something comes soon.
    for _ in 0..10 {
        assert_eq!(guest.perform(IN, 0, 512).0, 0);
    }
    let head = guest.build(0, IN, 0, 512);
    guest.offer(head);
    assert_eq!(guest.wait(1).len(), 1);
    served.stop().await;
}

#[tokio::test]
async fn a_queue_follows_its_ring_when_memory_is_mapped_anew() {
    let world = World::new(MIB).await;
    let mut guest = Guest::new(8, FEATURES);
    let served = world.serve(&guest);
    assert_eq!(guest.perform(IN, 0, 512).0, 0);
    // The same content in other memory, where the old one stays as it is.
    let (_, mapping) = shared(RAM);
    let copy = mapping.buffer();
    copy.write_at(0, &guest.memory.to_vec());
    guest.map.change(|regions| {
        assert_eq!(regions.remove(BASE, 1), 1);
        let region = crate::virtio::memory::Region {
            addr: BASE,
            len: RAM as u64,
            writable: true,
            mapping,
            offset: 0,
        };
        regions.insert(region).unwrap();
    });
    guest.move_to(copy);
    assert_eq!(guest.perform(IN, 0, 512).0, 0);
    served.stop().await;
}
