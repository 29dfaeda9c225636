//! A device for this daemon: a new one, or the one of that name that a dead daemon left while the kernel uses it.
//!
//! One that the kernel does not use is made anew, so that nothing of an earlier one is left. One that it uses goes on as it is, and only if
//! that is sure to be right: same image, same options, and a record of what is under way that is about this very device. The
//! configuration space cannot be read back, hence the record.

use std::io;
use std::sync::Arc;

use stord_qmp::Error;
use vduse::{BLOCK_DEVICE, Control, Device, DeviceConfig, DeviceName, FEATURE_ACCESS_PLATFORM};

use super::record::{Description, Record};
use crate::state_directory::StateDirectory;
use crate::virtio::blk::config::F_CONFIG_WCE;
use crate::virtio::blk::disk::Disk;
use crate::virtio::in_flight::InFlight;

/// Virtqueues begin at multiples of so many bytes.
const QUEUE_ALIGNMENT: u32 = 4096;

/// A device that this daemon serves.
pub(super) struct Claim {
    pub(super) device: Arc<Device>,
    pub(super) record: Record,
    pub(super) queues: Vec<InFlight>,
    pub(super) adopted: Option<Adopted>,
}

/// What is to be known of a device that another daemon served before.
pub(super) struct Adopted {
    /// Where to go on, by queue: the next entry of the available ring if nothing is under way.
    pub(super) starts: Vec<u16>,
    /// The disk has another length than its driver knows, or may have.
    pub(super) is_resized: bool,
}

/// The features that a VDUSE device of this disk offers.
pub(super) fn features(disk: &Disk) -> u64 {
    // The kernel lets no driver write to the configuration space.
    (disk.features() & !F_CONFIG_WCE) | FEATURE_ACCESS_PLATFORM
}

/// Makes the device, or adopts it. Blocks, if only for moments.
///
/// # Errors
/// Another process has it, it is not what is asked for, or the kernel has no VDUSE.
pub(super) fn claim(
    name: &DeviceName,
    description: &Description,
    disk: &Disk,
) -> Result<Claim, Error> {
    let control = Control::open().map_err(|error| no_vduse(&error))?;
    let record = Record::open(&StateDirectory::of_user(), name).map_err(|error| {
        let path = StateDirectory::of_user()
            .path()
            .join("vduse")
            .join(name.as_str());
        match error.kind() {
            io::ErrorKind::ResourceBusy => busy(name),
            _ => failed(format!(
                "cannot use '{}', where requests in flight are noted: {}",
                path.display(),
                Error::reason(&error)
            )),
        }
    })?;
    let config = DeviceConfig {
        vendor_id: 0,
        features: features(disk),
        queue_alignment: QUEUE_ALIGNMENT,
        ..DeviceConfig::new(
            name.clone(),
            BLOCK_DEVICE,
            description.queues.into(),
            disk.config().to_vec(),
        )
    };
    let (device, is_new) = create(&control, &config)?;
    if is_new {
        let made = set_up(&device, &record, description);
        return made
            .map(|queues| Claim {
                device: Arc::new(device),
                record,
                queues,
                adopted: None,
            })
            .map_err(|error| {
                // Leaves nothing behind.
                let _ = control.destroy(name);
                failed(format!("cannot set it up: {}", Error::reason(&error)))
            });
    }
    let (queues, adopted) = adopt(&device, &record, description, disk)?;
    Ok(Claim {
        device: Arc::new(device),
        record,
        queues,
        adopted: Some(adopted),
    })
}

/// A device, and whether it is a new one.
fn create(control: &Control, config: &DeviceConfig) -> Result<(Device, bool), Error> {
    let name = &config.name;
    let is_new = loop {
        match control.create(config) {
            Ok(()) => break true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(failed(format!(
                    "the kernel refuses it: {}",
                    Error::reason(&error)
                )));
            }
        }
        match control.destroy(name) {
            // Nobody used it: once more.
            Ok(()) => {}
            // Gone meanwhile.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            Err(_) => break false,
        }
    };
    match Device::open(name) {
        Ok(device) => Ok((device, is_new)),
        Err(error) => {
            if is_new {
                let _ = control.destroy(name);
            }
            Err(match error.kind() {
                io::ErrorKind::ResourceBusy => busy(name),
                _ => failed(format!(
                    "cannot open '{}': {}",
                    Device::path_of(name).display(),
                    Error::reason(&error)
                )),
            })
        }
    }
}

