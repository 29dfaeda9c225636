//! The entries of L2 tables: checked, counted, and emptied where they only reserve a place that cannot be.

use super::survey::{Survey, Uses};
use crate::drivers::format::qcow2::layout::{
    COMPRESSED, COPIED, Geometry, OFFSET_MASK, Subclusters, ZERO,
};

/// In L2 entries of standard clusters: bits that must be zero.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// What an L2 entry says, taken at its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// No place in the file.
    Empty,
    /// Reads as zeroes, no place in the file.
    Zero,
    /// A cluster of the file at this offset; `holds_data` if some of it is to be read.
    Standard { offset: u64, holds_data: bool },
    /// Compressed data.
    Compressed,
}

impl Kind {
    pub(super) fn of(word: u64, subclusters: Subclusters, geometry: &Geometry) -> Self {
        if word & COMPRESSED != 0 {
            return Self::Compressed;
        }
        let offset = word & OFFSET_MASK;
        let zero = word & ZERO != 0 && !geometry.extended_l2;
        // In a data file, offset 0 is the place of the first guest cluster.
        let placed = offset != 0 || (geometry.data_file && word & COPIED != 0 && !zero);
        match (placed, zero) {
            (true, zero) => Self::Standard {
                offset,
                holds_data: if geometry.extended_l2 {
                    subclusters.allocated() != 0
                } else {
                    !zero
                },
            },
            (false, true) => Self::Zero,
            (false, false) => Self::Empty,
        }
    }
}

/// The entries of a table: index, first word, subclusters.
pub(super) fn entries<'a>(
    words: &'a [u64],
    geometry: &Geometry,
) -> impl Iterator<Item = (usize, u64, Subclusters)> + use<'a> {
    let width = geometry.entry_words();
    words
        .chunks_exact(width)
        .enumerate()
        .map(move |(index, entry)| {
            let subclusters = if width == 2 { entry[1] } else { 0 };
            (index, entry[0], Subclusters(subclusters))
        })
}

/// Clusters that follow each other, to be counted at once.
#[derive(Default)]
struct Run {
    start: u64,
    end: u64,
}

/// Counts what the entries of the table at `table` refer to.
pub(super) fn count(survey: &mut Survey, table: u64, words: &[u64], uses: Uses, empties: bool) {
    let geometry = survey.geometry;
    let cluster = geometry.cluster_size();
    let mut run = Run::default();
    // Where the next cluster would lie if nothing were fragmented.
    let mut expected = None;
    for (index, word, subclusters) in entries(words, &geometry) {
        if word == 0 && subclusters.0 == 0 {
            continue;
        }
        let place = || format!("entry {index} of the L2 table at {table:#x}");
        let kind = Kind::of(word, subclusters, &geometry);
        if kind != Kind::Compressed && word & L2_RESERVED != 0 {
            survey.corrupt(uses.total, || {
                format!("{} has reserved bits set: {word:#x}", place())
            });
        }
        match kind {
            Kind::Compressed => count_compressed(survey, word, subclusters, uses, place),
            Kind::Standard { offset, holds_data } => {
                if subclusters.allocated() & subclusters.zero() != 0 {
                    survey.corrupt(uses.total, || {
                        format!("{} has subclusters that are data and zero", place())
                    });
                }
                if geometry.in_cluster(offset) != 0 {
                    let mend = empties && !holds_data;
                    let times = if mend { 1 } else { uses.total };
                    survey.corrupt(times, || {
                        format!("{} names {offset:#x}, which is not aligned", place())
                    });
                    if mend {
                        survey.tables_to_mend.insert(table);
                        continue;
                    }
                }
                let fragment = expected.is_some_and(|expected| expected != offset);
                expected = Some(offset + cluster);
                survey.report.allocated_clusters += uses.active;
                survey.report.fragmented_clusters += uses.active * u64::from(fragment);
                if !geometry.data_file {
                    run.add(survey, offset, uses);
                }
            }
            Kind::Empty if subclusters.allocated() != 0 => survey.corrupt(uses.total, || {
                format!("{} has data in subclusters and no place", place())
            }),
            Kind::Empty | Kind::Zero => {}
        }
    }
    run.end(survey, uses);
}

impl Run {
    fn add(&mut self, survey: &mut Survey, offset: u64, uses: Uses) {
        let cluster = survey.geometry.cluster_size();
        if self.end != offset || self.start == self.end {
            self.end(survey, uses);
            (self.start, self.end) = (offset, offset);
        }
        self.end += cluster;
        // What may be wrong is counted by itself.
        if survey.geometry.in_cluster(offset) != 0 || !survey.is_in_file(self.end) {
            self.end -= cluster;
            self.end(survey, uses);
            survey.refer(offset, cluster, uses.total, "data cluster");
        }
    }

    fn end(&mut self, survey: &mut Survey, uses: Uses) {
        survey.refer(self.start, self.end - self.start, uses.total, "data");
        self.start = self.end;
    }
}

fn count_compressed(
    survey: &mut Survey,
    word: u64,
    subclusters: Subclusters,
    uses: Uses,
    place: impl Fn() -> String,
) {
    let geometry = survey.geometry;
    if word & COPIED != 0 {
        survey.corrupt(uses.total, || {
            format!("{} is compressed and has the copied flag", place())
        });
    }
    if geometry.data_file {
        return survey.corrupt(uses.total, || {
            format!("{} is compressed in an image with a data file", place())
        });
    }
    if subclusters.0 != 0 {
        return survey.corrupt(uses.total, || {
            format!("{} is compressed and has subclusters", place())
        });
    }
    // Of the offset all bits count here, also those that must be zero.
    let split = 62 - (geometry.cluster_bits - 8);
    let offset = word & ((1u64 << split) - 1);
    let sectors = ((word & !(COPIED | COMPRESSED)) >> split) + 1;
    survey.refer(
        offset,
        sectors * 512 - offset % 512,
        uses.total,
        "compressed data",
    );
    survey.report.allocated_clusters += uses.active;
    survey.report.compressed_clusters += uses.active;
    survey.report.fragmented_clusters += uses.active;
}

/// Makes every entry that only reserves a misaligned place read as zeroes without one. Gives how many there were.
pub(super) fn mend(words: &mut [u64], geometry: &Geometry) -> u64 {
    let wrong: Vec<usize> = entries(words, geometry)
        .filter(|&(_, word, subclusters)| {
            matches!(
                Kind::of(word, subclusters, geometry),
                Kind::Standard { offset, holds_data: false } if geometry.in_cluster(offset) != 0
            )
        })
        .map(|(index, ..)| index)
        .collect();
    let width = geometry.entry_words();
    for &index in &wrong {
        let at = index * width;
        if width == 2 {
            let subclusters = Subclusters(words[at + 1]);
            let zero = subclusters.zero() | subclusters.allocated();
            words[at] = 0;
            words[at + 1] = Subclusters::new(0, zero).0;
        } else {
            words[at] = ZERO;
        }
    }
    wrong.len() as u64
}
