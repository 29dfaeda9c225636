//! What is mounted and how: everything that a process needs to know to serve it, which one process can write down for another.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stord_aio::{Errno, IoBuffer, IoVec};
use stord_block::graph::Claim;
use stord_block::{Backend, Permissions};
use stord_bridges::{Connection, DirectoryFile, MountExport, MountLayout};
use stord_qmp::Error;
use stord_qmp::schema::block::{
    BlockdevDiscardOptions, BlockdevDriver, BlockdevOptions, BlockdevOptionsFile,
    BlockdevOptionsQcow2, BlockdevOptionsRaw, BlockdevRef, OnOffAuto,
};

use super::guess::Format;
use super::partition::{Disk, Partition, Table};
use crate::daemon::Daemon;
use crate::remote;

/// The node with the image's content.
pub const IMAGE_NODE: &str = "image";

/// The node with a partition, before its number.
const PARTITION_NODE: &str = "partition-";

/// The file with the whole disk, where a directory shows partitions.
const DISK_FILE: &str = "disk.raw";

/// The export.
pub const EXPORT: &str = "mount";

/// What is mounted and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The image's path, without symbolic links, or its URI.
    pub image: PathBuf,
    /// Whether the image is a block device.
    pub is_device: bool,
    /// How the image is opened.
    pub format: Format,
    /// Whether nobody may write.
    pub read_only: bool,
    /// What is shown.
    pub layout: Layout,
    /// Whether the mount is kept when its daemon dies.
    pub keep: bool,
    /// The mountpoint's absolute path.
    pub mountpoint: PathBuf,
    /// Whether the mountpoint was made for the mount and goes with it.
    pub created: bool,
    /// How often in a row a daemon that served it has died soon.
    pub deaths: u64,
}

/// What a mount shows of its image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// All of it, as a file.
    Whole,
    /// A partition, as a file.
    Partition(Partition),
    /// All of it and these partitions, as the files of a directory.
    Directory(Vec<Partition>),
}

/// What of an image is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// All of it.
    Disk,
    /// The partition of that number.
    Partition(u32),
    /// All of it and its partitions.
    Partitions,
}

impl Layout {
    /// The node with what is shown, or with the whole disk where there is more.
    pub fn node(&self) -> String {
        match self {
            Self::Partition(partition) => partition_node(partition.number),
            Self::Whole | Self::Directory(_) => IMAGE_NODE.to_owned(),
        }
    }

    fn partitions(&self) -> &[Partition] {
        match self {
            Self::Whole => &[],
            Self::Partition(partition) => std::slice::from_ref(partition),
            Self::Directory(partitions) => partitions,
        }
    }
}

/// The options by which an image is opened.
pub fn image_options(
    path: &str,
    is_device: bool,
    format: Format,
    read_only: bool,
) -> BlockdevOptions {
    let file = BlockdevOptionsFile::new(path);
    let protocol = if is_device {
        BlockdevDriver::HostDevice(file)
    } else {
        BlockdevDriver::File(file)
    };
    disk_options(protocol, format, read_only)
}

/// The options by which a disk is opened that is reached in this way.
pub fn disk_options(protocol: BlockdevDriver, format: Format, read_only: bool) -> BlockdevOptions {
    let child = BlockdevRef::Definition(Box::new(node(protocol, read_only)));
    let driver = match format {
        Format::Raw => BlockdevDriver::Raw(BlockdevOptionsRaw::new(child)),
        Format::Qcow2 => BlockdevDriver::Qcow2(BlockdevOptionsQcow2::new(child)),
    };
    node(driver, read_only)
}

/// What all nodes have: discards reach the file, so that deleting files in the image frees space.
fn node(driver: BlockdevDriver, read_only: bool) -> BlockdevOptions {
    BlockdevOptions {
        read_only: Some(read_only),
        discard: Some(BlockdevDiscardOptions::Unmap),
        ..BlockdevOptions::new(driver)
    }
}

/// The node with a partition.
pub fn partition_node(number: u32) -> String {
    format!("{PARTITION_NODE}{number}")
}

