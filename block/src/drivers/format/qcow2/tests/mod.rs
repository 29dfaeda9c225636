//! Tests of the driver over a disk in memory, and against QEMU's tools where those are installed.

mod crash;
mod damage;
mod damaged;
mod harness;
mod history;
mod made;
mod model;
mod races;
mod reading;
mod snapshots;
mod workload;
