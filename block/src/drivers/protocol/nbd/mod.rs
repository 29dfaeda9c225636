//! NBD, the network block device.

pub mod wire;
