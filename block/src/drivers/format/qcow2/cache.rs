//! The L2 cache: pieces of L2 tables ("slices"), looked up from every context without a lock.
//!
//! Slices are numbered by the guest range that they map, not by their place in the file, so a table that moves keeps its slices. A slice
//! is found by `number % sets`, hence a disk that fits into the cache has a place for each of its slices.
//!
//! Who finds a slice may keep reading it while it is evicted or changed: entries are atomic, and the memory lives as long as anybody
//! looks at it. Changes of entries, of a slice's state and of the cache's content happen under the image's metadata lock; only clean
//! slices are evicted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use arc_swap::ArcSwapOption;
use stord_aio::IoBuffer;

const WAYS: usize = 8;
const EMPTY: u64 = u64::MAX;

/// What is left to do for a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// As on disk.
    Clean,
    /// Changed since it was last handed to the file.
    Dirty,
    /// On its way to the file, unchanged since.
    Writing,
    /// On its way to the file, and changed since.
    WritingDirty,
}

/// A piece of an L2 table.
#[derive(Debug)]
pub(super) struct Slice {
    number: u64,
    words: Box<[AtomicU64]>,
    /// Odd while an entry of several words changes.
    version: AtomicU32,
    state: AtomicU8,
    used: AtomicBool,
    /// Up to which change of the metadata's places the entries are known to point to none of it.
    pub(super) checked: AtomicU64,
}

impl Slice {
    pub(super) fn new(number: u64, words: Box<[AtomicU64]>) -> Self {
        Self {
            number,
            words,
            version: AtomicU32::new(0),
            state: AtomicU8::new(0),
            used: AtomicBool::new(true),
            checked: AtomicU64::new(0),
        }
    }

    /// A slice as it is on disk.
    pub(super) fn from_disk(number: u64, bytes: &IoBuffer) -> Self {
        // By way of the stack: a copy on the heap would leave a hole among the slices.
        const PIECE: usize = 512;
        let mut words = Vec::with_capacity(bytes.len() / 8);
        for at in (0..bytes.len()).step_by(PIECE) {
            let mut piece = [0; PIECE];
            let piece = &mut piece[..PIECE.min(bytes.len() - at)];
            bytes.read_at(at, piece);
            words.extend(
                piece
                    .chunks_exact(8)
                    .map(|word| AtomicU64::new(word.try_into().map_or(0, u64::from_be_bytes))),
            );
        }
        Self::new(number, words.into_boxed_slice())
    }