fn set_up(
    device: &Device,
    record: &Record,
    description: &Description,
) -> io::Result<Vec<InFlight>> {
    for queue in 0..description.queues {
        device.set_up_queue(queue.into(), description.queue_size)?;
    }
    record.begin(description)?;
    record.queues(description)
}

/// Sees that the device can go on, and where.
fn adopt(
    device: &Device,
    record: &Record,
    wanted: &Description,
    disk: &Disk,
) -> Result<(Vec<InFlight>, Adopted), Error> {
    let name = device.name();
    let io_failed = |error: io::Error| failed(Error::reason(&error));
    if device.is_broken().map_err(io_failed)? {
        return Err(failed(format!(
            "the kernel has given up device '{name}', which was left without an answer for too long; remove it with 'vdpa dev del {name}'"
        )));
    }
    let chosen = device.features().map_err(io_failed)?;
    if chosen & !features(disk) != 0 {
        return Err(failed(format!(
            "the kernel uses device '{name}' with features that it was not offered; remove it with 'vdpa dev del {name}'"
        )));
    }
    let known = record.read().map_err(io_failed)?;
    if let Some(known) = &known
        && let Some((member, was, is)) = known.difference(wanted)
    {
        return Err(failed(format!(
            "the kernel still uses device '{name}', which has {member} '{was}', not '{is}'; remove it with 'vdpa dev del {name}'"
        )));
    }
    let starts = starts(device, wanted).map_err(io_failed)?;
    let Some(known) = known else {
        if starts.iter().any(|start| start.under_way > 0) {
            return Err(failed(format!(
                "requests are under way in device '{name}', and '{}' does not say which, since it is not about this device",
                record.path().display()
            )));
        }
        record.begin(wanted).map_err(io_failed)?;
        let queues = record.queues(wanted).map_err(io_failed)?;
        let adopted = Adopted {
            starts: starts.iter().map(|start| start.next).collect(),
            is_resized: true,
        };
        return Ok((queues, adopted));
    };
    if wanted.size < known.size {
        return Err(failed(format!(
            "the kernel still uses device '{name}' of {} bytes, and the image has only {} now",
            known.size, wanted.size
        )));
    }
    let queues = record.queues(wanted).map_err(io_failed)?;
    record.describe(wanted).map_err(io_failed)?;
    let adopted = Adopted {
        starts: starts.iter().map(|start| start.next).collect(),
        is_resized: wanted.size != known.size,
    };
    Ok((queues, adopted))
}

/// Where a queue stands.
struct Start {
    /// The next entry of the available ring, if nothing is under way.
    next: u16,
    /// Entries that were made available and have not been given back.
    under_way: u16,
}

fn starts(device: &Device, description: &Description) -> io::Result<Vec<Start>> {
    let mut memory = vduse::Memory::new();
    let mut start = |queue: u16| {
        let info = device.queue_info(queue.into())?;
        if !info.ready {
            return Ok(Start {
                next: 0,
                under_way: 0,
            });
        }
        let mut index = |ring: u64| {
            let at = ring.saturating_add(2);
            let found = memory.find(device, at, 2)?.load_u16(at);
            found.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        };
        let used = index(info.device_area)?;
        let available = index(info.driver_area)?;
        Ok(Start {
            next: used,
            under_way: available.wrapping_sub(used),
        })
    };
    (0..description.queues).map(&mut start).collect()
}

/// The kernel has no VDUSE, or not for us. The message is the reference's, and what to do is told besides.
fn no_vduse(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => failed(
            "/dev/vduse/control does not exist: run 'modprobe -a vduse virtio_vdpa' as root (the kernel needs CONFIG_VDPA_USER and CONFIG_VIRTIO_VDPA)",
        ),
        io::ErrorKind::PermissionDenied => {
            failed("/dev/vduse/control may not be opened: run stord as root")
        }
        _ => failed(format!(
            "/dev/vduse/control cannot be opened: {}",
            Error::reason(error)
        )),
    }
}

fn busy(name: &DeviceName) -> Error {
    failed(format!("another process serves device '{name}'"))
}

/// The reference says no more than this in its answer.
pub(super) fn failed(why: impl Into<String>) -> Error {
    let why = why.into();
    tracing::error!("vduse: {why}");
    Error::generic("failed to create vduse device").with_hint(why)
}
