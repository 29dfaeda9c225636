//! The vdpa bus, which a device has to be on before a driver can take it: what `vdpa dev add`, `del` and `show` do.
//!
//! A VDUSE device goes on the bus by [`add`] with the management device `vduse`. If the driver is `virtio_vdpa` (and not `vhost_vdpa`,
//! which serves virtual machines), [`block_device`] then tells what it has become.

mod attributes;
mod netlink;
mod sysfs;

use std::fmt;
use std::io;

use nix::errno::Errno;

use attributes::{Attribute, Attributes, Payload};
use netlink::{Answer, Family};
pub use sysfs::{block_device, driver, is_present};

use crate::control::DeviceName;

/// The management device of VDUSE.
pub const VDUSE: &str = "vduse";

// linux/vdpa.h
const FAMILY: &str = "vdpa";
const MGMTDEV_GET: u8 = 2;
const DEV_NEW: u8 = 3;
const DEV_DEL: u8 = 4;
const DEV_GET: u8 = 5;
const MGMTDEV_BUS_NAME: u16 = 1;
const MGMTDEV_DEV_NAME: u16 = 2;
const MGMTDEV_SUPPORTED_CLASSES: u16 = 3;
const DEV_NAME: u16 = 4;
const DEV_ID: u16 = 5;
const DEV_VENDOR_ID: u16 = 6;
const DEV_MAX_VQS: u16 = 7;
const DEV_MAX_VQ_SIZE: u16 = 8;
const DEV_MIN_VQ_SIZE: u16 = 9;
const DEV_MGMTDEV_MAX_VQS: u16 = 15;
const DEV_SUPPORTED_FEATURES: u16 = 16;

/// Why the kernel did not do it.
#[derive(Debug)]
pub struct Error {
    cause: io::Error,
    message: Option<String>,
}

impl Error {
    fn new(errno: Errno, message: Option<String>) -> Self {
        Self {
            cause: errno.into(),
            message,
        }
    }

    /// The kind of failure.
    pub fn kind(&self) -> io::ErrorKind {
        self.cause.kind()
    }

    /// What the kernel says in words, if it does.
    pub fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }
}

