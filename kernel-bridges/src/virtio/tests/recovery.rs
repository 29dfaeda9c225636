//! A queue whose server died at any point, and the one who goes on after it: no request is lost, none completes twice, and none that the
//! driver has got back is done again.

use std::os::unix::fs::FileExt as _;

use super::driver::*;
use super::*;
use crate::virtio::in_flight::Record;
use crate::virtio::memory::mapping::Mapping;
use crate::virtio::ring::split::SplitRing;

/// How far the dead server has come with its last batch of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// It has seen them, no more.
    Seen,
    /// Noted that they are under way: all but the last, then all.
    TakenInPart,
    Taken,
    /// Done what they want.
    Done,
    /// Put them on the list of the batch: all but the last, then all.
    ListedInPart,
    Listed,
    /// Shown the driver.
    Published,
    /// Forgotten them: all but the last, then all.
    ForgottenInPart,
    Forgotten,
    /// Noted how far the driver has been shown.
    Noted,
}

const STEPS: [Step; 10] = [
    Step::Seen,
    Step::TakenInPart,
    Step::Taken,
    Step::Done,
    Step::ListedInPart,
    Step::Listed,
    Step::Published,
    Step::ForgottenInPart,
    Step::Forgotten,
    Step::Noted,
];

/// Serves all that is available, up to a step of the last batch, with the steps in the order of a queue.
fn serve_until(
    ring: &mut SplitRing,
    record: &mut Record,
    step: Step,
    mut carry_out: impl FnMut(u16),
) {
    let count = ring.available().unwrap();
    let mut heads = Vec::new();
    for number in 1..=count {
        let may_take = step >= Step::Taken || (step == Step::TakenInPart && number < count);
        if !may_take {
            break;
        }
        let head = ring.take().unwrap();
        record.take(head);
        heads.push(head);
    }
    // They end in another order than they came in.
    heads.reverse();
    if step < Step::Done {
        return;
    }
    heads.iter().for_each(|head| carry_out(*head));
    let (_, others) = heads.split_last().unwrap();
    let but_last = |part, whole| match step {
        step if step >= whole => &heads[..],
        step if step == part => others,
        _ => &[],
    };
    for head in but_last(Step::ListedInPart, Step::Listed) {
        ring.give_back(*head, 1);
        record.give_back(*head);
    }
    if step < Step::Published {
        return;
    }
    ring.publish();
    for head in but_last(Step::ForgottenInPart, Step::Forgotten) {
        record.forget(*head);
    }
    if step >= Step::Noted {
        record.note_used(ring.published());
    }
}

struct Case<'a> {
    world: &'a World,
    guest: Guest,
    mapping: Arc<Mapping>,
    in_flight: InFlight,
}

impl<'a> Case<'a> {
    fn new(world: &'a World, start: u16) -> Self {
        let guest = Guest::starting_at(16, FEATURES, start);
        let (_, mapping) = shared(4096);
        let in_flight = InFlight::new(Arc::clone(&mapping), 64, 16).unwrap();
        Self {
            world,
            guest,
            mapping,
            in_flight,
        }
    }

    /// Offers writes of different bytes to different sectors.
    fn offer(&mut self, slots: std::ops::Range<u16>) {
        for slot in slots {
            let byte = u8::try_from(slot + 1).unwrap();
            self.guest.put(Guest::data_at(slot), &[byte; 512]);
            let head = self.guest.build(slot, OUT, slot.into(), 512);
            self.guest.offer(head);
        }
    }
}

#[tokio::test]
async fn no_write_is_lost_or_done_again_wherever_the_server_dies() {
    let world = World::new(MIB).await;
    for start in [0, 65533] {
        for earlier in [None, Some(Step::Noted)] {
            for step in STEPS {
                dies_at(&world, start, earlier, step).await;
            }
        }
    }
}

