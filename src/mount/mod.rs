//! `stord mount`: shows an image as a raw file, or its partitions as files, for people. It is the daemon's own code under
//! another command line: one image, one export, no monitor, and messages that say what to do.
//!
//! Order of start-up: look at the image, prepare the mountpoint, open, export, and only then say
//! that it is there and let the starter go. Order of the end: export, nodes, mountpoint, and last
//! the registry's entry, for whose disappearance `stord umount` waits.

pub mod guess;
pub mod mountpoint;
mod partition;
pub mod registry;
pub mod unmount;

use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use stord_aio::{Errno, IoBuffer, IoVec};
use stord_block::Permissions;
use stord_block::graph::Claim;
use stord_bridges::mount_table::{is_dead, mount_at};
use stord_bridges::{DirectoryExport, DirectoryFile};
use stord_qmp::Error;
use stord_qmp::schema::block::{
    BlockdevDiscardOptions, BlockdevDriver, BlockdevOptions, BlockdevOptionsFile,
    BlockdevOptionsQcow2, BlockdevOptionsRaw, BlockdevRef, OnOffAuto,
};
use stord_qmp::schema::export::{BlockExportKind, BlockExportOptions, BlockExportOptionsFuse};
use stord_qmp::schema::node_info::ImageInfo;

use crate::daemon::{Daemon, run_local};
use crate::daemonize::Background;
use crate::notify;
use crate::report::{self, Origin, reason};
use guess::Format;
use mountpoint::{Kind, Mountpoint};
use partition::{Disk, Partition, Table};
use registry::{Entry, Registered, Registry};

/// The node with the image's content.
const IMAGE_NODE: &str = "image";

/// The node with a partition, before its number.
const PARTITION_NODE: &str = "partition-";

/// The file with the whole disk, where a directory shows partitions.
const DISK_FILE: &str = "disk.raw";

/// The export.
const EXPORT: &str = "mount";

/// Show a disk image as a raw file.
#[derive(Clone, Debug, Args)]
pub struct MountArgs {
    /// The disk image, a file or a block device
    image: PathBuf,
    /// The file to show it as, or the directory with --partitions; created if missing [default:
    /// IMAGE.raw, or IMAGE.parts]
    mountpoint: Option<PathBuf>,
    /// Do not let anybody write
    #[arg(short, long)]
    read_only: bool,
    /// Stay in the foreground until interrupted
    #[arg(short, long)]
    pub foreground: bool,
    /// Show only this partition of the image
    #[arg(short, long, value_name = "N")]
    partition: Option<u32>,
    /// Show a directory with the whole disk (disk.raw) and each partition (p1, p2, ...)
    #[arg(short = 'P', long, conflicts_with = "partition")]
    partitions: bool,
    /// Open the image as this format instead of guessing it
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
}

/// Mounts and serves until the end, and returns the exit status.
pub fn run(args: MountArgs, background: Option<Background>) -> ExitCode {
    run_local(async move {
        let status = serve(&args, background).await;
        status.unwrap_or_else(|error| {
            Origin::none().error(&error);
            ExitCode::FAILURE
        })
    })
}

async fn serve(args: &MountArgs, background: Option<Background>) -> Result<ExitCode, Error> {
    let registry = Registry::of_user();
    let image = Image::look_at(args, &registry)?;
    let mountpoint = prepare_mountpoint(args, &image, &registry)?;
    let daemon = Daemon::start()?;
    let mut deleted = daemon.events.subscribe();
    let mounted = mount(&daemon, args, &image, &mountpoint, &registry).await;
    let registered = match mounted {
        Ok(registered) => registered,
        Err(error) => {
            daemon.close().await?;
            return Err(error);
        }
    };
    let ready = background.map_or(Ok(()), Background::complete);
    if ready.is_ok() {
        notify::ready();
        // The only export ends by itself when somebody unmounts it.
        tokio::select! {
            () = daemon.shutdown.requested() => {}
            _ = deleted.recv() => {}
        }
        notify::stopping();
    }
    let closed = daemon.close().await;
    drop(mountpoint);
    drop(registered);
    ready.and(closed).map(|()| ExitCode::SUCCESS)
}