    /// A slice of empty entries.
    pub(super) fn empty(number: u64, words: usize) -> Self {
        Self::new(number, (0..words).map(|_| AtomicU64::new(0)).collect())
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn words(&self) -> usize {
        self.words.len()
    }

    /// A word of the table; 0 past the end.
    pub(super) fn word(&self, index: usize) -> u64 {
        self.words
            .get(index)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// The words as they go to disk.
    pub(super) fn to_disk(&self) -> Vec<u8> {
        self.words
            .iter()
            .flat_map(|word| word.load(Ordering::Acquire).to_be_bytes())
            .collect()
    }

    /// Runs `read` so that it sees every entry of several words whole; `None` where changes keep getting in the way.
    pub(super) fn consistent<T>(&self, read: impl Fn() -> T) -> Option<T> {
        for _ in 0..64 {
            let before = self.version.load(Ordering::Acquire);
            if before & 1 == 0 {
                let value = read();
                fence(Ordering::Acquire);
                if self.version.load(Ordering::Relaxed) == before {
                    return Some(value);
                }
            }
            std::hint::spin_loop();
        }
        None
    }

    /// Sets words from `index` on. Needs the metadata lock.
    pub(super) fn set(&self, index: usize, words: &[u64]) {
        if let [word] = words {
            self.words[index].store(*word, Ordering::Release);
            return;
        }
        self.version.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::Release);
        for (place, word) in self.words[index..].iter().zip(words) {
            place.store(*word, Ordering::Release);
        }
        self.version.fetch_add(1, Ordering::Release);
    }

    pub(super) fn state(&self) -> State {
        match self.state.load(Ordering::Relaxed) {
            0 => State::Clean,
            1 => State::Dirty,
            2 => State::Writing,
            _ => State::WritingDirty,
        }
    }

    /// Needs the metadata lock.
    pub(super) fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    fn touch(&self) {
        // Reading first keeps the line shared among the processors.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }
}

#[derive(Debug)]
struct Set {
    numbers: [AtomicU64; WAYS],
    slices: [ArcSwapOption<Slice>; WAYS],
    hand: AtomicU8,
}

impl Set {
    fn new() -> Self {
        Self {
            numbers: [const { AtomicU64::new(EMPTY) }; WAYS],
            slices: [const { ArcSwapOption::const_empty() }; WAYS],
            hand: AtomicU8::new(0),
        }
    }
}

/// Why a slice could not be taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AllDirty;

/// The cache.
#[derive(Debug)]
pub(super) struct SliceCache {
    sets: Box<[Set]>,
}

impl SliceCache {
    /// A cache of `bytes` for slices of `slice_bytes`, but at least one set.
    pub(super) fn new(bytes: u64, slice_bytes: u64) -> Self {
        let slices = bytes.div_ceil(slice_bytes);
        let sets = slices.div_ceil(WAYS as u64).max(1);
        Self {
            sets: (0..sets).map(|_| Set::new()).collect(),
        }
    }

    fn set_of(&self, number: u64) -> &Set {
        let sets = self.sets.len() as u64;
        let index = if sets == 1 { 0 } else { number % sets };
        &self.sets[usize::try_from(index).expect("below the number of sets")]
    }

    /// Calls `f` with the slice, if it is here.
    pub(super) fn with<T>(&self, number: u64, f: impl FnOnce(&Arc<Slice>) -> T) -> Option<T> {
        let set = self.set_of(number);
        for (way, slice) in set.numbers.iter().zip(&set.slices) {
            if way.load(Ordering::Acquire) == number {
                let guard = slice.load();
                if let Some(slice) = guard.as_ref().filter(|slice| slice.number == number) {
                    slice.touch();
                    return Some(f(slice));
                }
            }
        }
        None
    }

    /// The slice, if it is here.
    pub(super) fn get(&self, number: u64) -> Option<Arc<Slice>> {
        self.with(number, Arc::clone)
    }

    /// Takes a slice in, in place of one that has not been used for a while. Needs the metadata lock.
    pub(super) fn insert(&self, slice: Arc<Slice>) -> Result<(), AllDirty> {
        let set = self.set_of(slice.number);
        let way = Self::victim(set).ok_or(AllDirty)?;
        set.numbers[way].store(slice.number, Ordering::Release);
        set.slices[way].store(Some(slice));
        Ok(())
    }

    /// The clock algorithm within a set: passes over what was used since the hand came by last.
    fn victim(set: &Set) -> Option<usize> {
        if let Some(way) = set.slices.iter().position(|slice| slice.load().is_none()) {
            return Some(way);
        }
        let start = usize::from(set.hand.load(Ordering::Relaxed));
        for step in 0..2 * WAYS {
            let way = (start + step) % WAYS;
            let slice = set.slices[way].load();
            let Some(slice) = slice.as_ref() else {
                return Some(way);
            };
            if slice.state() == State::Clean && !slice.used.swap(false, Ordering::Relaxed) {
                set.hand.store(
                    u8::try_from((way + 1) % WAYS).unwrap_or(0),
                    Ordering::Relaxed,
                );
                return Some(way);
            }
        }
        None
    }

    /// Drops everything. Needs the metadata lock, and nothing may be dirty.
    pub(super) fn clear(&self) {
        for set in &self.sets {
            for (number, place) in set.numbers.iter().zip(&set.slices) {
                number.store(EMPTY, Ordering::Release);
                place.store(None);
            }
        }
    }

    /// Drops what has not been used since the last call; gives the number of slices. Needs the metadata lock.
    pub(super) fn drop_unused(&self) -> usize {
        let mut dropped = 0;
        for set in &self.sets {
            for (number, place) in set.numbers.iter().zip(&set.slices) {
                let slice = place.load_full();
                if let Some(slice) = slice
                    && slice.state() == State::Clean
                    && !slice.used.swap(false, Ordering::Relaxed)
                {
                    number.store(EMPTY, Ordering::Release);
                    place.store(None);
                    dropped += 1;
                }
            }
        }
        dropped
    }
}
