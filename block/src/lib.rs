//! The block layer: a graph of nodes, the request path over it, and the drivers.
//!
//! Data flows one way: [`Backend`] → graph → driver map → leaf → completion. A request enters through a [`Backend`], walks the maps of
//! the format drivers down to the leaf that holds the bytes (`io`), and moves them there in one step. [`Graph`] makes, changes and
//! removes nodes; it lives on the control thread and is the only writer of the structure.
//!
//! Where to look: `driver` is the contract of a driver; `drivers/` holds the drivers, a small one in a file, a large one in a folder;
//! `graph/` the structure, permissions and opening; `io/` the request path, one concern per file.

mod backend;
pub mod bitmap;
mod contexts;
pub mod driver;
pub mod drivers;
pub mod graph;
mod io;
pub mod job;
#[cfg(any(test, fuzzing))]
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "fuzzing needs only a part of it")
)]
mod testing;

/// What coverage-guided fuzzing drives (`tests/fuzz`).
#[cfg(fuzzing)]
pub mod fuzzing {
    pub use crate::drivers::format::qcow2::fuzzing::*;
}

pub use backend::{Backend, BackendListener, Bypass, Failure, Failures, Total, Totals};
pub use contexts::Contexts;
pub use driver::{BlockStatus, ZeroFlags};
pub use graph::{Graph, Permissions};
pub use io::{Detail, HostPlace, Location};
