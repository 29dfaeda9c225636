//! What has become of a device on the vdpa bus, as /sys tells.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::control::DeviceName;

const DEVICES: &str = "/sys/bus/vdpa/devices";

/// Whether a device is on the bus.
pub fn is_present(name: &DeviceName) -> bool {
    directory(name).exists()
}

/// The driver that has a device on the bus: `virtio_vdpa` or `vhost_vdpa`.
pub fn driver(name: &DeviceName) -> Option<String> {
    let target = fs::read_link(directory(name).join("driver")).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// The block device that a device has become, such as /dev/vda; `None` if it has not, or not yet.
///
/// # Errors
/// /sys cannot be read.
pub fn block_device(name: &DeviceName) -> io::Result<Option<PathBuf>> {
    find_block_device(&directory(name))
}

fn directory(name: &DeviceName) -> PathBuf {
    Path::new(DEVICES).join(name.as_str())
}

/// The virtio device is a child of the vdpa device, and the disk, in the directory `block`, one of the virtio device.
fn find_block_device(directory: &Path) -> io::Result<Option<PathBuf>> {
    for child in names(directory)? {
        if !child.to_string_lossy().starts_with("virtio") {
            continue;
        }
        let disks = directory.join(child).join("block");
        if let Some(disk) = names(&disks)?.into_iter().next() {
            return Ok(Some(Path::new("/dev").join(disk)));
        }
    }
    Ok(None)
}

/// What is in a directory, which may have gone.
fn names(directory: &Path) -> io::Result<Vec<OsString>> {
    match fs::read_dir(directory) {
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_found_below_the_virtio_device() {
        let device = std::env::temp_dir().join(format!("vduse-sysfs-{}", std::process::id()));
        let found = || find_block_device(&device).expect("readable");
        assert_eq!(found(), None);
        fs::create_dir_all(device.join("power")).expect("writable");
        fs::create_dir_all(device.join("virtio3")).expect("writable");
        assert_eq!(found(), None);
        fs::create_dir_all(device.join("virtio3/block/vdb")).expect("writable");
        assert_eq!(found(), Some("/dev/vdb".into()));
        fs::remove_dir_all(&device).expect("ours");
    }
}
