//! Devices for containers: a file in `/run/cdi` by which podman and others find a device under a name of its own (Container Device
//! Interface, <https://github.com/cncf-tags/container-device-interface>). It is there as long as the device.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::json;
use stord_qmp::Error;

use crate::mount::registry::Registry;
use crate::report::reason;

const DIRECTORY: &str = "/run/cdi";
/// Vendor and class of our devices.
pub const KIND: &str = "stord.io/disk";
/// The first version that had all that is needed here, so that every runtime reads it.
const VERSION: &str = "0.3.0";

/// Looks whether a name can be one.
///
/// # Errors
/// The interface does not allow it.
pub fn check(name: &str) -> Result<String, String> {
    let bytes = name.as_bytes();
    let ends = [bytes.first(), bytes.last()];
    let is_inside = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-.:".contains(byte);
    let is_fit = ends
        .iter()
        .all(|byte| byte.is_some_and(u8::is_ascii_alphanumeric))
        && bytes.iter().all(is_inside)
        && bytes.len() <= 63;
    if is_fit {
        return Ok(name.to_owned());
    }
    Err("it consists of letters, digits and _-.: (not at its ends)".to_owned())
}

/// Sees that no other device has the name.
///
/// # Errors
/// One has.
pub fn check_free(name: &str, registry: &Registry) -> Result<(), Error> {
    for found in registry.devices() {
        let device = found.entry.device.as_ref();
        if device.and_then(|device| device.cdi.as_deref()) == Some(name) && found.is_alive() {
            let (image, at) = (found.entry.image.display(), found.entry.at.display());
            return Err(Error::generic(format!(
                "containers have '{image}' as '{KIND}={name}' already"
            ))
            .with_hint(format!(
                "Choose another name, or detach it with: stord detach '{at}'"
            )));
        }
    }
    Ok(())
}

fn path_of(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("stord.io-disk-{name}.json"))
}

/// Lets containers have the device.
///
/// # Errors
/// The file cannot be written.
pub fn write(name: &str, device: &Path) -> Result<(), Error> {
    let path = path_of(name);
    let text = format!(
        "{:#}\n",
        json!({
            "cdiVersion": VERSION,
            "kind": KIND,
            "devices": [{
                "name": name,
                "containerEdits": {"deviceNodes": [{"path": device.to_str()}]},
            }],
        })
    );
    // Runtimes that look meanwhile find nothing, or all of it.
    let unfinished = path.with_extension("new");
    let written = fs::create_dir_all(DIRECTORY)
        .and_then(|()| fs::write(&unfinished, text))
        .and_then(|()| fs::rename(&unfinished, &path));
    written.map_err(|error: io::Error| {
        let reason = reason(&error);
        Error::generic(format!("cannot write '{}': {reason}", path.display())).with_source(error)
    })
}

/// Takes the device from containers that are started from now on.
pub fn remove(name: &str) {
    let _ = fs::remove_file(path_of(name));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_the_interface_allows() {
        for good in ["a", "disk0", "a_b-c.d:e", "0"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "a/b", "a b", "..", "ä"] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
