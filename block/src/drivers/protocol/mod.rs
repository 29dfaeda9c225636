//! Leaves: drivers that take whole requests to a file, a device or nothing.

pub mod blkio;
pub mod file;
pub mod nbd;
pub mod null;