impl Plan {
    /// Opens what is asked for of the image, which the user calls `shown`, and notes it in the layout.
    ///
    /// # Errors
    /// It cannot be opened, or has no such partition.
    pub async fn open(
        &mut self,
        daemon: &Daemon,
        shown: &Path,
        choice: Choice,
    ) -> Result<(), Error> {
        let opened = self.open_image(daemon).await;
        opened.map_err(|error| self.advise_on_opening(error, shown))?;
        if choice == Choice::Disk {
            return Ok(());
        }
        let explain = |error: Error| error.context(format!("'{}'", shown.display()));
        let table = find_partitions(daemon).await.map_err(explain)?;
        self.layout = match choice {
            Choice::Partition(number) => {
                Layout::Partition(table.partition(number).map_err(explain)?)
            }
            Choice::Disk | Choice::Partitions => {
                let shown = table.0.into_iter().filter(|found| !found.is_container);
                Layout::Directory(shown.collect())
            }
        };
        self.open_partitions(daemon).await
    }

    fn advise_on_opening(&self, error: Error, shown: &Path) -> Error {
        let shown = shown.display();
        let error = if error.message.contains(&*self.image.to_string_lossy()) {
            error
        } else {
            error.context(format!("cannot open '{shown}'"))
        };
        let unwritable = ["Permission denied", "Read-only file system"]
            .iter()
            .any(|reason| error.message.ends_with(reason));
        if unwritable && !self.read_only {
            return error.with_hint(format!(
                "If '{shown}' cannot be opened for writing, try with --read-only."
            ));
        }
        error
    }

    /// Opens the image.
    ///
    /// # Errors
    /// It cannot be opened.
    pub async fn open_image(&self, daemon: &Daemon) -> Result<(), Error> {
        let options = if remote::is_remote(&self.image) {
            let driver = remote::driver(&self.image, daemon.objects.credentials())?;
            disk_options(driver, self.format, self.read_only)
        } else {
            let path = self.image.to_string_lossy();
            image_options(&path, self.is_device, self.format, self.read_only)
        };
        daemon.graph.blockdev_add(options.named(IMAGE_NODE)).await
    }

    /// Opens a node for each partition that is shown.
    ///
    /// # Errors
    /// One does not fit into the image.
    pub async fn open_partitions(&self, daemon: &Daemon) -> Result<(), Error> {
        for partition in self.layout.partitions() {
            let raw = BlockdevOptionsRaw {
                // A partition lies inside an image, whose size is a signed number.
                offset: i64::try_from(partition.start).ok(),
                size: i64::try_from(partition.len).ok(),
                ..BlockdevOptionsRaw::new(BlockdevRef::Reference(IMAGE_NODE.to_owned()))
            };
            let options = node(BlockdevDriver::Raw(raw), self.read_only);
            let options = options.named(partition_node(partition.number));
            daemon.graph.blockdev_add(options).await?;
        }
        Ok(())
    }

    /// Mounts what was opened, or goes on with a mount that another process served.
    ///
    /// # Errors
    /// It cannot be mounted, or the mount has gone.
    pub async fn export(
        &self,
        daemon: &Daemon,
        connection: Option<Connection>,
    ) -> Result<(), Error> {
        let options = MountExport {
            id: EXPORT.to_owned(),
            mountpoint: text_of(&self.mountpoint)?.to_owned(),
            layout: self.mount_layout(),
            writable: !self.read_only,
            // What has come through io_uring and is under way when a daemon dies is lost.
            io_uring: if self.keep {
                OnOffAuto::Off
            } else {
                OnOffAuto::Auto
            },
            outlives: self.keep,
        };
        daemon.exports.mount(&options, connection).await
    }

    fn mount_layout(&self) -> MountLayout {
        match &self.layout {
            Layout::Whole => MountLayout::File {
                node_name: IMAGE_NODE.to_owned(),
            },
            Layout::Partition(partition) => MountLayout::File {
                node_name: partition_node(partition.number),
            },
            Layout::Directory(partitions) => {
                let mut files = vec![DirectoryFile {
                    name: DISK_FILE.to_owned(),
                    node_name: IMAGE_NODE.to_owned(),
                }];
                files.extend(partitions.iter().map(|partition| DirectoryFile {
                    name: format!("p{}", partition.number),
                    node_name: partition_node(partition.number),
                }));
                MountLayout::Directory(files)
            }
        }
    }

    /// For [`from_json`](Self::from_json).
    pub fn to_json(&self) -> Value {
        let partitions = self.layout.partitions().iter();
        let partitions: Vec<_> = partitions
            .map(|partition| json!([partition.number, partition.start, partition.len]))
            .collect();
        json!({
            "image": self.image.to_str(),
            "is-device": self.is_device,
            "format": self.format.name(),
            "read-only": self.read_only,
            "layout": match self.layout {
                Layout::Whole => "whole",
                Layout::Partition(_) => "partition",
                Layout::Directory(_) => "directory",
            },
            "partitions": partitions,
            "keep": self.keep,
            "mountpoint": self.mountpoint.to_str(),
            "created": self.created,
            "deaths": self.deaths,
        })
    }

