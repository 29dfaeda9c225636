//! Tests of the driver over a disk in memory, and against QEMU's tools where those are installed. What fuzzing needs of them is built
//! for that, too.

pub(crate) mod beside;
#[cfg(test)]
mod bitmaps;
#[cfg(test)]
mod cleaning;
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
mod opened;
#[cfg(test)]
mod races;
#[cfg(test)]
mod reading;
#[cfg(test)]
mod snapshots;
pub(crate) mod untrusted;
#[cfg(test)]
mod workload;
