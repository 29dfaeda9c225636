//! Tests of the driver over a disk in memory, and against QEMU's tools where those are installed. What fuzzing needs of them is built
//! for that, too.

pub(crate) mod beside;
mod opened;
pub(crate) mod untrusted;

// Not for fuzzing.
#[cfg(test)]
mod bitmaps;
#[cfg(test)]
mod cleaning;
#[cfg(test)]
mod compress;
#[cfg(test)]
mod crash;
#[cfg(test)]
mod damage;
#[cfg(test)]
mod damaged;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod harness;
#[cfg(test)]
mod history;
#[cfg(test)]
mod made;
#[cfg(test)]
mod model;
#[cfg(test)]
mod races;
#[cfg(test)]
mod reading;
#[cfg(test)]
mod snapshots;
#[cfg(test)]
mod workload;
