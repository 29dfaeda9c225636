//! Which images this user's stords have mounted where, or attached as which devices. Each of them keeps a file in a directory of
//! the user's, locked as long as it runs: who gets the lock knows that the owner is gone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};
use stord_bridges::StateDirectory;
use stord_qmp::Error;

use crate::lifecycle::SHUTDOWN_LIMIT;
use crate::report::reason;

/// How much longer than a daemon may take to end it is waited for.
pub const MARGIN: Duration = Duration::from_secs(10);
/// How long to wait between two looks at an entry.
pub const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A mount, or a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The process that serves it.
    pub pid: u32,
    /// The image's absolute path.
    pub image: PathBuf,
    /// The mountpoint's absolute path, or the device's.
    pub at: PathBuf,
    /// Whether the mountpoint was made for the mount and goes with it.
    pub created: bool,
    /// What there is to know of a device; `None` for a mount.
    pub device: Option<DeviceEntry>,
}

/// How an image is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceEntry {
    /// The name of the way to the kernel, as `--via` has it.
    pub via: String,
    /// Whether nobody may write.
    pub read_only: bool,
    /// What the kernel or udev knows it by.
    pub serial: Option<String>,
    /// The name that containers get it by.
    pub cdi: Option<String>,
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

    /// Waits for the end of a process that has been told to end: false if it takes longer than it may.
    pub fn ends(&self) -> bool {
        let deadline = Instant::now() + SHUTDOWN_LIMIT + MARGIN;
        while self.is_alive() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        true
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
                "cannot note in '{}' what is served: {reason}",
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

    /// The mounts among the entries.
    pub fn mounts(&self) -> Vec<Found> {
        let mut found = self.list();
        found.retain(|found| found.entry.device.is_none());
        found
    }

    /// The devices among the entries.
    pub fn devices(&self) -> Vec<Found> {
        let mut found = self.list();
        found.retain(|found| found.entry.device.is_some());
        found
    }

    /// The entries with that mountpoint or device, or else those with that image.
    pub fn find(&self, path: &Path) -> Vec<Found> {
        let (at, others): (Vec<_>, Vec<_>) = self
            .list()
            .into_iter()
            .partition(|found| found.entry.at == path);
        if !at.is_empty() {
            return at;
        }
        let has_image = |found: &Found| found.entry.image == path;
        others.into_iter().filter(has_image).collect()
    }
}

fn encode(entry: &Entry) -> Value {
    let device = entry.device.as_ref().map(|device| {
        json!({
            "via": device.via,
            "read-only": device.read_only,
            "serial": device.serial,
            "cdi": device.cdi,
        })
    });
    json!({
        "pid": entry.pid,
        "image": entry.image.to_str(),
        "mountpoint": entry.at.to_str(),
        "created": entry.created,
        "device": device,
    })
}

fn decode(value: &Value) -> Option<Entry> {
    let path = |key: &str| Some(PathBuf::from(value.get(key)?.as_str()?));
    let device = match value.get("device") {
        None | Some(Value::Null) => None,
        Some(device) => Some(decode_device(device)?),
    };
    Some(Entry {
        pid: u32::try_from(value.get("pid")?.as_u64()?).ok()?,
        image: path("image")?,
        at: path("mountpoint")?,
        created: value.get("created")?.as_bool()?,
        device,
    })
}

fn decode_device(value: &Value) -> Option<DeviceEntry> {
    let text = |key: &str| Some(value.get(key)?.as_str()?.to_owned());
    Some(DeviceEntry {
        via: text("via")?,
        read_only: value.get("read-only")?.as_bool()?,
        serial: text("serial"),
        cdi: text("cdi"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry {
            pid: std::process::id(),
            image: "/images/a b".into(),
            at: "/mnt/a".into(),
            created: true,
            device: None,
        }
    }

    #[test]
    fn entry_of_a_device_is_read_as_it_was_written() {
        let entry = Entry {
            at: "/dev/loop0".into(),
            created: false,
            device: Some(DeviceEntry {
                via: "loop".to_owned(),
                read_only: true,
                serial: None,
                cdi: Some("disk".to_owned()),
            }),
            ..entry()
        };
        assert_eq!(decode(&encode(&entry)), Some(entry));
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
