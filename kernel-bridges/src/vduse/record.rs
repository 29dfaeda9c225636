//! What a daemon keeps for the one that comes after it: how a device was made, of which image, and what is under way in its queues.
//!
//! A file in a directory of the user's, in memory as a rule (/run), so that it goes with the kernel whose device it describes. Nobody else
//! can have made it: it is opened without following links, and has to belong to this user and be writable by no other. It is locked as long as
//! its daemon runs. First comes the description as JSON, then, page by page, the record of each queue in the layout of [`InFlight`].

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use serde_json::{Value, json};
use vduse::{Device, DeviceName};

use crate::state_directory::StateDirectory;
use crate::virtio::in_flight::InFlight;
use crate::virtio::memory::Access;
use crate::virtio::memory::mapping::Mapping;

/// The version of the file's layout.
const VERSION: u64 = 1;
/// Room for the description.
const HEADER: u64 = 8192;
/// The directory for these files, inside that of the user's.
const DIRECTORY: &str = "vduse";

/// How a device was made, and of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Description {
    /// The image's name.
    pub(super) image: String,
    /// In bytes.
    pub(super) size: u64,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
    /// In bytes.
    pub(super) logical_block_size: u32,
    pub(super) serial: String,
    pub(super) writable: bool,
}

impl Description {
    /// What cannot change while the kernel has the device: its name in the options, as it was, and as it is to be.
    pub(super) fn difference(&self, wanted: &Self) -> Option<(&'static str, String, String)> {
        let members = |of: &Self| {
            [
                ("image", of.image.clone()),
                ("num-queues", of.queues.to_string()),
                ("queue-size", of.queue_size.to_string()),
                ("logical-block-size", of.logical_block_size.to_string()),
                ("serial", of.serial.clone()),
                ("writable", of.writable.to_string()),
            ]
        };
        let pairs = members(self).into_iter().zip(members(wanted));
        pairs
            .map(|((name, was), (_, is))| (name, was, is))
            .find(|(_, was, is)| was != is)
    }

    fn encode(&self, incarnation: &Incarnation) -> Value {
        json!({
            "version": VERSION,
            "device": incarnation.device,
            "inode": incarnation.inode,
            "image": self.image,
            "size": self.size,
            "num-queues": self.queues,
            "queue-size": self.queue_size,
            "logical-block-size": self.logical_block_size,
            "serial": self.serial,
            "writable": self.writable,
        })
    }

    fn decode(value: &Value) -> Option<(Self, Incarnation)> {
        let number = |key: &str| value.get(key)?.as_u64();
        let text = |key: &str| Some(value.get(key)?.as_str()?.to_owned());
        if number("version") != Some(VERSION) {
            return None;
        }
        let incarnation = Incarnation {
            device: number("device")?,
            inode: number("inode")?,
        };
        let description = Self {
            image: text("image")?,
            size: number("size")?,
            queues: number("num-queues")?.try_into().ok()?,
            queue_size: number("queue-size")?.try_into().ok()?,
            logical_block_size: number("logical-block-size")?.try_into().ok()?,
            serial: text("serial")?,
            writable: value.get("writable")?.as_bool()?,
        };
        Some((description, incarnation))
    }
}

/// Which of the devices that had this name over time is meant: a new one has another file in /dev.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Incarnation {
    device: u64,
    inode: u64,
}

impl Incarnation {
    fn of(node: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(node)?;
        Ok(Self {
            device: found.rdev(),
            inode: found.ino(),
        })
    }
}

/// The file of one device, locked.
pub(super) struct Record {
    path: PathBuf,
    /// The device's file in /dev.
    node: PathBuf,
    file: Flock<File>,
}

impl Record {
    /// Opens the file of a device, or makes an empty one.
    ///
    /// # Errors
    /// `ResourceBusy` while another daemon has it; `PermissionDenied` where somebody else could have made or changed it.
    pub(super) fn open(directory: &StateDirectory, name: &DeviceName) -> io::Result<Self> {
        Self::open_for(directory, name, Device::path_of(name))
    }

