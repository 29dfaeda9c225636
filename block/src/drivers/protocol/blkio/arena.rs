//! Who has which pages of the memory that data passes through.
//!
//! The lowest free pages are taken first, so that few requests in flight use few pages, again and again.

/// Bytes of a page, the unit of everything here.
pub(super) const PAGE: usize = 4096;

/// The free pages of an area.
pub(super) struct Arena {
    /// Runs of free pages, ascending, never adjacent.
    free: Vec<Run>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: usize,
    count: usize,
}

impl Arena {
    /// An area of so many bytes, rounded down to pages, all free.
    pub(super) fn new(len: usize) -> Self {
        Self {
            free: vec![Run {
                first: 0,
                count: len / PAGE,
            }],
        }
    }

    /// Takes room for `len` bytes in one piece. Gives its offset in bytes; `None` where there is no such piece now.
    pub(super) fn take(&mut self, len: usize) -> Option<usize> {
        let count = len.div_ceil(PAGE);
        if count == 0 {
            return Some(0);
        }
        let at = self.free.iter().position(|run| run.count >= count)?;
        let run = &mut self.free[at];
        let first = run.first;
        run.first += count;
        run.count -= count;
        if run.count == 0 {
            self.free.remove(at);
        }
        Some(first * PAGE)
    }

    /// Gives back what `take` gave for `len` bytes.
    pub(super) fn give_back(&mut self, offset: usize, len: usize) {
        let count = len.div_ceil(PAGE);
        if count == 0 {
            return;
        }
        let mut run = Run {
            first: offset / PAGE,
            count,
        };
        let at = self.free.partition_point(|other| other.first < run.first);
        if let Some(next) = self.free.get(at).copied()
            && run.first + run.count == next.first
        {
            run.count += next.count;
            self.free.remove(at);
        }
        if let Some(before) = at.checked_sub(1).and_then(|at| self.free.get_mut(at))
            && before.first + before.count == run.first
        {
            before.count += run.count;
        } else {
            self.free.insert(at, run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn pieces_never_overlap_and_all_come_back() {
        const PAGES: usize = 64;
        let mut random = Random::new(1);
        let mut arena = Arena::new(PAGES * PAGE + 100);
        let mut taken: Vec<(usize, usize)> = Vec::new();
        let mut used = [false; PAGES];
        for _ in 0..5000 {
            if random.one_in(2) {
                let len = usize::try_from(random.below(10 * PAGE as u64)).unwrap();
                let pages = len.div_ceil(PAGE);
                match arena.take(len) {
                    Some(offset) => {
                        for page in &mut used[offset / PAGE..offset / PAGE + pages] {
                            assert!(!std::mem::replace(page, true));
                        }
                        taken.push((offset, len));
                    }
                    None => assert!(!used.windows(pages).any(|run| run.iter().all(|used| !used))),
                }
            } else if !taken.is_empty() {
                let at = usize::try_from(random.below(taken.len() as u64)).unwrap();
                let (offset, len) = taken.swap_remove(at);
                used[offset / PAGE..offset / PAGE + len.div_ceil(PAGE)].fill(false);
                arena.give_back(offset, len);
            }
        }
        for (offset, len) in taken {
            arena.give_back(offset, len);
        }
        assert_eq!(
            arena.free,
            [Run {
                first: 0,
                count: PAGES
            }]
        );
        assert_eq!(arena.take(PAGES * PAGE), Some(0));
        assert_eq!(arena.take(1), None);
    }
}
