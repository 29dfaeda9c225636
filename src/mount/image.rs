//! The image that is to be mounted or attached: whether it is one, whether it is free, and its format.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use stord_bridges::mount_table::{is_dead, mount_at};
use stord_qmp::Error;

use super::guess::{self, Format};
use super::mountpoint;
use super::registry::Registry;
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
    /// Looks at the image that is to be served; its format is guessed unless it is given.
    ///
    /// # Errors
    /// It is none, it is served already, or its format is not clear.
    pub fn look_at(
        image: &Path,
        read_only: bool,
        format: Option<Format>,
        registry: &Registry,
    ) -> Result<Self, Error> {
        if remote::is_remote(image) {
            return Self::at_server(image, format);
        }
        let shown = image.display();
        let failed = |error: std::io::Error| {
            let reason = reason(&error);
            Error::generic(format!("cannot open '{shown}': {reason}")).with_source(error)
        };
        let at = mountpoint::absolute(image);
        if is_dead(&at) && mount_at(&at).is_some_and(|mount| mount.is_ours()) {
            // An image that was mounted over itself.
            mountpoint::clean(&at, registry)?;
        }
        let path = fs::canonicalize(image).map_err(failed)?;
        let kind = fs::metadata(&path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::generic(format!(
                "'{shown}' is no disk image: it is neither a file nor a block device"
            )));
        }
        if !read_only && let Some(other) = registry.find(&path).into_iter().find(|f| f.is_alive()) {
            let at = other.entry.at.display();
            let (message, hint) = match other.entry.device {
                None => (
                    format!("'{shown}' is mounted at '{at}' already"),
                    format!("Unmount it with: stord umount '{at}'"),
                ),
                Some(_) => (
                    format!("'{shown}' is attached as '{at}' already"),
                    format!("Detach it with: stord detach '{at}'"),
                ),
            };
            return Err(Error::generic(message).with_hint(hint));
        }
        let format = match format {
            Some(format) => format,
            None => {
                let file = File::open(&path).map_err(failed)?;
                // The end of a block device is where seeking ends, too.
                let size = std::io::Seek::seek(&mut &file, std::io::SeekFrom::End(0));
                guess::guess(image, &file, size.map_err(failed)?)?
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
    fn at_server(image: &Path, format: Option<Format>) -> Result<Self, Error> {
        // Nothing of this machine leads to it.
        let handle = open("/dev/null", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
        let handle = handle.map_err(|errno| Error::os("cannot open '/dev/null'", errno))?;
        Ok(Self {
            path: image.to_path_buf(),
            is_device: false,
            format: format.unwrap_or(Format::Raw),
            handle,
        })
    }
}
