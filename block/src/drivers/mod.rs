//! The drivers, and the names that lead to them.

pub mod description;
pub mod filename;
pub mod filter;
pub mod format;
pub mod protocol;