    /// Reads what [`to_json`](Self::to_json) wrote; `None` if it is something else.
    pub fn from_json(value: &Value) -> Option<Self> {
        let get = |key: &str| value.get(key);
        let path = |key: &str| Some(PathBuf::from(get(key)?.as_str()?));
        let partition = |value: &Value| {
            let number = |index: usize| value.get(index).and_then(Value::as_u64);
            Some(Partition {
                number: u32::try_from(number(0)?).ok()?,
                start: number(1)?,
                len: number(2)?,
                is_container: false,
            })
        };
        let partitions = get("partitions")?.as_array()?.iter().map(partition);
        let partitions: Vec<_> = partitions.collect::<Option<_>>()?;
        Some(Self {
            image: path("image")?,
            is_device: get("is-device")?.as_bool()?,
            format: Format::from_name(get("format")?.as_str()?)?,
            read_only: get("read-only")?.as_bool()?,
            layout: match get("layout")?.as_str()? {
                "whole" => Layout::Whole,
                "partition" => Layout::Partition(*partitions.first()?),
                "directory" => Layout::Directory(partitions),
                _ => return None,
            },
            keep: get("keep")?.as_bool()?,
            mountpoint: path("mountpoint")?,
            created: get("created")?.as_bool()?,
            deaths: get("deaths")?.as_u64()?,
        })
    }
}

/// The path as text, as which it goes into options and messages.
///
/// # Errors
/// It is no valid UTF-8.
pub fn text_of(path: &Path) -> Result<&str, Error> {
    path.to_str()
        .ok_or_else(|| Error::generic(format!("the path '{}' is not valid UTF-8", path.display())))
}

/// A user of the opened image who only reads.
async fn reader(daemon: &Daemon) -> Result<Backend, Error> {
    let claim = Claim {
        permissions: Permissions::CONSISTENT_READ,
        shared: Permissions::all(),
    };
    daemon.graph.attach(IMAGE_NODE, "mount", claim).await
}

/// The partitions that the content of the opened image lists.
async fn find_partitions(daemon: &Daemon) -> Result<Table, Error> {
    let backend = reader(daemon).await?;
    let context = daemon.contexts.main();
    let disk = Disk {
        size: backend.size(),
        read: async |offset: u64, len: usize| {
            let backend = backend.clone();
            let read = context.run(move || async move {
                let buffer = IoBuffer::zeroed(len);
                backend.read(offset, IoVec::from(buffer.clone())).await?;
                Ok(buffer.to_vec())
            });
            read.await.unwrap_or(Err(Errno::ECANCELED))
        },
    };
    let table = disk.table().await;
    daemon.graph.detach(backend).await;
    table
}

/// Makes everything that was written to the opened image durable.
///
/// # Errors
/// What the storage says.
pub async fn flush_image(daemon: &Daemon) -> Result<(), Error> {
    let backend = reader(daemon).await?;
    let flushing = backend.clone();
    let context = daemon.contexts.main();
    let flushed = context.run(move || async move { flushing.flush().await });
    let flushed = flushed.await.unwrap_or(Err(Errno::ECANCELED));
    daemon.graph.detach(backend).await;
    flushed.map_err(|errno| Error::os("cannot flush the image", errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_is_read_as_it_was_written() {
        let partition = |number| Partition {
            number,
            start: 1 << 20,
            len: u64::from(number) << 30,
            is_container: false,
        };
        for layout in [
            Layout::Whole,
            Layout::Partition(partition(5)),
            Layout::Directory(vec![partition(1), partition(2)]),
            Layout::Directory(Vec::new()),
        ] {
            let plan = Plan {
                image: "/images/a b.qcow2".into(),
                is_device: false,
                format: Format::Qcow2,
                read_only: true,
                layout,
                keep: true,
                mountpoint: "/mnt/a".into(),
                created: true,
                deaths: 2,
            };
            assert_eq!(Plan::from_json(&plan.to_json()), Some(plan));
        }
        assert_eq!(Plan::from_json(&json!({"image": "/x"})), None);
        assert_eq!(Plan::from_json(&json!([])), None);
    }
}
