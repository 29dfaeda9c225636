//! Takes a file system away from its path, by ourselves where that is allowed and through the
//! set-user-id helper where not.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

/// Programs that unmount for those who may not, in the order of trying.
const HELPERS: [&str; 2] = ["fusermount3", "fusermount"];

/// What to do about a file system that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InUse {
    /// Leave it.
    Refuse,
    /// Take it away from its path; its users keep what they have.
    Detach,
}

/// Unmounts what is at the path.
///
/// # Errors
/// `ResourceBusy` if it is in use, else what the kernel or the helper says.
pub fn unmount(path: &Path, in_use: InUse) -> io::Result<()> {
    let flags = match in_use {
        InUse::Refuse => MntFlags::empty(),
        InUse::Detach => MntFlags::MNT_DETACH,
    };
    match umount2(path, flags) {
        Err(Errno::EPERM) => by_helper(path, in_use),
        result => Ok(result?),
    }
}

fn by_helper(path: &Path, in_use: InUse) -> io::Result<()> {
    for helper in HELPERS {
        let mut command = Command::new(helper);
        command.arg("-u");
        if in_use == InUse::Detach {
            command.arg("-z");
        }
        let command = command.arg("--").arg(path).stdin(Stdio::null());
        let output = match command.output() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            output => output?,
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        // The helper has no other way to say it.
        return Err(if said.contains("busy") {
            Errno::EBUSY.into()
        } else {
            io::Error::other(said)
        });
    }
    Err(io::Error::other(
        "only root can unmount without fusermount3: install the package fuse3",
    ))
}
