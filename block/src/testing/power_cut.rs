//! What may be left on disks after their power was cut: everything that a completed flush covered, and of the rest any set of sectors,
//! each as any of the writes to it left it.

use std::collections::BTreeMap;

use super::Random;
use super::disk::{Operation, SECTOR};

/// What becomes of the operations that no flush covered.
#[derive(Clone, Copy, Debug)]
enum Rest {
    /// Each sector of each operation survives with this chance in ten; the order of operations is kept.
    Some(u64),
    /// As before, in any order.
    Shuffled(u64),
    /// Everything but one operation.
    AllBut(usize),
    /// One operation and nothing else.
    Only(usize),
    All,
    Nothing,
}

impl Rest {
    fn choose(operations: usize, random: &mut Random) -> Self {
        // What arrived last is the most interesting: what it relied on may not have been waited for.
        let one = |random: &mut Random| {
            let reach = match random.below(4) {
                0 => 1,
                1 => operations.min(4),
                _ => operations,
            };
            let back = random.below(reach.max(1) as u64);
            operations.saturating_sub(1 + usize::try_from(back).expect("an index"))
        };
        match random.below(12) {
            0..=2 => Self::Some(1 + random.below(9)),
            3..=6 => Self::Shuffled(1 + random.below(9)),
            7 | 8 => Self::AllBut(one(random)),
            9 | 10 => Self::Only(one(random)),
            _ if random.one_in(2) => Self::All,
            _ => Self::Nothing,
        }
    }
}

/// The content of disks after a power cut when `at` operations of `journal` had arrived, beginning from `start`.
pub(crate) fn after_power_cut(
    start: &[Vec<u8>],
    journal: &[(usize, Operation)],
    at: usize,
    random: &mut Random,
) -> Vec<Vec<u8>> {
    let arrived = &journal[..at];
    let mut durable: BTreeMap<usize, usize> = BTreeMap::new();
    for (disk, operation) in arrived {
        if let Operation::Flush { covers } = operation {
            let covered = durable.entry(*disk).or_default();
            *covered = (*covered).max(*covers);
        }
    }
    let mut left = start.to_vec();
    let mut rest = Vec::new();
    for (index, (disk, operation)) in arrived.iter().enumerate() {
        if index < durable.get(disk).copied().unwrap_or(0) {
            apply(&mut left[*disk], operation, |_| true);
        } else if !matches!(operation, Operation::Flush { .. }) {
            rest.push((*disk, operation));
        }
    }
    let fate = Rest::choose(rest.len(), random);
    if let Rest::Shuffled(_) = fate {
        for index in (1..rest.len()).rev() {
            let other = usize::try_from(random.below(index as u64 + 1)).expect("an index");
            rest.swap(index, other);
        }
    }
    for (index, (disk, operation)) in rest.into_iter().enumerate() {
        let is_torn = random.one_in(2);
        let survives = match fate {
            Rest::Some(chance) | Rest::Shuffled(chance) => {
                let whole = random.below(10) < chance;
                apply(&mut left[disk], operation, |_| {
                    if is_torn {
                        random.below(10) < chance
                    } else {
                        whole
                    }
                });
                continue;
            }
            Rest::AllBut(lost) => index != lost,
            Rest::Only(kept) => index == kept,
            Rest::All => true,
            Rest::Nothing => false,
        };
        apply(&mut left[disk], operation, |_| survives);
    }
    left
}

fn apply(bytes: &mut Vec<u8>, operation: &Operation, mut survives: impl FnMut(usize) -> bool) {
    match operation {
        Operation::Write { offset, data } => {
            let start = usize::try_from(*offset).expect("fits into memory");
            let mut at = 0;
            while at < data.len() {
                let len = (SECTOR - (start + at) % SECTOR).min(data.len() - at);
                if survives(start + at) {
                    let end = start + at + len;
                    if bytes.len() < end {
                        bytes.resize(end, 0);
                    }
                    bytes[start + at..end].copy_from_slice(&data[at..at + len]);
                }
                at += len;
            }
        }
        Operation::Zero { offset, len } => {
            let start = usize::try_from(*offset)
                .expect("fits into memory")
                .min(bytes.len());
            let end = usize::try_from(offset + len)
                .expect("fits into memory")
                .min(bytes.len());
            let mut at = start;
            while at < end {
                let next = (at + SECTOR - at % SECTOR).min(end);
                if survives(at) {
                    bytes[at..next].fill(0);
                }
                at = next;
            }
        }
        Operation::Truncate { size } => {
            if survives(0) {
                bytes.resize(usize::try_from(*size).expect("fits into memory"), 0);
            }
        }
        Operation::Flush { .. } => {}
    }
}
