#![doc = include_str!("../README.md")]

mod abi;
mod control;
mod device;
mod iotlb;
mod memory;
mod message;
mod queue;
pub mod vdpa;

pub use control::{
    BLOCK_DEVICE, CONTROL, Control, DeviceConfig, DeviceName, FEATURE_ACCESS_PLATFORM,
    FEATURE_INDIRECT, FEATURE_RING_PACKED, FEATURE_VERSION_1, InvalidName,
};
pub use device::{Device, QueueInfo};
pub use iotlb::{Access, IotlbEntry, IovaRegion, Mapping, UserMemory};
pub use memory::Memory;
pub use message::{
    Message, MessageId, QueueState, Request, Response, STATUS_DRIVER_OK, STATUS_FEATURES_OK,
};
pub use queue::{Chain, SplitQueue};
