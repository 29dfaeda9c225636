//! A file that takes another's place at one stroke: it is made without a name, and gets the name only when it is complete. Until then
//! nothing has changed for anybody, and a process that ends before leaves nothing behind.
//!
//! File systems without nameless files get a hidden one beside the target instead, removed when it is dropped.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, fchown, linkat};
use stord_qmp::Error;

use crate::report::reason;

/// Symbolic links that are followed before they count as a loop.
const MAX_LINKS: usize = 40;

/// The new file.
pub struct Replacement {
    target: PathBuf,
    file: File,
    /// The hidden name, where the file has one.
    temporary: Option<PathBuf>,
}

impl Replacement {
    /// A new, empty file for the place `path`, with the owner and the mode of the file that is there, as far as they can be had.
    ///
    /// # Errors
    /// No file can be made in that directory.
    pub fn new(path: &Path) -> Result<Self, Error> {
        let failed = |error: io::Error| cannot("make a file in the directory of", path, &error);
        let target = follow(path).map_err(failed)?;
        let (file, temporary) = match nameless(directory(&target)) {
            Ok(file) => (file, None),
            // Without /proc a nameless file could never get a name.
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL | Errno::ENOENT) => {
                let hidden = hidden_name(&target);
                let file = File::options()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .mode(0o644)
                    .open(&hidden)
                    .map_err(failed)?;
                (file, Some(hidden))
            }
            Err(errno) => return Err(failed(errno.into())),
        };
        let made = Self {
            target,
            file,
            temporary,
        };
        if let Ok(old) = fs::metadata(&made.target) {
            made.resemble(&old).map_err(failed)?;
        }
        Ok(made)
    }

    /// The name under which the file can be opened until it is in its place.
    pub fn name(&self) -> PathBuf {
        self.temporary
            .clone()
            .unwrap_or_else(|| descriptor_path(&self.file))
    }

    /// Puts the file, whose content is complete, into its place and makes that durable. Without `replaces`, only where nothing is.
    ///
    /// # Errors
    /// The name is taken or cannot be given; the file that was there is still there then.
    pub fn put_in_place(mut self, replaces: bool) -> Result<(), Error> {
        let failed =
            |error: io::Error| cannot("put the new file into the place of", &self.target, &error);
        self.file.sync_all().map_err(failed)?;
        if replaces {
            let hidden = match &self.temporary {
                Some(hidden) => hidden.clone(),
                None => {
                    let hidden = hidden_name(&self.target);
                    self.link(&hidden).map_err(failed)?;
                    hidden
                }
            };
            if let Err(error) = fs::rename(&hidden, &self.target) {
                let _ = fs::remove_file(&hidden);
                return Err(failed(error));
            }
            self.temporary = None;
        } else {
            match self.link(&self.target) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(exists_already(&self.target));
                }
                linked => linked.map_err(failed)?,
            }
        }
        // That the name is durable, too, is as much as can be done: some file systems have no such call.
        if let Ok(directory) = File::open(directory(&self.target)) {
            let _ = directory.sync_all();
        }
        Ok(())
    }

    /// Gives the file a name where nothing is.
    fn link(&self, name: &Path) -> io::Result<()> {
        match &self.temporary {
            Some(hidden) => fs::hard_link(hidden, name),
            None => Ok(linkat(
                AT_FDCWD,
                &descriptor_path(&self.file),
                AT_FDCWD,
                name,
                AtFlags::AT_SYMLINK_FOLLOW,
            )?),
        }
    }

    fn resemble(&self, old: &Metadata) -> io::Result<()> {
        let new = self.file.metadata()?;
        let (uid, gid) = (Uid::from_raw(old.uid()), Gid::from_raw(old.gid()));
        if (new.uid(), new.gid()) != (old.uid(), old.gid())
            && fchown(&self.file, Some(uid), Some(gid)).is_err()
        {
            // Only root gives files away; the group can often be kept.
            let _ = fchown(&self.file, None, Some(gid));
        }
        let mode = fs::Permissions::from_mode(old.mode() & 0o7777);
        self.file.set_permissions(mode)
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if let Some(hidden) = &self.temporary {
            // Linked to its place by now, or of no use.
            let _ = fs::remove_file(hidden);
        }
    }
}

/// That a file is there which nobody said to write over.
pub fn exists_already(path: &Path) -> Error {
    Error::generic(format!("'{}' exists already", path.display()))
        .with_hint("Choose another name, or write over it with --force.")
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> Error {
    Error::generic(format!(
        "cannot {what} '{}': {}",
        path.display(),
        reason(error)
    ))
}

fn nameless(directory: &Path) -> nix::Result<File> {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let file = File::from(open(directory, flags, Mode::from_bits_truncate(0o644))?);
    if descriptor_path(&file).exists() {
        Ok(file)
    } else {
        Err(Errno::EOPNOTSUPP)
    }
}

fn descriptor_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn directory(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A name beside the target that nobody else has.
fn hidden_name(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let moment = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    // Names have at most 255 bytes.
    let name: String = name.chars().take(50).collect();
    directory(target).join(format!(".{name}.{}-{moment:x}.new", std::process::id()))
}

/// Where the path leads, through symbolic links, whether anything is there or not.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut at = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&at) {
            Ok(to) => at = directory(&at).join(to),
            Err(_) => return Ok(at),
        }
    }
    Err(Errno::ELOOP.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_old_file_stays_until_the_new_one_is_complete() {
        let scratch = tempfile::tempdir().unwrap();
        let target = scratch.path().join("a.img");
        fs::write(&target, "old").unwrap();
        fs::set_permissions(&target, fs::Permissions::from_mode(0o640)).unwrap();
        let new = Replacement::new(&target).unwrap();
        fs::write(new.name(), "new").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"old");
        new.put_in_place(true).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(fs::metadata(&target).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(names(scratch.path()), ["a.img"]);
    }

    #[test]
    fn a_dropped_file_leaves_nothing_behind() {
        let scratch = tempfile::tempdir().unwrap();
        let new = Replacement::new(&scratch.path().join("a.img")).unwrap();
        File::options()
            .write(true)
            .open(new.name())
            .unwrap()
            .write_all(b"half")
            .unwrap();
        drop(new);
        assert!(names(scratch.path()).is_empty());
    }

    #[test]
    fn a_file_made_meanwhile_is_not_replaced_unasked() {
        let scratch = tempfile::tempdir().unwrap();
        let target = scratch.path().join("a.img");
        let new = Replacement::new(&target).unwrap();
        fs::write(&target, "theirs").unwrap();
        assert!(
            new.put_in_place(false)
                .unwrap_err()
                .message
                .ends_with("exists already")
        );
        assert_eq!(fs::read(&target).unwrap(), b"theirs");
        assert_eq!(names(scratch.path()), ["a.img"]);
    }

    #[test]
    fn symbolic_links_stay() {
        let scratch = tempfile::tempdir().unwrap();
        let (target, link) = (scratch.path().join("a.img"), scratch.path().join("link"));
        std::os::unix::fs::symlink("a.img", &link).unwrap();
        Replacement::new(&link)
            .unwrap()
            .put_in_place(false)
            .unwrap();
        assert!(target.is_file());
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }
}