    fn open_for(directory: &StateDirectory, name: &DeviceName, node: PathBuf) -> io::Result<Self> {
        loop {
            let path = directory.create_inside(DIRECTORY)?.join(name.as_str());
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
                .open(&path);
            let file = match opened {
                // Another stord has removed the directory with its last file.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened?,
            };
            check_owner(&file)?;
            let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
                |(_, errno)| match errno {
                    Errno::EWOULDBLOCK => io::ErrorKind::ResourceBusy.into(),
                    errno => io::Error::from(errno),
                },
            )?;
            // Whoever had it may have removed it meanwhile.
            let held = file.metadata()?;
            match fs::symlink_metadata(&path) {
                Ok(there) if (there.dev(), there.ino()) == (held.dev(), held.ino()) => {
                    return Ok(Self { path, node, file });
                }
                _ => {}
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What it says of the device that exists now; `None` if it is about another one, or says nothing.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn read(&self) -> io::Result<Option<Description>> {
        let mut bytes = vec![0; usize::try_from(HEADER).expect("small")];
        let length = match self.file.read_at(&mut bytes, 0)? {
            0 => return Ok(None),
            length => length,
        };
        let text = bytes[..length].split(|byte| *byte == 0).next();
        let value = text.and_then(|text| serde_json::from_slice(text).ok());
        let found = value.as_ref().and_then(Description::decode);
        let Some((description, incarnation)) = found else {
            return Ok(None);
        };
        let is_whole = self.file.metadata()?.len() >= length_for(&description);
        let is_current = Incarnation::of(&self.node)? == incarnation;
        Ok((is_whole && is_current).then_some(description))
    }

    /// Begins anew, for a device that exists now and has nothing under way.
    ///
    /// # Errors
    /// There is no room.
    pub(super) fn begin(&self, description: &Description) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.set_len(length_for(description))?;
        self.describe(description)
    }

    /// Replaces the description.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn describe(&self, description: &Description) -> io::Result<()> {
        let incarnation = Incarnation::of(&self.node)?;
        let mut bytes = description.encode(&incarnation).to_string().into_bytes();
        let room = usize::try_from(HEADER).expect("small");
        if bytes.len() >= room {
            return Err(io::Error::other("the names are too long"));
        }
        // In one piece, so that a process that dies leaves the old or the new one.
        bytes.resize(room, 0);
        self.file.write_all_at(&bytes, 0)?;
        (&*self.file).flush()
    }

