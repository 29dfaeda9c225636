//! /dev/vduse/control: devices are made and removed here.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::str::FromStr;

use zerocopy::FromZeros;

use crate::abi::{self, DevConfig, NAME_MAX};

/// The control device.
pub const CONTROL: &str = "/dev/vduse/control";

/// The version of the kernel's interface that this crate speaks.
const API_VERSION: u64 = 0;

/// The virtio device id of a block device.
pub const BLOCK_DEVICE: u32 = 2;

/// `VIRTIO_F_VERSION_1`.
pub const FEATURE_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_ACCESS_PLATFORM`, which every VDUSE device has to offer.
pub const FEATURE_ACCESS_PLATFORM: u64 = 1 << 33;
/// `VIRTIO_F_RING_PACKED`.
pub const FEATURE_RING_PACKED: u64 = 1 << 34;
/// `VIRTIO_RING_F_INDIRECT_DESC`.
pub const FEATURE_INDIRECT: u64 = 1 << 28;

/// The name of a device: 1 to 255 bytes that can be the name of a file in /dev/vduse.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceName(String);

/// A name that no device can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidName;

impl std::fmt::Display for InvalidName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(
            "a VDUSE device's name has 1 to 255 bytes, is a file name, and is not 'control'",
        )
    }
}

impl std::error::Error for InvalidName {}

impl DeviceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn padded(&self) -> [u8; NAME_MAX] {
        let mut name = [0; NAME_MAX];
        name[..self.0.len()].copy_from_slice(self.0.as_bytes());
        name
    }
}

impl FromStr for DeviceName {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        let is_path = matches!(name, "." | "..") || name.contains(['/', '\0']);
        // The control device stands in the same directory.
        if name.is_empty() || name.len() >= NAME_MAX || is_path || name == "control" {
            return Err(InvalidName);
        }
        Ok(Self(name.to_owned()))
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a device is to be. None of it can be changed later, but the bytes of the configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Its name.
    pub name: DeviceName,
    /// The virtio vendor id, any number.
    pub vendor_id: u32,
    /// The virtio device id: 1 is a network card, 2 a block device ([`BLOCK_DEVICE`]), 26 a file system.
    pub device_id: u32,
    /// The virtio features offered; [`FEATURE_ACCESS_PLATFORM`] has to be among them.
    pub features: u64,
    /// How many virtqueues it has.
    pub queues: u32,
    /// How virtqueues are aligned, in bytes, at most a page.
    pub queue_alignment: u32,
    /// The configuration space, at most a page.
    pub config: Vec<u8>,
}

impl DeviceConfig {
    /// A device of version 1 of the virtio specification that offers nothing beyond that.
    pub fn new(name: DeviceName, device_id: u32, queues: u32, config: Vec<u8>) -> Self {
        Self {
            name,
            vendor_id: 0,
            device_id,
            features: FEATURE_VERSION_1 | FEATURE_ACCESS_PLATFORM,
            queues,
            queue_alignment: 4096,
            config,
        }
    }
}

/// The control device, open.
#[derive(Debug)]
pub struct Control(File);

impl Control {
    /// Opens /dev/vduse/control and agrees on a version of the interface.
    ///
    /// # Errors
    /// `NotFound` without the kernel module `vduse`, `PermissionDenied` for ordinary users, `InvalidInput` if the kernel is too new to
    /// speak version 0 (there is none).
    pub fn open() -> io::Result<Self> {
        let control = Self(OpenOptions::new().read(true).write(true).open(CONTROL)?);
        // Newer kernels begin with their newest.
        control.set_api_version(API_VERSION)?;
        Ok(control)
    }

    /// The version of the interface that this descriptor speaks.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn api_version(&self) -> io::Result<u64> {
        Ok(abi::get_api_version(self.0.as_fd())?)
    }

    fn set_api_version(&self, version: u64) -> io::Result<()> {
        Ok(abi::set_api_version(self.0.as_fd(), version)?)
    }

    /// Makes a device, which then appears as /dev/vduse/NAME.
    ///
    /// # Errors
    /// `AlreadyExists` where there is one of that name: another process's, which [`Device::open`](crate::Device::open) refuses as busy, or a dead one's, to be
    /// adopted. `InvalidInput` where the kernel does not allow such a device.
    pub fn create(&self, config: &DeviceConfig) -> io::Result<()> {
        let head = DevConfig {
            name: config.name.padded(),
            vendor_id: config.vendor_id,
            device_id: config.device_id,
            features: config.features,
            vq_num: config.queues,
            vq_align: config.queue_alignment,
            ..DevConfig::new_zeroed()
        };
        Ok(abi::create_dev(self.0.as_fd(), &head, &config.config)?)
    }

    /// Removes a device that nobody has open and that is not on the vdpa bus any more.
    ///
    /// # Errors
    /// `ResourceBusy` if it is; `InvalidInput` if there is no such device.
    pub fn destroy(&self, name: &DeviceName) -> io::Result<()> {
        Ok(abi::destroy_dev(self.0.as_fd(), &name.padded())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_file_names_with_room_for_the_zero_byte() {
        let fits = |name: &str| name.parse::<DeviceName>().is_ok();
        assert!(fits("disk-0"));
        assert!(fits(&"x".repeat(255)));
        for name in ["", ".", "..", "a/b", "a\0b", "control", &"x".repeat(256)] {
            assert!(!fits(name), "{name:?}");
        }
    }
}
