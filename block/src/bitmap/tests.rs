//! Bits against a model that is a vector of booleans.

use super::*;
use crate::testing::Random;

fn bitmap(granularity_bits: u32, size: u64) -> DirtyBitmap {
    DirtyBitmap::new("b".to_owned(), granularity_bits, size, BitmapState::ENABLED)
}

fn model_of(bitmap: &DirtyBitmap) -> Vec<bool> {
    let bits = bitmap.bits.load();
    let mut model = vec![false; usize::try_from(bits.len).expect("small")];
    for run in bits.runs() {
        for bit in run {
            model[usize::try_from(bit).expect("small")] = true;
        }
    }
    model
}

#[test]
fn bits_are_those_of_the_ranges() {
    let mut random = Random::new(1);
    for granularity_bits in [9, 12, 16] {
        let size = (100_000u64 << granularity_bits) + 300;
        let bitmap = bitmap(granularity_bits, size);
        let mut model = vec![false; 100_001];
        for _ in 0..200 {
            let start = random.below(size);
            let len = 1 + random.below((size - start).min(3000 << granularity_bits));
            bitmap.set(start, len);
            let first = usize::try_from(start >> granularity_bits).expect("small");
            let last = usize::try_from((start + len - 1) >> granularity_bits).expect("small");
            model[first..=last].fill(true);
        }
        assert!(model == model_of(&bitmap));
        let set = model.iter().filter(|bit| **bit).count() as u64;
        assert_eq!(bitmap.dirty_bytes(), set << granularity_bits);
        // Stored and loaded, whole and byte by byte.
        let other = DirtyBitmap::new("o".to_owned(), granularity_bits, size, BitmapState::empty());
        let bytewise =
            DirtyBitmap::new("o".to_owned(), granularity_bits, size, BitmapState::empty());
        for index in 0..bitmap.pieces() {
            other.load(index, &bitmap.piece(index));
            bytewise.load_some((index * STORED_PIECE) as u64, &bitmap.piece(index));
        }
        assert!(model == model_of(&other) && model == model_of(&bytewise));
        assert_eq!(bitmap.sha256(), other.sha256());
    }
}

#[test]
fn resizing_keeps_what_is_left_and_adds_clear_bits() {
    let bitmap = bitmap(9, 512 * 70_000);
    bitmap.set(0, 512 * 70_000);
    bitmap.resize(512 * 40_000);
    bitmap.resize(512 * 90_000);
    let model = model_of(&bitmap);
    assert!(model[..40_000].iter().all(|bit| *bit));
    assert!(!model[40_000..].iter().any(|bit| *bit));
    bitmap.clear();
    assert_eq!(bitmap.dirty_bytes(), 0);
    bitmap.load_ones(0..bitmap.pieces());
    assert_eq!(bitmap.dirty_bytes(), 512 * 90_000);
}

#[test]
fn merging_covers_with_other_granularities() {
    let fine = bitmap(9, 1 << 20);
    let coarse = bitmap(16, 1 << 20);
    fine.set(65_536 * 3 + 512, 512);
    fine.set((1 << 20) - 1, 1);
    coarse.merge(&fine);
    assert_eq!(coarse.dirty_bytes(), 2 * 65_536);
    let back = bitmap(9, 1 << 20);
    back.merge(&coarse);
    assert_eq!(back.dirty_bytes(), 2 * 65_536);
}

#[test]
fn only_enabled_bitmaps_record() {
    let bitmaps = Bitmaps::default();
    let first = Arc::new(bitmap(12, 1 << 20));
    bitmaps.add(Arc::clone(&first));
    bitmaps.mark(0, 1);
    first.set_state(BitmapState::ENABLED, false);
    bitmaps.refresh();
    bitmaps.mark(8192, 1);
    assert_eq!(first.dirty_bytes(), 4096);
}

#[test]
fn memory_follows_what_is_set() {
    // All its bits would take 512 MiB.
    let huge = bitmap(12, 1 << 44);
    huge.set(1 << 43, 4096);
    assert_eq!(huge.dirty_bytes(), 4096);
}

#[test]
fn extents_end_where_the_bits_change() {
    let bitmap = DirtyBitmap::new("b".to_owned(), 16, 1 << 40, BitmapState::ENABLED);
    const GRANULE: u64 = 1 << 16;
    bitmap.set(3 * GRANULE, 1);
    bitmap.set(5 * GRANULE, 90 * GRANULE);
    // Past the first piece, and across the boundary of the second.
    let far = 2 * PIECE_BITS * GRANULE;
    bitmap.set(far - GRANULE, 2 * GRANULE);
    let at = |offset, len| bitmap.extent(offset, len);
    assert_eq!(at(0, 1 << 40), (false, 3 * GRANULE));
    assert_eq!(at(100, 200), (false, 200));
    assert_eq!(at(3 * GRANULE + 5, 1 << 30), (true, GRANULE - 5));
    assert_eq!(at(5 * GRANULE, 1 << 30), (true, 90 * GRANULE));
    assert_eq!(at(6 * GRANULE, GRANULE), (true, GRANULE));
    assert_eq!(at(95 * GRANULE, 1 << 40), (false, far - 96 * GRANULE));
    assert_eq!(at(far - 1, 1 << 40), (true, GRANULE + 1));
    assert_eq!(at(far + GRANULE, 1 << 39), (false, 1 << 39));
}
