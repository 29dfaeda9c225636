//! What may be left on a disk after its power was cut: everything that a completed flush covered, and of the rest any set of sectors,
//! each as any of the writes to it left it.

use super::disk::Operation;
use super::{MemoryDisk, Random};

const SECTOR: usize = 512;

impl MemoryDisk {
    /// The content after a power cut when `at` operations of `journal` had arrived, beginning from `start`.
    pub(crate) fn after_power_cut(
        start: &[u8],
        journal: &[Operation],
        at: usize,
        random: &mut Random,
    ) -> Vec<u8> {
        let arrived = &journal[..at];
        let durable = arrived
            .iter()
            .filter_map(|operation| match operation {
                Operation::Flush { covers } => Some(*covers),
                _ => None,
            })
            .max()
            .unwrap_or(0);
        let mut bytes = start.to_vec();
        for operation in &arrived[..durable] {
            apply(&mut bytes, operation, |_| true);
        }
        // How much of what was not flushed has survived differs from cut to cut.
        let survival = 1 + random.below(4);
        let mut rest: Vec<&Operation> = arrived[durable..].iter().collect();
        if random.one_in(2) {
            for index in (1..rest.len()).rev() {
                rest.swap(
                    index,
                    usize::try_from(random.below(index as u64 + 1)).expect("an index"),
                );
            }
        }
        for operation in rest {
            let whole = random.one_in(2);
            let lost = random.one_in(survival);
            apply(&mut bytes, operation, |_| {
                if whole {
                    !lost
                } else {
                    !random.one_in(survival + 1)
                }
            });
        }
        bytes
    }
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