/// Opens and exports the image, notes that, and says so.
async fn mount(
    daemon: &Daemon,
    args: &MountArgs,
    image: &Image,
    mountpoint: &Mountpoint,
    registry: &Registry,
) -> Result<Registered, Error> {
    let opened = daemon.graph.blockdev_add(image.options(args)).await;
    opened.map_err(|error| advise_on_opening(error, image, args))?;
    let path = text_of(mountpoint.path())?;
    let explain = |error: Error| error.context(format!("'{}'", args.image.display()));
    if args.partitions {
        let files = add_partitions(daemon, args).await.map_err(explain)?;
        let options = DirectoryExport {
            id: EXPORT.to_owned(),
            mountpoint: path.to_owned(),
            files,
            writable: !args.read_only,
            io_uring: OnOffAuto::Auto,
        };
        daemon.exports.add_directory(&options).await?;
    } else {
        let mut node = IMAGE_NODE.to_owned();
        if let Some(number) = args.partition {
            let partition = find_partitions(daemon).await;
            let partition = partition.and_then(|table| table.partition(number));
            let options = partition_options(partition.map_err(explain)?, args);
            node = partition_node(number);
            daemon.graph.blockdev_add(options).await?;
        }
        daemon
            .exports
            .add(export_options(&node, path, args))
            .await?;
    }
    let registered = registry.register(&Entry {
        pid: std::process::id(),
        image: image.path.clone(),
        mountpoint: mountpoint.path().to_path_buf(),
        created: mountpoint.is_created(),
    })?;
    announce(daemon, args, image, mountpoint).await?;
    Ok(registered)
}

/// An image that exists, and how it is to be opened.
struct Image {
    path: PathBuf,
    is_device: bool,
    format: Format,
}

impl Image {
    fn look_at(args: &MountArgs, registry: &Registry) -> Result<Self, Error> {
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
        Ok(Self {
            path,
            is_device: kind.is_block_device(),
            format,
        })
    }

    /// How the image is opened: a protocol node, and the format on top of it.
    fn options(&self, args: &MountArgs) -> BlockdevOptions {
        let file = BlockdevOptionsFile::new(self.path.to_string_lossy());
        let protocol = node(
            if self.is_device {
                BlockdevDriver::HostDevice(file)
            } else {
                BlockdevDriver::File(file)
            },
            args,
        );
        let child = BlockdevRef::Definition(Box::new(protocol));
        let driver = match self.format {
            Format::Raw => BlockdevDriver::Raw(BlockdevOptionsRaw::new(child)),
            Format::Qcow2 => BlockdevDriver::Qcow2(BlockdevOptionsQcow2::new(child)),
        };
        BlockdevOptions {
            node_name: Some(IMAGE_NODE.to_owned()),
            ..node(driver, args)
        }
    }
}

/// What all nodes have: discards reach the file, so that deleting files in the image frees space.
fn node(driver: BlockdevDriver, args: &MountArgs) -> BlockdevOptions {
    BlockdevOptions {
        read_only: Some(args.read_only),
        discard: Some(BlockdevDiscardOptions::Unmap),
        ..BlockdevOptions::new(driver)
    }
}

/// The node with a partition.
fn partition_node(number: u32) -> String {
    format!("{PARTITION_NODE}{number}")
}

/// Opens a node for each partition, and names the files of the directory that shows them.
async fn add_partitions(daemon: &Daemon, args: &MountArgs) -> Result<Vec<DirectoryFile>, Error> {
    let partitions = find_partitions(daemon).await?.0;
    let mut files = vec![DirectoryFile {
        name: DISK_FILE.to_owned(),
        node_name: IMAGE_NODE.to_owned(),
    }];
    for partition in partitions.into_iter().filter(|found| !found.is_container) {
        files.push(DirectoryFile {
            name: format!("p{}", partition.number),
            node_name: partition_node(partition.number),
        });
        let options = partition_options(partition, args);
        daemon.graph.blockdev_add(options).await?;
    }
    Ok(files)
}

fn partition_options(partition: Partition, args: &MountArgs) -> BlockdevOptions {
    let raw = BlockdevOptionsRaw {
        // A partition lies inside an image, whose size is a signed number.
        offset: i64::try_from(partition.start).ok(),
        size: i64::try_from(partition.len).ok(),
        ..BlockdevOptionsRaw::new(BlockdevRef::Reference(IMAGE_NODE.to_owned()))
    };
    BlockdevOptions {
        node_name: Some(partition_node(partition.number)),
        ..node(BlockdevDriver::Raw(raw), args)
    }
}

fn export_options(node: &str, mountpoint: &str, args: &MountArgs) -> BlockExportOptions {
    BlockExportOptions {
        kind: BlockExportKind::Fuse(BlockExportOptionsFuse::new(mountpoint)),
        id: EXPORT.to_owned(),
        fixed_iothread: None,
        iothread: None,
        node_name: node.to_owned(),
        writable: Some(!args.read_only),
        writethrough: None,
        allow_inactive: None,
    }
}

fn prepare_mountpoint(
    args: &MountArgs,
    image: &Image,
    registry: &Registry,
) -> Result<Mountpoint, Error> {
    text_of(&image.path)?;
    let kind = if args.partitions {
        Kind::Directory
    } else {
        Kind::File
    };
    if let Some(path) = &args.mountpoint {
        return Mountpoint::prepare(path, kind, registry);
    }
    let mut path = args.image.clone().into_os_string();
    path.push(match kind {
        Kind::File => ".raw",
        Kind::Directory => ".parts",
    });
    let path = PathBuf::from(path);
    // A path that nobody has named must not hide anything.
    if fs::metadata(&path).is_ok_and(|found| found.is_file() && found.len() > 0) {
        let shown = path.display();
        return Err(
            Error::generic(format!("'{shown}' exists already and is not empty"))
                .with_hint("Say where to mount: stord mount IMAGE MOUNTPOINT"),
        );
    }
    Mountpoint::prepare(&path, kind, registry)
}

