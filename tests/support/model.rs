//! A plain copy of what a disk must hold, beside which the real one is driven.

use std::sync::LazyLock;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Random numbers that are the same in every run, unless `STORD_SEED` gives the run another number than 0.
pub fn rng(seed: u64) -> StdRng {
    static RUN: LazyLock<u64> = LazyLock::new(|| {
        let seed = std::env::var("STORD_SEED").unwrap_or_default();
        seed.parse().unwrap_or(0)
    });
    StdRng::seed_from_u64(seed.wrapping_add(RUN.wrapping_mul(1_000_003)))
}

/// `len` bytes that no other call with another seed gives.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng(seed).fill_bytes(&mut bytes);
    bytes
}

/// Asserts that two contents are equal, and says where they differ first instead of printing them.
#[track_caller]
pub fn assert_same(what: &str, got: &[u8], wanted: &[u8]) {
    assert_eq!(got.len(), wanted.len(), "{what}: the length");
    if got == wanted {
        return;
    }
    let at = got
        .iter()
        .zip(wanted)
        .position(|(a, b)| a != b)
        .expect("they differ");
    let bad = got.iter().zip(wanted).filter(|(a, b)| a != b).count();
    let end = (at + 16).min(got.len());
    panic!(
        "{what}: {bad} of {} bytes differ, the first at {at:#x}: got {:02x?}, wanted {:02x?}",
        got.len(),
        &got[at..end],
        &wanted[at..end]
    );
}
