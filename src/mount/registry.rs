//! Which images this user's stords have mounted where. Each of them keeps a file in a directory of
//! the user's, locked as long as it runs: who gets the lock knows that the owner is gone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};
use stord_bridges::StateDirectory;
use stord_qmp::Error;

use crate::report::reason;

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The process that serves it.
    pub pid: u32,
    /// The image's absolute path.
    pub image: PathBuf,
    /// The mountpoint's absolute path.
    pub mountpoint: PathBuf,
    /// Whether the mountpoint was made for the mount and goes with it.
    pub created: bool,
}

/// An entry of this process, there until dropped.
#[derive(Debug)]
pub struct Registered {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        if let Some(directory) = self.path.parent() {
            // It stays while others have entries there.
            let _ = fs::remove_dir(directory);
        }
    }
}

/// An entry that was found.
#[derive(Debug)]
pub struct Found {
    /// What it says.
    pub entry: Entry,
    path: PathBuf,
}

impl Found {
    /// Whether the process that made the entry still runs.
    pub fn is_alive(&self) -> bool {
        let Ok(file) = File::open(&self.path) else {
            return false;
        };
        matches!(
            Flock::lock(file, FlockArg::LockSharedNonblock),
            Err((_, Errno::EWOULDBLOCK))
        )
    }

    /// Removes the entry of a process that is gone, and its socket.
    pub fn remove(&self) {
        let _ = fs::remove_file(self.path.with_extension("sock"));
        let _ = fs::remove_file(&self.path);
    }
}

/// A directory of entries.
#[derive(Clone, Debug)]
pub struct Registry(StateDirectory);

impl Registry {
    /// The registry of the user who runs this process.
    pub fn of_user() -> Self {
        Self(StateDirectory::of_user())
    }

    /// Where the process of an entry can be talked to.
    pub fn socket_of(&self, pid: u32) -> PathBuf {
        self.0.path().join(format!("{pid}.sock"))
    }

    /// Makes an entry of this process.
    ///
    /// # Errors
    /// The directory cannot be made, written or trusted.
    pub fn register(&self, entry: &Entry) -> Result<Registered, Error> {
        self.try_register(entry).map_err(|error| {
            let reason = reason(&error);
            Error::generic(format!(
                "cannot note the mount in '{}': {reason}",
                self.0.path().display()
            ))
            .with_source(error)
        })
    }

    fn try_register(&self, entry: &Entry) -> io::Result<Registered> {
        let path = self.0.path().join(format!("{}.json", entry.pid));
        let unfinished = self.0.path().join(format!("{}.new", entry.pid));
        let mut mode = OpenOptions::new();
        mode.write(true).create(true).truncate(true).mode(0o600);
        let file = loop {
            self.0.create()?;
            match mode.open(&unfinished) {
                // Another stord has removed the directory with its last entry.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => break result?,
            }
        };
        let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| io::Error::from(errno))?;
        lock.write_all(encode(entry).to_string().as_bytes())?;
        // Complete and locked before anybody sees it.
        fs::rename(&unfinished, &path)?;
        Ok(Registered { path, _lock: lock })
    }

    /// The directory, which is there and nobody else's. Another stord of the user may remove it as
    /// long as it is empty.
    ///
    /// # Errors
    /// It cannot be made, or belongs to another user.
    pub fn directory(&self) -> io::Result<&Path> {
        self.0.create()
    }

    /// Every entry that can be read.
    pub fn list(&self) -> Vec<Found> {
        let Ok(directory) = fs::read_dir(self.0.path()) else {
            return Vec::new();
        };
        let paths = directory.filter_map(|item| Some(item.ok()?.path()));
        paths
            .filter(|path| path.extension().is_some_and(|ending| ending == "json"))
            .filter_map(|path| {
                let text = fs::read_to_string(&path).ok()?;
                let entry = decode(&serde_json::from_str(&text).ok()?)?;
                Some(Found { entry, path })
            })
            .collect()
    }

    /// The entries with that mountpoint, or else those with that image.
    pub fn find(&self, path: &Path) -> Vec<Found> {
        let (at, others): (Vec<_>, Vec<_>) = self
            .list()
            .into_iter()
            .partition(|found| found.entry.mountpoint == path);
        if !at.is_empty() {
            return at;
        }
        let has_image = |found: &Found| found.entry.image == path;
        others.into_iter().filter(has_image).collect()
    }
}

fn encode(entry: &Entry) -> Value {
    json!({
        "pid": entry.pid,
        "image": entry.image.to_str(),
        "mountpoint": entry.mountpoint.to_str(),
        "created": entry.created,
    })
}

fn decode(value: &Value) -> Option<Entry> {
    let path = |key: &str| Some(PathBuf::from(value.get(key)?.as_str()?));
    Some(Entry {
        pid: u32::try_from(value.get("pid")?.as_u64()?).ok()?,
        image: path("image")?,
        mountpoint: path("mountpoint")?,
        created: value.get("created")?.as_bool()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry {
            pid: std::process::id(),
            image: "/images/a b".into(),
            mountpoint: "/mnt/a".into(),
            created: true,
        }
    }

    #[test]
    fn entry_is_alive_until_dropped() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry(StateDirectory::at(dir.path().join("stord")));
        assert!(registry.list().is_empty());
        let registered = registry.register(&entry()).expect("a directory of ours");
        for target in ["/mnt/a", "/images/a b"] {
            let found = registry.find(Path::new(target));
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].entry, entry());
            assert!(found[0].is_alive());
        }
        assert!(registry.find(Path::new("/mnt")).is_empty());
        drop(registered);
        assert!(registry.list().is_empty());
    }

    #[test]
    fn directory_goes_with_the_last_entry() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry(StateDirectory::at(dir.path().join("stord")));
        let first = registry.register(&entry()).expect("a directory of ours");
        let other = Entry { pid: 1, ..entry() };
        let second = registry.register(&other).expect("a directory of ours");
        drop(first);
        assert!(registry.0.path().exists());
        drop(second);
        assert!(!registry.0.path().exists());
    }

    #[test]
    fn entry_of_a_dead_process_is_told_and_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let registry = Registry(StateDirectory::at(dir.path()));
        let path = dir.path().join("1.json");
        fs::write(&path, encode(&entry()).to_string()).expect("writable");
        fs::write(dir.path().join("2.json"), "{}").expect("writable");
        let found = registry.list();
        assert_eq!(found.len(), 1);
        assert!(!found[0].is_alive());
        found[0].remove();
        assert!(!path.exists());
    }
}
