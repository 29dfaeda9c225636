//! The types of the interface. They are the only truth about it: what is not here is neither
//! accepted nor shown by `query-qmp-schema`.
//!
//! Names are those of the reference, members in snake case.

pub mod bitmap;
pub mod block;
pub mod chardev;
pub mod control;
pub mod create;
pub mod export;
pub mod introspect;
pub mod job;
pub mod monitor;
pub mod nbd;
pub mod node_info;
pub mod object;
pub mod snapshot;
pub mod socket;
pub mod statistics;

use crate::Qapi;

/// The `data` member that older unions put around their branches.
#[derive(Clone, Debug, Default, PartialEq, Qapi)]
pub struct Data<T> {
    /// The branch.
    pub data: T,
}