fn text_of(path: &Path) -> Result<&str, Error> {
    path.to_str()
        .ok_or_else(|| Error::generic(format!("the path '{}' is not valid UTF-8", path.display())))
}

fn advise_on_opening(error: Error, image: &Image, args: &MountArgs) -> Error {
    let error = if error.message.contains(&*image.path.to_string_lossy()) {
        error
    } else {
        error.context(format!("cannot open '{}'", args.image.display()))
    };
    let unwritable = ["Permission denied", "Read-only file system"]
        .iter()
        .any(|reason| error.message.ends_with(reason));
    if unwritable && !args.read_only {
        let image = args.image.display();
        return error.with_hint(format!(
            "If it cannot be opened for writing, try: stord mount --read-only '{image}'"
        ));
    }
    error
}

/// The partitions that the disk's content lists.
async fn find_partitions(daemon: &Daemon) -> Result<Table, Error> {
    let claim = Claim {
        permissions: Permissions::CONSISTENT_READ,
        shared: Permissions::all(),
    };
    let backend = daemon.graph.attach(IMAGE_NODE, "mount", claim).await?;
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

/// Says what is there now and how to get rid of it.
async fn announce(
    daemon: &Daemon,
    args: &MountArgs,
    image: &Image,
    mountpoint: &Mountpoint,
) -> Result<(), Error> {
    let nodes = daemon.graph.query_named_block_nodes(false).await?;
    let info = |name: &str| {
        let node = nodes
            .iter()
            .find(|node| node.node_name.as_deref() == Some(name));
        node.map(|node| &node.image)
    };
    let shown = args.image.display();
    if args.format.is_none() && image.format == Format::Raw {
        Origin::none().info(&format!(
            "'{shown}' has no known image format and was opened as raw"
        ));
    }
    for line in info(IMAGE_NODE).into_iter().flat_map(other_files) {
        Origin::none().info(&format!("'{shown}' {line}"));
    }
    let node = args.partition.map(partition_node);
    let size = info(node.as_deref().unwrap_or(IMAGE_NODE))
        .and_then(|info| u64::try_from(info.virtual_size).ok());
    let mut details = image.format.name().to_owned();
    if let Some(number) = args.partition {
        details.push_str(&format!(", partition {number}"));
    }
    if args.partitions {
        let count = nodes.iter().filter(|node| {
            let name = node.node_name.as_deref();
            name.is_some_and(|name| name.starts_with(PARTITION_NODE))
        });
        details.push_str(&match count.count() {
            1 => ", 1 partition".to_owned(),
            count => format!(", {count} partitions"),
        });
    }
    if let Some(size) = size {
        details.push_str(&format!(", {}", size_text(size)));
    }
    details.push_str(if args.read_only { ", read-only" } else { "" });
    let at = mountpoint.path().display();
    let end = if args.foreground {
        "Press Ctrl-C to unmount it.".to_owned()
    } else {
        format!("Unmount it with: stord umount '{at}'")
    };
    report::print(&format!("'{shown}' ({details}) is at '{at}'\n{end}\n"));
    Ok(())
}

/// The other files that the image makes us open, which a guest can choose if the format was
/// guessed from what it wrote.
fn other_files(info: &ImageInfo) -> Vec<String> {
    use stord_qmp::schema::node_info::ImageInfoSpecificKind;
    let mut lines = Vec::new();
    if let Some(backing) = info
        .full_backing_filename
        .as_ref()
        .or(info.backing_filename.as_ref())
    {
        lines.push(format!("has the backing file '{backing}'"));
    }
    if let Some(specific) = &info.format_specific
        && let ImageInfoSpecificKind::Qcow2(qcow2) = &specific.format
        && let Some(data_file) = &qcow2.data.data_file
    {
        lines.push(format!("has its data in '{data_file}'"));
    }
    lines
}

/// A number of bytes as people read it.
pub fn size_text(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut unit, mut whole, mut rest) = (None, bytes, 0);
    for name in UNITS {
        if whole < 1024 {
            break;
        }
        (unit, whole, rest) = (Some(name), whole / 1024, whole % 1024);
    }
    match (unit, rest * 10 / 1024) {
        (None, _) => format!("{whole} bytes"),
        (Some(unit), 0) => format!("{whole} {unit}"),
        (Some(unit), tenth) => format!("{whole}.{tenth} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(size_text(bytes), text);
        }
    }
}