impl From<io::Error> for Error {
    fn from(cause: io::Error) -> Self {
        Self {
            cause,
            message: None,
        }
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::new(errno, None)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.message {
            Some(message) => write!(f, "{message}: {}", self.cause),
            None => self.cause.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

/// What devices can be made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManagementDevice {
    /// The bus it is on, if it is on one.
    pub bus: Option<String>,
    /// Its name there.
    pub name: String,
    /// The virtio device ids it supports, as bits.
    pub classes: u64,
    /// The most virtqueues of one device.
    pub max_queues: Option<u32>,
    /// The virtio features it supports.
    pub features: Option<u64>,
}

/// A device on the vdpa bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdpaDevice {
    /// Its name.
    pub name: String,
    /// What it was made of.
    pub management_device: String,
    /// The virtio device id.
    pub device_id: u32,
    /// The virtio vendor id.
    pub vendor_id: u32,
    /// How many virtqueues it has.
    pub queues: u32,
    /// The most entries a virtqueue can have.
    pub max_queue_size: u16,
    /// The fewest entries a virtqueue can have, where it says so.
    pub min_queue_size: Option<u16>,
}

/// The management devices there are.
///
/// # Errors
/// `NotFound` without the kernel module `vdpa`.
pub fn management_devices() -> Result<Vec<ManagementDevice>, Error> {
    let family = Family::connect(FAMILY)?;
    let answers = family.dump(MGMTDEV_GET)?;
    Ok(answers.iter().filter_map(management_device).collect())
}

/// The devices on the bus.
///
/// # Errors
/// As [`management_devices`].
pub fn devices() -> Result<Vec<VdpaDevice>, Error> {
    let family = Family::connect(FAMILY)?;
    let answers = family.dump(DEV_GET)?;
    Ok(answers.iter().filter_map(device).collect())
}

/// One device on the bus.
///
/// # Errors
/// As [`management_devices`]; `NotFound` or `ENODEV` if it is not on the bus.
pub fn show(name: &DeviceName) -> Result<VdpaDevice, Error> {
    let family = Family::connect(FAMILY)?;
    let attributes = [Attribute::new(DEV_NAME, Payload::Text(name.as_str()))];
    let answers = family.request(DEV_GET, &attributes)?;
    let found = answers.first().and_then(device);
    found.ok_or_else(|| Error::from(Errno::ENODEV))
}

/// Puts a device on the bus. When this returns, a driver that is loaded has taken it.
///
/// The driver then reads from the device, so that another thread has to serve it meanwhile. Should the process be killed while
/// that hangs, the kernel does not wait for the device: the thread on which this is done holds no descriptor but its own.
///
/// # Errors
/// `InvalidInput` if the management device has none of that name, or one whose queues are not set up; `PermissionDenied` without the
/// capability `CAP_NET_ADMIN`; otherwise as [`management_devices`].
pub fn add(management_device: &str, name: &DeviceName) -> Result<(), Error> {
    let attributes = [
        Attribute::new(MGMTDEV_DEV_NAME, Payload::Text(management_device)),
        Attribute::new(DEV_NAME, Payload::Text(name.as_str())),
    ];
    change(DEV_NEW, &attributes)
}

/// Takes a device off the bus, and from its driver, whoever uses it. What the driver still has to write it writes first, so that another
/// thread has to serve the device meanwhile; killing the process is as for [`add`].
///
/// # Errors
/// `ENODEV` if it is not on the bus; otherwise as [`add`].
pub fn delete(name: &DeviceName) -> Result<(), Error> {
    change(
        DEV_DEL,
        &[Attribute::new(DEV_NAME, Payload::Text(name.as_str()))],
    )
}

fn change(command: u8, attributes: &[Attribute<'_>]) -> Result<(), Error> {
    let family = Family::connect(FAMILY)?;
    family.request_alone(command, attributes).map(drop)
}

fn management_device(answer: &Answer) -> Option<ManagementDevice> {
    let attributes = Attributes::new(answer.attributes());
    Some(ManagementDevice {
        bus: attributes.text(MGMTDEV_BUS_NAME),
        name: attributes.text(MGMTDEV_DEV_NAME)?,
        classes: attributes.u64(MGMTDEV_SUPPORTED_CLASSES).unwrap_or(0),
        max_queues: attributes.u32(DEV_MGMTDEV_MAX_VQS),
        features: attributes.u64(DEV_SUPPORTED_FEATURES),
    })
}

fn device(answer: &Answer) -> Option<VdpaDevice> {
    let attributes = Attributes::new(answer.attributes());
    Some(VdpaDevice {
        name: attributes.text(DEV_NAME)?,
        management_device: attributes.text(MGMTDEV_DEV_NAME)?,
        device_id: attributes.u32(DEV_ID)?,
        vendor_id: attributes.u32(DEV_VENDOR_ID)?,
        queues: attributes.u32(DEV_MAX_VQS)?,
        max_queue_size: attributes.u16(DEV_MAX_VQ_SIZE)?,
        min_queue_size: attributes.u16(DEV_MIN_VQ_SIZE),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_from_its_attributes() {
        let attributes = [
            Attribute::new(DEV_NAME, Payload::Text("disk")),
            Attribute::new(MGMTDEV_DEV_NAME, Payload::Text(VDUSE)),
            Attribute::new(DEV_ID, Payload::U32(2)),
            Attribute::new(DEV_VENDOR_ID, Payload::U32(0)),
            Attribute::new(DEV_MAX_VQS, Payload::U32(4)),
            Attribute::new(DEV_MAX_VQ_SIZE, Payload::U16(256)),
        ];
        let answer = Answer::of(&attributes);
        let expected = VdpaDevice {
            name: "disk".into(),
            management_device: "vduse".into(),
            device_id: 2,
            vendor_id: 0,
            queues: 4,
            max_queue_size: 256,
            min_queue_size: None,
        };
        assert_eq!(device(&answer), Some(expected));
        // One that lacks something is none.
        assert_eq!(device(&Answer::of(&attributes[..3])), None);
    }
}