async fn dies_at(world: &World, start: u16, earlier: Option<Step>, step: Step) {
    let case = format!("{start} {earlier:?} {step:?}");
    let mut test = Case::new(world, start);
    let image = test.world.image.reopen().unwrap();
    image.write_all_at(&[0; 4096], 0).unwrap();
    {
        let memory = test.guest.map.local();
        let mut ring = SplitRing::new(test.guest.place, &memory, start, FEATURES).unwrap();
        let mut record = test.in_flight.open(16).unwrap();
        assert_eq!(record.recover(ring.published()), None, "{case}");
        let carry_out = |head: u16| {
            let slot = head / 3;
            let byte = u8::try_from(slot + 1).unwrap();
            let at = 512 * u64::from(slot);
            image.write_all_at(&[byte; 512], at).unwrap();
        };
        if let Some(earlier) = earlier {
            test.offer(0..2);
            serve_until(&mut ring, &mut record, earlier, carry_out);
            assert_eq!(test.guest.returned(), [(3, 1), (0, 1)], "{case}");
        }
        test.offer(0..4);
        serve_until(&mut ring, &mut record, step, carry_out);
    }
    // What the driver has got back belongs to it again: whoever did such a request once more would write this.
    let before = test.guest.returned();
    for (head, _) in &before {
        test.guest.put(Guest::data_at(head / 3), &[0xee; 512]);
    }
    test.offer(4..5);
    // A record knows better than whoever says where to go on.
    let lie = start.wrapping_add(9);
    let record = Some(test.in_flight.clone());
    let served = test.world.serve_from(&test.guest, lie, record);
    let mut returned = before.clone();
    returned.extend(test.guest.wait(5 - before.len()));
    let mut heads: Vec<u16> = returned.iter().map(|(head, _)| *head).collect();
    heads.sort_unstable();
    assert_eq!(heads, [0, 3, 6, 9, 12], "{case}");
    let after: Vec<u16> = returned[before.len()..]
        .iter()
        .map(|(head, _)| *head)
        .collect();
    assert!(
        after.is_sorted(),
        "in the order of their coming: {after:?} {case}"
    );
    assert_eq!(served.stop().await, test.guest.available, "{case}");
    assert_eq!(test.guest.returned(), [], "{case}");
    for slot in 0..5 {
        let at = 512 * usize::from(slot);
        let expected = [slot + 1; 512];
        assert_eq!(test.world.image()[at..at + 512], expected, "{case}");
    }
    // Nothing is left for the next.
    let mut record = test.in_flight.open(16).unwrap();
    let memory = test.guest.map.local();
    let ring = SplitRing::new(test.guest.place, &memory, 0, FEATURES).unwrap();
    assert_eq!(record.recover(ring.published()), Some(vec![]), "{case}");
}

#[tokio::test]
async fn a_fresh_record_believes_what_it_is_told() {
    let world = World::new(MIB).await;
    let mut test = Case::new(&world, 7);
    let record = Some(test.in_flight.clone());
    test.offer(0..2);
    let served = test.world.serve_from(&test.guest, 7, record);
    assert_eq!(test.guest.wait(2).len(), 2);
    assert_eq!(served.stop().await, 9);
}

#[tokio::test]
async fn a_cleared_record_is_a_fresh_one() {
    let world = World::new(MIB).await;
    let mut test = Case::new(&world, 0);
    let record = Some(test.in_flight.clone());
    test.offer(0..2);
    let served = test.world.serve_from(&test.guest, 0, record.clone());
    test.guest.wait(2);
    served.stop().await;
    let before = test.mapping.buffer().to_vec();
    assert!(before[64..].iter().any(|byte| *byte != 0));
    assert!(before[..64].iter().all(|byte| *byte == 0), "outside");
    test.in_flight.clear();
    assert!(test.mapping.buffer().is_zero());
    // The driver begins again.
    let mut guest = Guest::starting_at(16, FEATURES, 0);
    let served = test.world.serve_from(&guest, 0, record);
    assert_eq!(guest.perform(IN, 0, 512).0, 0);
    served.stop().await;
}

/// The record is in memory that others can write to.
#[tokio::test]
async fn a_record_of_rubbish_breaks_the_queue_at_worst() {
    let world = World::new(MIB).await;
    for seed in 0..200u64 {
        let mut test = Case::new(&world, 0);
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut bytes = vec![0; 64 + 512];
        for byte in &mut bytes {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            *byte = random.to_le_bytes()[if seed % 3 == 0 { 7 } else { 0 }];
        }
        test.mapping.buffer().write_at(64, &bytes[64..]);
        // Used before.
        test.mapping.buffer().write_at(64 + 8, &1u16.to_le_bytes());
        test.offer(0..5);
        let record = Some(test.in_flight.clone());
        let served = test.world.serve_from(&test.guest, 0, record);
        served.queue.stop().await;
    }
}

#[test]
fn what_is_left_is_served_in_the_order_of_its_coming() {
    let (_, mapping) = shared(4096);
    let in_flight = InFlight::new(mapping, 0, 16).unwrap();
    let mut record = in_flight.open(16).unwrap();
    assert_eq!(record.recover(0), None);
    for head in [9, 3, 12, 0, 6] {
        record.take(head);
    }
    for head in [12, 9] {
        record.give_back(head);
        record.forget(head);
    }
    record.note_used(2);
    let mut next = in_flight.open(16).unwrap();
    assert_eq!(next.recover(2), Some(vec![3, 0, 6]));
    // The next one dies, too, with something new under way.
    next.take(9);
    let mut last = in_flight.open(16).unwrap();
    assert_eq!(last.recover(2), Some(vec![3, 0, 6, 9]));
}

#[test]
fn a_record_has_room_for_its_queue() {
    let (_, mapping) = shared(4096);
    assert_eq!(InFlight::size(1), 64);
    assert_eq!(InFlight::size(3), 64);
    assert_eq!(InFlight::size(4), 128);
    assert_eq!(InFlight::size(256), 4160);
    assert!(InFlight::new(Arc::clone(&mapping), 0, 252).is_some());
    assert!(InFlight::new(Arc::clone(&mapping), 64, 252).is_none());
    assert!(InFlight::new(Arc::clone(&mapping), 8, 4).is_none());
    assert!(InFlight::new(Arc::clone(&mapping), usize::MAX - 15, 4).is_none());
    let record = InFlight::new(mapping, 0, 8).unwrap();
    assert!(record.open(8).is_some());
    assert!(record.open(16).is_none());
}
