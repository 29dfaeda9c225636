//! The file or directory over which an image is mounted: made if it is missing, cleared of what a
//! dead daemon left there, and removed afterwards if it was made.

use std::fs::{self, DirBuilder, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use stord_bridges::mount_table::{is_dead, mount_at};
use stord_qmp::Error;

use super::registry::Registry;
use super::unmount::{InUse, unmount};
use crate::report::{Origin, reason};

/// What an image is mounted over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// An empty directory.
    Directory,
}

/// A place to mount over.
#[derive(Debug)]
pub struct Mountpoint {
    path: PathBuf,
    created: bool,
}

impl Mountpoint {
    /// Makes the path ready to be mounted over.
    ///
    /// # Errors
    /// It is of another kind and cannot be made, or something is mounted there.
    pub fn prepare(path: &Path, kind: Kind, registry: &Registry) -> Result<Self, Error> {
        let path = absolute(path);
        let shown = path.display();
        let cleaned = match mount_at(&path) {
            Some(mount) if !is_dead(&path) => {
                let error = Error::generic(format!("something is mounted at '{shown}' already"));
                return Err(if mount.is_ours() {
                    error.with_hint(format!("Unmount it with: stord umount '{shown}'"))
                } else {
                    error
                });
            }
            Some(mount) if mount.is_ours() => clean(&path, registry)?,
            Some(mount) => {
                return Err(Error::generic(format!(
                    "'{shown}' is a dead mount of '{}', which stord did not make",
                    mount.source
                ))
                .with_hint(format!("Unmount it first: umount '{shown}'")));
            }
            None => false,
        };
        let failed = |error: io::Error| {
            let reason = reason(&error);
            Error::generic(format!("cannot mount at '{shown}': {reason}")).with_source(error)
        };
        match fs::metadata(&path) {
            Ok(found) => {
                if let Some(mistake) = kind.mistake(&path, &found).map_err(failed)? {
                    let error = Error::generic(format!("cannot mount at '{shown}': {mistake}"));
                    return Err(error.with_hint(kind.advice()));
                }
                Ok(Self {
                    path,
                    created: cleaned,
                })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                kind.create(&path).map_err(failed)?;
                Ok(Self {
                    path,
                    created: true,
                })
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// The mountpoint of a mount that another process made.
    pub fn of_mount(path: &Path, created: bool) -> Self {
        Self {
            path: path.to_path_buf(),
            created,
        }
    }

    /// Leaves the mountpoint to another process.
    pub fn leave(mut self) {
        self.created = false;
    }

    /// The absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file goes with this value.
    pub fn is_created(&self) -> bool {
        self.created
    }
}

impl Kind {
    /// What is wrong with mounting over what is there.
    fn mistake(self, path: &Path, found: &Metadata) -> io::Result<Option<&'static str>> {
        Ok(match self {
            Self::File if found.is_file() => None,
            Self::File if found.is_dir() => Some("it is a directory"),
            Self::File => Some("it is no regular file"),
            Self::Directory if !found.is_dir() => Some("it is no directory"),
            Self::Directory if fs::read_dir(path)?.next().is_some() => {
                Some("the directory is not empty")
            }
            Self::Directory => None,
        })
    }

    fn advice(self) -> &'static str {
        match self {
            Self::File => {
                "Images are mounted over files. Give the path of a file; it is created if it does \
                 not exist. With --partitions, an image is mounted over a directory."
            }
            Self::Directory => {
                "Give the path of an empty directory; it is created if it does not exist."
            }
        }
    }

    fn create(self, path: &Path) -> io::Result<()> {
        match self {
            Self::File => {
                let mut mode = OpenOptions::new();
                mode.write(true).create_new(true).mode(0o600);
                mode.open(path).map(drop)
            }
            Self::Directory => DirBuilder::new().mode(0o700).create(path),
        }
    }
}

impl Drop for Mountpoint {
    fn drop(&mut self) {
        if self.created {
            remove_created(&self.path);
        }
    }
}

/// Removes a mountpoint that was made for a mount, unless it has got another purpose.
pub fn remove_created(path: &Path) {
    let Ok(found) = fs::symlink_metadata(path) else {
        return;
    };
    if mount_at(path).is_some() {
        return;
    }
    if found.is_dir() {
        // It stays if there is something in it.
        let _ = fs::remove_dir(path);
    } else if found.is_file() && found.len() == 0 {
        let _ = fs::remove_file(path);
    }
}

/// The path without symbolic links, as far as it exists; works where a dead mount is at its end.
pub fn absolute(path: &Path) -> PathBuf {
    if let Ok(whole) = fs::canonicalize(path) {
        return whole;
    }
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    match (path.parent().map(fs::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => path,
    }
}

/// Takes away the mount that a dead daemon left. True if it had made the mountpoint for it.
///
/// # Errors
/// The kernel or the helper refuses.
pub fn clean(path: &Path, registry: &Registry) -> Result<bool, Error> {
    let shown = path.display();
    unmount(path, InUse::Detach).map_err(|error| {
        let reason = reason(&error);
        Error::generic(format!(
            "cannot clear the dead mount at '{shown}': {reason}"
        ))
        .with_source(error)
    })?;
    Origin::none().info(&format!(
        "cleared the mount that a dead stord left at '{shown}'"
    ));
    let mut created = false;
    for found in registry.find(path) {
        if found.entry.at == path && !found.is_alive() {
            created |= found.entry.created;
            found.remove();
        }
    }
    Ok(created)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepare(path: &Path) -> Result<Mountpoint, String> {
        Mountpoint::prepare(path, Kind::File, &Registry::of_user()).map_err(|error| error.message)
    }

    #[test]
    fn missing_file_is_made_and_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk.raw");
        let mountpoint = prepare(&path).expect("it can be made");
        assert!(path.is_file() && mountpoint.is_created());
        drop(mountpoint);
        assert!(!path.exists());
    }

    #[test]
    fn existing_file_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk.raw");
        fs::write(&path, "").expect("writable");
        drop(prepare(&path).expect("it is there"));
        assert!(path.exists());
    }

    #[test]
    fn created_file_that_was_written_to_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk.raw");
        let mountpoint = prepare(&path).expect("it can be made");
        fs::write(&path, "precious").expect("writable");
        drop(mountpoint);
        assert!(path.exists());
    }

    #[test]
    fn directory_must_be_empty_and_is_removed_if_it_was_made() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("disk");
        let prepare = || {
            Mountpoint::prepare(&path, Kind::Directory, &Registry::of_user())
                .map_err(|error| error.message)
        };
        let mountpoint = prepare().expect("it can be made");
        assert!(path.is_dir());
        drop(mountpoint);
        assert!(!path.exists());
        fs::create_dir(&path).expect("writable");
        fs::write(path.join("file"), "").expect("writable");
        assert!(prepare().is_err_and(|message| message.ends_with("the directory is not empty")));
        assert!(path.exists());
    }

    #[test]
    fn directory_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(prepare(dir.path()).is_err_and(|m| m.ends_with("it is a directory")));
        let absent = dir.path().join("absent/disk.raw");
        assert!(prepare(&absent).is_err_and(|m| m.ends_with("No such file or directory")));
    }

    #[test]
    fn place_of_a_mount_is_refused() {
        assert!(prepare(Path::new("/proc")).is_err_and(|m| m.contains("mounted at '/proc'")));
    }
}
