//! Rings of rubbish, with sense enough in them to get far.

use proptest::collection::vec;
use proptest::prelude::*;
use stord_aio::{IoBuffer, IoVec};

use super::driver::*;
use super::*;
use crate::virtio::blk::request::{Command, Limits, Request};
use crate::virtio::memory::{Access, GuestMemory as _};
use crate::virtio::ring::split::SplitRing;

/// One descriptor.
#[derive(Clone, Debug)]
struct Rubbish {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn address() -> impl Strategy<Value = u64> {
    let end = BASE + RAM as u64;
    prop_oneof![
        // The ring itself, tables of descriptors, other memory, its ends, and anything.
        3 => BASE..BASE + 0x400,
        4 => (0u64..4).prop_map(|table| BASE + Guest::data_at(100) + 0x40 * table),
        6 => BASE + Guest::data_at(0)..BASE + Guest::data_at(50),
        2 => end - 0x300..end + 0x10,
        1 => any::<u64>(),
    ]
}

fn rubbish() -> impl Strategy<Value = Rubbish> {
    let len = prop_oneof![
        4 => Just(16u32),
        4 => Just(512),
        2 => Just(1),
        2 => 0u32..2048,
        2 => (0u32..8).prop_map(|count| 16 * count),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        5 => Just(NEXT),
        5 => Just(NEXT | WRITE),
        4 => Just(WRITE),
        1 => Just(0),
        3 => Just(INDIRECT),
        1 => any::<u16>(),
    ];
    let next = prop_oneof![9 => 0u16..16, 1 => any::<u16>()];
    (address(), len, flags, next).prop_map(|(addr, len, flags, next)| Rubbish {
        addr,
        len,
        flags,
        next,
    })
}

/// A header, mostly of a request that exists.
fn header() -> impl Strategy<Value = [u8; 16]> {
    let kind = prop_oneof![9 => prop::sample::select(vec![IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES]), 1 => any::<u32>()];
    let sector = prop_oneof![9 => 0u64..2100, 1 => any::<u64>()];
    (kind, sector).prop_map(|(kind, sector)| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    })
}

fn lay_out(guest: &Guest, ring: &[Rubbish], tables: &[Rubbish], headers: &[[u8; 16]]) {
    for (index, one) in (0..).zip(ring) {
        guest.describe(index, one.addr, one.len, one.flags, one.next);
    }
    for (index, one) in (0u64..).zip(tables) {
        let at = Guest::data_at(100) + 16 * index;
        guest.describe_at(at, one.addr, one.len, one.flags, one.next % 8);
    }
    for (slot, header) in (0..).zip(headers) {
        guest.put(Guest::data_at(slot), header);
    }
}

/// Every byte of a request is in the guest's memory, and no request is more than it may be.
fn check(request: &Request, memory: &IoBuffer) {
    let start = memory.addr();
    let inside = |data: &IoVec| {
        data.buffers().iter().all(|piece| {
            !piece.is_empty()
                && piece.addr() >= start
                && piece.addr() + piece.len() <= start + memory.len()
        })
    };
    let on_disk = |offset: u64, len: u64| {
        offset.is_multiple_of(512) && len.is_multiple_of(512) && offset + len <= MIB
    };
    assert!(inside(&request.status.clone().into()) && request.status.len() == 1);
    assert!(request.writable > 0);
    match &request.command {
        Command::Read { offset, data } | Command::Write { offset, data } => {
            assert!(inside(data) && on_disk(*offset, data.len()));
        }
        Command::GetId(data) => assert!(inside(data)),
        Command::Discard { offset, len } | Command::WriteZeroes { offset, len, .. } => {
            assert!(on_disk(*offset, *len) && *len <= 32768 * 512);
        }
        Command::Flush | Command::Refused(_) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chains_of_rubbish_are_refused_or_stay_in_memory(
        ring in vec(rubbish(), 16),
        tables in vec(rubbish(), 16),
        headers in vec(header(), 8),
    ) {
        thread_local! {
            static GUEST: Guest = Guest::new(16, FEATURES);
        }
        GUEST.with(|guest| {
            lay_out(guest, &ring, &tables, &headers);
            let memory = guest.map.local();
            let queue = SplitRing::new(guest.place, &memory, 0, guest.features).unwrap();
            // As its server maps it.
            let mapped = memory.contiguous(BASE, RAM, Access::Write).unwrap();
            let limits = Limits { size: MIB, logical_block_size: 512, writable: true };
            for head in 0..16 {
                let chain = queue.chain(head, &memory);
                if let Ok(request) = chain.and_then(|chain| Request::parse(&chain, limits)) {
                    check(&request, &mapped);
                }
            }
        });
    }
}

/// Whole queues: what they are asked for is rubbish, and they stop when told, with everything given back that was taken.
#[test]
fn queues_survive_rubbish() {
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let world = World::new(MIB).await;
        let config = ProptestConfig::default();
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
        let mut runner = TestRunner::new_with_rng(config, rng);
        let strategy = (
            vec(rubbish(), 16),
            vec(rubbish(), 16),
            vec(header(), 8),
            vec(prop_oneof![15 => 0u16..16, 1 => any::<u16>()], 1..16),
        );
        for _ in 0..150 {
            let (ring, tables, headers, heads) = strategy.new_tree(&mut runner).unwrap().current();
            let mut guest = Guest::new(16, FEATURES);
            lay_out(&guest, &ring, &tables, &headers);
            let served = world.serve(&guest);
            for head in heads {
                guest.offer(head);
                guest.kick();
            }
            served.queue.stop().await;
        }
        let mut guest = Guest::new(16, FEATURES);
        let served = world.serve(&guest);
        assert_eq!(guest.perform(IN, 0, 512).0, 0);
        served.stop().await;
    });
}
