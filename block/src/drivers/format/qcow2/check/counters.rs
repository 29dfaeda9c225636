//! Counters by cluster number that take no more memory than there is to count: a bit where nothing is counted twice, a byte or eight
//! where something is, nothing where all is zero.

use std::collections::BTreeMap;
use std::ops::Range;

/// Counters in a page.
const PAGE: usize = 4096;
const PAGE_BITS: u32 = PAGE.trailing_zeros();

#[derive(Clone, Debug)]
enum Page {
    Bits(Box<[u64; PAGE / 64]>),
    Bytes(Box<[u8; PAGE]>),
    Words(Box<[u64; PAGE]>),
}

impl Page {
    fn get(&self, index: usize) -> u64 {
        match self {
            Self::Bits(bits) => bits[index / 64] >> (index % 64) & 1,
            Self::Bytes(bytes) => u64::from(bytes[index]),
            Self::Words(words) => words[index],
        }
    }

    fn set(&mut self, index: usize, value: u64) {
        match self {
            Self::Bits(bits) if value <= 1 => {
                let word = &mut bits[index / 64];
                *word = *word & !(1 << (index % 64)) | value << (index % 64);
            }
            Self::Bytes(bytes) if value <= 255 => bytes[index] = value.to_le_bytes()[0],
            Self::Words(words) => words[index] = value,
            _ => {
                self.widen(value);
                self.set(index, value);
            }
        }
    }

    /// Makes room for a value that does not fit.
    fn widen(&mut self, value: u64) {
        *self = if value <= 255 {
            let mut bytes = Box::new([0; PAGE]);
            for (index, byte) in bytes.iter_mut().enumerate() {
                *byte = self.get(index).to_le_bytes()[0];
            }
            Self::Bytes(bytes)
        } else {
            let mut words: Box<[u64; PAGE]> = vec![0; PAGE]
                .into_boxed_slice()
                .try_into()
                .expect("of that length");
            for (index, word) in words.iter_mut().enumerate() {
                *word = self.get(index);
            }
            Self::Words(words)
        };
    }
}

/// The counters; all are zero at first.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    pages: BTreeMap<u64, Page>,
}

/// The page of a cluster, and its place there.
fn place(cluster: u64) -> (u64, usize) {
    let index = usize::try_from(cluster % PAGE as u64).expect("less than a page");
    (cluster >> PAGE_BITS, index)
}

impl Counters {
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let (page, index) = place(cluster);
        self.pages.get(&page).map_or(0, |page| page.get(index))
    }

    /// Counts every cluster of the range so many times more, up to `max`. Gives how many counts that left out.
    pub(super) fn add(&mut self, clusters: Range<u64>, times: u64, max: u64) -> u64 {
        let mut left_out = 0u64;
        self.change(clusters, |value| {
            let room = max.saturating_sub(value);
            left_out = left_out.saturating_add(times.saturating_sub(room));
            value + times.min(room)
        });
        left_out
    }

    /// Counts every cluster of the range once less.
    pub(super) fn subtract(&mut self, clusters: Range<u64>) {
        self.change(clusters, |value| value.saturating_sub(1));
    }

    fn change(&mut self, clusters: Range<u64>, mut f: impl FnMut(u64) -> u64) {
        let mut at = clusters.start;
        while at < clusters.end {
            let (number, first) = place(at);
            let len = (clusters.end - at).min((PAGE - first) as u64);
            let page = self
                .pages
                .entry(number)
                .or_insert_with(|| Page::Bits(Box::new([0; PAGE / 64])));
            for index in first..first + usize::try_from(len).expect("at most a page") {
                let value = f(page.get(index));
                page.set(index, value);
            }
            at += len;
        }
    }

    /// Copies the counters from `first` on.
    pub(super) fn copy_to(&self, first: u64, out: &mut [u64]) {
        out.fill(0);
        let end = first.saturating_add(out.len() as u64);
        for (number, page) in self.pages_of(&(first..end)) {
            let start = number << PAGE_BITS;
            let from = start.max(first);
            let to = (start + PAGE as u64).min(end);
            for cluster in from..to {
                if let Ok(at) = usize::try_from(cluster - first) {
                    out[at] = page.get(place(cluster).1);
                }
            }
        }
    }

    fn pages_of(&self, clusters: &Range<u64>) -> impl Iterator<Item = (u64, &Page)> + use<'_> {
        let last = clusters.end.saturating_sub(1) >> PAGE_BITS;
        let pages = clusters.start >> PAGE_BITS..=last.max(clusters.start >> PAGE_BITS);
        self.pages
            .range(pages)
            .map(|(number, page)| (*number, page))
    }

    /// The counters of the range that are not zero, in ascending order.
    pub(super) fn iter(&self, clusters: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
        self.pages_of(&clusters)
            .flat_map(|(number, page)| {
                let start = number << PAGE_BITS;
                (0..PAGE).map(move |index| (start + index as u64, page.get(index)))
            })
            .filter(move |(cluster, value)| *value != 0 && clusters.contains(cluster))
    }

    /// The first counter of the range that is not zero.
    pub(super) fn first(&self, clusters: Range<u64>) -> Option<u64> {
        self.iter(clusters).next().map(|(cluster, _)| cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_widening() {
        let mut counters = Counters::default();
        counters.add(4000..4200, 1, u64::MAX);
        counters.add(4095..4097, 1, u64::MAX);
        counters.add(4096..4097, 1000, u64::MAX);
        assert_eq!(counters.get(3999), 0);
        assert_eq!(counters.get(4094), 1);
        assert_eq!(counters.get(4095), 2);
        assert_eq!(counters.get(4096), 1002);
        assert_eq!(counters.get(4199), 1);
        assert_eq!(counters.get(4200), 0);
        counters.subtract(4095..4097);
        let mut out = [7; 4];
        counters.copy_to(4094, &mut out);
        assert_eq!(out, [1, 1, 1001, 1]);
    }

    #[test]
    fn counting_stops_at_the_maximum_and_says_so() {
        let mut counters = Counters::default();
        assert_eq!(counters.add(0..2, 3, 3), 0);
        assert_eq!(counters.add(1..3, 2, 3), 2);
        assert_eq!(counters.get(1), 3);
        assert_eq!(counters.add(5..6, u64::MAX, u64::MAX), 0);
        assert_eq!(counters.add(5..6, 1, u64::MAX), 1);
    }

    #[test]
    fn far_counters_cost_no_more_than_near_ones() {
        let mut counters = Counters::default();
        counters.add(1 << 47..(1 << 47) + 1, 1, 9);
        counters.add(3..4, 1, 9);
        assert_eq!(counters.pages.len(), 2);
        assert_eq!(
            counters.iter(0..u64::MAX).collect::<Vec<_>>(),
            [(3, 1), (1 << 47, 1)]
        );
        assert_eq!(counters.first(4..u64::MAX), Some(1 << 47));
        assert_eq!(counters.first(4..1 << 47), None);
    }
}
