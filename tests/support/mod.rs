//! What every integration test leans on: guards that leave nothing behind, the daemon under test, its QMP, and QEMU's
//! tools as oracles.
//!
//! The daemon is the one cargo built, or the program that `STORD_BIN` names. The latter may be `qemu-storage-daemon`
//! itself: wherever stord has to behave like it, the test can be checked against the original.

pub mod daemon;
pub mod direct;
pub mod disk;
pub mod loop_device;
pub mod model;
pub mod mounts;
pub mod pki;
pub mod prerequisites;
pub mod qemu;
pub mod qmp;
pub mod refusal;
pub mod run;
pub mod scratch;

pub use prerequisites::{needs, needs_root};
pub use qmp::Qmp;
pub use run::{run, run_ok};
pub use scratch::Scratch;

use std::time::{Duration, Instant};

/// Polls until `condition` holds; panics with `what` after `seconds`.
#[track_caller]
pub fn eventually(what: &str, seconds: u64, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < deadline, "not within {seconds} s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
