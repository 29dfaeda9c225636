//! A device's way onto the vdpa bus, and off it, and the block device that comes of it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use stord_aio::pool;
use stord_qmp::Error;
use vduse::{DeviceName, vdpa};

/// The driver that makes block devices.
const DRIVER: &str = "virtio_vdpa";
/// A driver that is loaded takes the device at once; one that udev has to load takes longer.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// Puts a device on the bus, unless it is there, and gives the block device that it becomes. The device has to be served meanwhile.
///
/// # Errors
/// The kernel refuses, or no driver makes a block device of it. It is not on the bus then, unless it was before.
pub(super) async fn attach(name: &DeviceName) -> Result<String, Error> {
    let mut was_added = false;
    loop {
        if !vdpa::is_present(name) {
            check_driver()?;
            add(name).await?;
            was_added = true;
        }
        match wait_for_disk(name).await {
            Ok(Some(disk)) => return Ok(disk),
            // Somebody was about to take it off when a daemon died: it has gone now.
            Ok(None) => {}
            Err(error) => {
                if was_added {
                    let _ = detach(name).await;
                }
                return Err(error);
            }
        }
    }
}

async fn add(name: &DeviceName) -> Result<(), Error> {
    let added = name.clone();
    let added = pool::run(move || vdpa::add(vdpa::VDUSE, &added)).await;
    added.map_err(|error| {
        let is_refused = error.kind() == io::ErrorKind::PermissionDenied;
        let error = Error::generic(format!("Failed to add '{name}' to the vdpa bus: {error}"));
        if is_refused {
            error.with_hint("it needs root, or the capability CAP_NET_ADMIN")
        } else {
            error
        }
    })
}

fn check_driver() -> Result<(), Error> {
    if Path::new("/sys/bus/vdpa/drivers").join(DRIVER).exists() {
        return Ok(());
    }
    Err(no_driver())
}

fn no_driver() -> Error {
    Error::generic(
        "the kernel has no driver that makes block devices of vdpa devices: run 'modprobe virtio_vdpa' as root",
    )
}

/// `None` if it is not on the bus any more.
async fn wait_for_disk(name: &DeviceName) -> Result<Option<String>, Error> {
    let begun = Instant::now();
    loop {
        if !vdpa::is_present(name) {
            return Ok(None);
        }
        if let Some(path) = disk(name) {
            return Ok(Some(path));
        }
        match vdpa::driver(name) {
            Some(driver) if driver != DRIVER => {
                return Err(Error::generic(format!(
                    "'{name}' was taken by the driver {driver}: run 'rmmod {driver}' as root, or set driver_override to {DRIVER} for it"
                )));
            }
            driver if begun.elapsed() > PATIENCE => {
                return Err(match driver {
                    None => no_driver(),
                    Some(_) => Error::generic(format!(
                        "'{name}' has not become a block device: run 'modprobe virtio_blk' as root, or see what dmesg says"
                    )),
                });
            }
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// The block device that a device has become.
pub(super) fn disk(name: &DeviceName) -> Option<String> {
    let found = vdpa::block_device(name).ok()??;
    Some(found.to_str()?.to_owned())
}

/// Whether the block device is mounted, or part of something, or open with the demand to be alone.
pub(super) async fn is_disk_in_use(name: &DeviceName) -> bool {
    let Some(path) = disk(name).map(PathBuf::from) else {
        return false;
    };
    // The kernel may read the disk for that.
    pool::run(move || {
        let flags = OFlag::O_RDONLY | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        matches!(open(&path, flags, Mode::empty()), Err(Errno::EBUSY))
    })
    .await
}

/// Takes a device off the bus, and returns when its driver has written out what it had. The device has to be served meanwhile.
///
/// # Errors
/// The kernel refuses.
pub(super) async fn detach(name: &DeviceName) -> Result<(), vdpa::Error> {
    let deleted = name.clone();
    let result = pool::run(move || vdpa::delete(&deleted)).await;
    if vdpa::is_present(name) {
        result
    } else {
        Ok(())
    }
}