    /// The records of the queues.
    ///
    /// # Errors
    /// They cannot be mapped.
    pub(super) fn queues(&self, description: &Description) -> io::Result<Vec<InFlight>> {
        let length = length_for(description);
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let mapping = Mapping::new(self.file.as_fd(), 0, length, Access::Write)?;
        let first = usize::try_from(HEADER).expect("small");
        let each = InFlight::size(description.queue_size);
        let queue = |index: u16| {
            let offset = first + usize::from(index) * each;
            InFlight::new(Arc::clone(&mapping), offset, description.queue_size)
        };
        let queues: Option<Vec<InFlight>> = (0..description.queues).map(queue).collect();
        queues.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Removes the file of a device that is gone, and the directories with their last entry.
    pub(super) fn remove(self) {
        let _ = fs::remove_file(&self.path);
        let directories = self.path.ancestors().skip(1).take(2);
        for directory in directories {
            if fs::remove_dir(directory).is_err() {
                break;
            }
        }
    }
}

fn length_for(description: &Description) -> u64 {
    let each = u64::try_from(InFlight::size(description.queue_size)).expect("small");
    HEADER + u64::from(description.queues) * each
}

fn check_owner(file: &File) -> io::Result<()> {
    let found = file.metadata()?;
    let is_ours = found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0;
    if found.is_file() && is_ours && found.nlink() <= 1 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        "it belongs to somebody else, or others may write to it",
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use tempfile::TempDir;

    use super::*;

    struct Place {
        dir: TempDir,
        name: DeviceName,
    }

    impl Place {
        fn new() -> Self {
            let dir = TempDir::new().expect("a directory");
            fs::write(dir.path().join("node"), "").expect("writable");
            let name = "disk".parse().expect("a good name");
            Self { dir, name }
        }

        fn state(&self) -> StateDirectory {
            StateDirectory::at(self.dir.path().join("stord"))
        }

        fn file(&self) -> PathBuf {
            self.state().path().join("vduse/disk")
        }

        fn open(&self) -> io::Result<Record> {
            Record::open_for(&self.state(), &self.name, self.dir.path().join("node"))
        }
    }

    fn description() -> Description {
        Description {
            image: "/images/a.qcow2".into(),
            size: 1 << 30,
            queues: 2,
            queue_size: 256,
            logical_block_size: 512,
            serial: "s".into(),
            writable: true,
        }
    }

    #[test]
    fn what_was_written_is_read_by_the_next() {
        let place = Place::new();
        let record = place.open().expect("new");
        assert_eq!(record.read().expect("readable"), None);
        record.begin(&description()).expect("room");
        assert_eq!(record.queues(&description()).expect("room").len(), 2);
        drop(record);
        let record = place.open().expect("there");
        assert_eq!(record.read().expect("readable"), Some(description()));
        record.remove();
        assert!(!place.state().path().exists());
    }

    #[test]
    fn a_record_of_an_earlier_device_of_that_name_says_nothing() {
        let place = Place::new();
        let record = place.open().expect("new");
        record.begin(&description()).expect("room");
        // Another file, while the first is still there, so that its number is another.
        fs::write(place.dir.path().join("other"), "").expect("writable");
        fs::rename(
            place.dir.path().join("other"),
            place.dir.path().join("node"),
        )
        .expect("ours");
        assert_eq!(record.read().expect("readable"), None);
    }

    #[test]
    fn damaged_records_say_nothing() {
        let place = Place::new();
        let record = place.open().expect("new");
        record.begin(&description()).expect("room");
        let whole = fs::read(place.file()).expect("readable");
        for damage in [
            &b""[..],
            b"{",
            b"{}",
            b"nonsense",
            &whole[..9000],
            &[0; 9000],
        ] {
            fs::write(place.file(), damage).expect("ours");
            assert_eq!(
                record.read().expect("readable"),
                None,
                "{} bytes",
                damage.len()
            );
        }
        let later = String::from_utf8_lossy(&whole).replace("\"version\":1", "\"version\":2");
        fs::write(place.file(), later).expect("ours");
        assert_eq!(record.read().expect("readable"), None);
    }

    #[test]
    fn a_record_is_used_by_one_process_at_a_time() {
        let place = Place::new();
        let held = place.open().expect("new");
        let refused = place.open().err().expect("it is held");
        assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy);
        drop(held);
        assert!(place.open().is_ok());
    }

    #[test]
    fn what_others_may_have_made_is_not_used() {
        let place = Place::new();
        place.state().create_inside(DIRECTORY).expect("ours");
        let target = place.dir.path().join("target");
        fs::write(&target, "").expect("writable");
        symlink(&target, place.file()).expect("writable");
        assert!(place.open().is_err(), "a link");
        fs::remove_file(place.file()).expect("ours");
        fs::hard_link(&target, place.file()).expect("writable");
        assert!(place.open().is_err(), "a file with two names");
        fs::remove_file(&target).expect("ours");
        fs::set_permissions(place.file(), fs::Permissions::from_mode(0o666)).expect("ours");
        let refused = place.open().err().expect("others may write to it");
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        if nix::unistd::geteuid().is_root() {
            fs::set_permissions(place.file(), fs::Permissions::from_mode(0o600)).expect("ours");
            std::os::unix::fs::chown(place.file(), Some(65534), None).expect("root may");
            let refused = place.open().err().expect("somebody else's");
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        }
    }

    #[test]
    fn the_first_difference_is_told_by_its_name() {
        let wanted = Description {
            queues: 4,
            size: 2 << 30,
            ..description()
        };
        let difference = description().difference(&wanted);
        let expected = ("num-queues", "2".to_owned(), "4".to_owned());
        assert_eq!(difference, Some(expected));
        // A disk may get another size.
        let grown = Description {
            size: 2 << 30,
            ..description()
        };
        assert_eq!(description().difference(&grown), None);
    }
}
