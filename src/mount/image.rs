//! The image that is to be mounted: whether it is one, whether it is free, and its format.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use stord_bridges::mount_table::{is_dead, mount_at};
use stord_qmp::Error;

use super::guess::{self, Format};
use super::registry::Registry;
use super::{MountArgs, mountpoint};
use crate::remote;
use crate::report::reason;

/// An image that exists, and how it is to be opened.
pub struct Image {
    /// Its path without symbolic links, or its URI.
    pub path: PathBuf,
    /// Whether it is a block device.
    pub is_device: bool,
    /// How it is opened.
    pub format: Format,
    /// Leads to it whatever its path leads to later, unless it is at a server.
    pub handle: OwnedFd,
}

impl Image {
    /// Looks at the image that is to be mounted.
    ///
    /// # Errors
    /// It is none, it is mounted already, or its format is not clear.
    pub fn look_at(args: &MountArgs, registry: &Registry) -> Result<Self, Error> {
        if remote::is_remote(&args.image) {
            return Self::at_server(args);
        }
        let shown = args.image.display();
        let failed = |error: std::io::Error| {
            let reason = reason(&error);
            Error::generic(format!("cannot open '{shown}': {reason}")).with_source(error)
        };
        let at = mountpoint::absolute(&args.image);
        if is_dead(&at) && mount_at(&at).is_some_and(|mount| mount.is_ours()) {
            // An image that was mounted over itself.
            mountpoint::clean(&at, registry)?;
        }
        let path = fs::canonicalize(&args.image).map_err(failed)?;
        let kind = fs::metadata(&path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::generic(format!(
                "'{shown}' is no disk image: it is neither a file nor a block device"
            )));
        }
        if !args.read_only
            && let Some(other) = registry.find(&path).into_iter().find(|f| f.is_alive())
        {
            let at = other.entry.mountpoint.display().to_string();
            return Err(
                Error::generic(format!("'{shown}' is mounted at '{at}' already"))
                    .with_hint(format!("Unmount it with: stord umount '{at}'")),
            );
        }
        let format = match args.format {
            Some(format) => format,
            None => {
                let file = File::open(&path).map_err(failed)?;
                // The end of a block device is where seeking ends, too.
                let size = std::io::Seek::seek(&mut &file, std::io::SeekFrom::End(0));
                guess::guess(&args.image, &file, size.map_err(failed)?)?
            }
        };
        let handle = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
        let handle = handle.map_err(|errno| failed(errno.into()))?;
        Ok(Self {
            path,
            handle,
            is_device: kind.is_block_device(),
            format,
        })
    }
    /// What a URI leads to: a disk, unless it is said to be something else.
    fn at_server(args: &MountArgs) -> Result<Self, Error> {
        // Nothing of this machine leads to it.
        let handle = open("/dev/null", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
        let handle = handle.map_err(|errno| Error::os("cannot open '/dev/null'", errno))?;
        Ok(Self {
            path: args.image.clone(),
            is_device: false,
            format: args.format.unwrap_or(Format::Raw),
            handle,
        })
    }
}
