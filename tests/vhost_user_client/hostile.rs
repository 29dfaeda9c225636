//! Back ends that say and do what none should: the daemon refuses them or drops them, and goes on.

use std::sync::atomic::Ordering;

use super::back_end::{Behaviour, Deed, start};
use super::{Passing, node};
use crate::needs;
use crate::support::daemon::run_to_end;
use crate::support::{Scratch, eventually};

#[test]
fn back_ends_that_are_no_disks_are_refused() {
    let good = Behaviour::good;
    let config = |set: &[(usize, u32)]| {
        let mut config = good().config.unwrap();
        for (at, word) in set {
            config[*at..*at + 4].copy_from_slice(&word.to_le_bytes());
        }
        Some(config)
    };
    let cases = [
        (
            Behaviour {
                features: 1 << 32,
                ..good()
            },
            "Backend doesn't support PROTOCOL_FEATURES",
        ),
        (
            Behaviour {
                features: 1 << 30,
                ..good()
            },
            "the back end's device is older than virtio 1.0",
        ),
        (
            Behaviour {
                protocol: 1,
                ..good()
            },
            "Backend doesn't support required protocol features",
        ),
        (
            Behaviour {
                config: None,
                ..good()
            },
            "refuses to tell its configuration",
        ),
        (
            Behaviour {
                config: Some(vec![0; 59]),
                ..good()
            },
            "something else than its configuration",
        ),
        (
            Behaviour {
                config: Some(vec![0; 8000]),
                ..good()
            },
            "does not answer GetConfig",
        ),
        (
            Behaviour {
                claimed: Some(u32::MAX),
                ..good()
            },
            "something else than its configuration",
        ),
        (
            Behaviour {
                config: config(&[(4, u32::MAX)]),
                ..good()
            },
            "is too large",
        ),
        (
            Behaviour {
                features: good().features | 1 << 6,
                config: config(&[(20, 511)]),
                ..good()
            },
            "a block size of 511 bytes is not supported",
        ),
        (
            Behaviour {
                features: good().features | 1 << 1,
                config: config(&[(8, 1)]),
                ..good()
            },
            "segments of 1 bytes are too small",
        ),
        (
            Behaviour {
                protocol: good().protocol | 1,
                queues: 0,
                ..good()
            },
            "the back end has no queue",
        ),
        (
            Behaviour {
                confuse: Some(1),
                ..good()
            },
            "does not answer GetFeatures",
        ),
        (
            Behaviour {
                confuse: Some(5),
                ..good()
            },
            "does not answer SetMemoryTable",
        ),
    ];
    for (number, (behaviour, message)) in cases.into_iter().enumerate() {
        let scratch = Scratch::in_memory();
        start(&scratch.path("in.sock"), vec![behaviour]);
        let ended = run_to_end(&scratch, &["--blockdev", &node(&scratch, "")]);
        assert_eq!(ended.code, Some(1), "case {number}");
        assert!(
            ended.stderr.contains("blkio_connect failed: ") && ended.stderr.contains(message),
            "case {number}: {}",
            ended.stderr
        );
    }
}

/// The daemon with a back end that does so on the first connection and well on those that follow; gives its log.
fn driven_by(deed: Deed, features: u64, expected: &str) {
    let scratch = Scratch::in_memory();
    let mut first = Behaviour::with(deed);
    first.features = features;
    let connections = start(&scratch.path("in.sock"), vec![first, Behaviour::good()]);
    let passing = Passing::start(&scratch, &[], "");
    let said = passing.io(&["read 0 4k"]);
    assert!(said.contains("Input/output error"), "{deed:?}: {said}");
    eventually("the connection is made again", 30, || {
        connections.load(Ordering::SeqCst) > 1
    });
    eventually("the next back end is used", 30, || passing.reads_well());
    let said = passing.io(&["write -P 9 4k 64k", "read -P 9 4k 64k"]);
    assert!(said.contains("read 65536/65536"), "{deed:?}: {said}");
    let log = passing.daemon.log();
    assert!(log.contains(expected), "{deed:?}: {log}");
    passing.daemon.stop();
}

#[test]
fn a_broken_queue_fails_its_requests_and_is_left() {
    needs!("qemu-io");
    let indirect = Behaviour::good().features;
    let direct = indirect & !(1 << 28);
    let broken = "breaks its queue";
    for features in [indirect, direct] {
        for id in [5, 127, 128, 1 << 16, u32::MAX] {
            driven_by(Deed::WrongId(id), features, broken);
        }
        driven_by(Deed::TooMany(2), features, broken);
        driven_by(Deed::TooMany(u16::MAX), features, broken);
    }
    driven_by(Deed::Chatter, indirect, "it sent what was not asked for");
    driven_by(Deed::Leave, indirect, "is lost: it was closed");
}

#[test]
fn what_does_not_matter_is_not_looked_at() {
    needs!("qemu-io");
    for deed in [Deed::WildLength, Deed::Scribble, Deed::Shrink] {
        let scratch = Scratch::in_memory();
        start(&scratch.path("in.sock"), vec![Behaviour::with(deed)]);
        let passing = Passing::start(&scratch, &[], ",reconnect-delay=30");
        for _ in 0..4 {
            // What comes of it is between the back end and its data; the daemon goes on.
            let said = passing.io(&["read 0 64k", "write 8k 64k", "read 12k 8k"]);
            assert!(said.contains("65536/65536"), "{deed:?}: {said}");
        }
        passing.daemon.stop();
    }
    // Whatever is not a good status is none.
    let scratch = Scratch::in_memory();
    start(
        &scratch.path("in.sock"),
        vec![Behaviour::with(Deed::Status(77))],
    );
    let passing = Passing::start(&scratch, &[], "");
    assert!(passing.io(&["read 0 4k"]).contains("Input/output error"));
    passing.daemon.stop();
}
