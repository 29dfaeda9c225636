//! The ways from an image to a block device.

use std::path::PathBuf;

use clap::ValueEnum;
use stord_bridges::{MountExport, MountLayout, NbdLinkOptions};
use stord_qmp::Error;
use stord_qmp::schema::block::OnOffAuto;
use stord_qmp::schema::export::{BlockExportKind, BlockExportOptions, BlockExportOptionsVduseBlk};

use super::AttachArgs;
use super::hold::{Kernel, Task};
use super::holder::Holder;
use crate::daemon::Daemon;
use crate::mount::mountpoint::{Kind, Mountpoint};
use crate::mount::plan::text_of;
use crate::mount::registry::Registry;
use crate::mount::unmount::{InUse, unmount};
use crate::report::reason;

/// The export.
pub const EXPORT: &str = "attach";

/// Queues of a virtio disk, where there are as many processors.
const DEFAULT_QUEUES: usize = 2;

/// How a device comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Via {
    /// A virtio disk, served by this process (modules vduse and virtio_vdpa)
    Vduse,
    /// The kernel's NBD device (module nbd)
    Nbd,
    /// A loop device over a FUSE mount that nobody sees
    Loop,
}

/// What a device is to be.
pub struct Wish<'a> {
    /// The node with its content.
    pub node_name: String,
    pub read_only: bool,
    pub queues: Option<u16>,
    pub block_size: u32,
    pub serial: &'a str,
    /// A name by which a device of the same image is found again.
    pub name: &'a str,
    pub cdi: Option<&'a str>,
}

/// A device that can be used.
pub struct Device {
    pub path: PathBuf,
    pub holder: Holder,
    pub ending: Ending,
}

/// When a device has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// When the holder has let it go.
    Holder,
    /// When, after that, its last user has closed it; the export ends with it.
    Users,
    /// When, after that, its export is removed.
    Export,
}

impl Via {
    /// As `--via` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vduse => "vduse",
            Self::Nbd => "nbd",
            Self::Loop => "loop",
        }
    }

    /// Whether such devices have a name that udev can make known.
    pub fn has_serial(self) -> bool {
        self != Self::Nbd
    }

    /// Sees that nothing is asked for that this way does not have.
    ///
    /// # Errors
    /// There is something.
    pub fn check(self, args: &AttachArgs) -> Result<(), Error> {
        let without = |what: &str| {
            Err(Error::generic(format!(
                "devices that are attached with --via {} have no {what}",
                self.name()
            )))
        };
        match self {
            Self::Loop if args.queues.is_some() => without("queues"),
            Self::Nbd if args.serial.is_some() => without("serial number"),
            _ => Ok(()),
        }
    }

    /// Makes a device of a node.
    ///
    /// # Errors
    /// The kernel refuses, or none is free.
    pub async fn attach(self, daemon: &Daemon, wish: &Wish<'_>) -> Result<Device, Error> {
        match self {
            Self::Vduse => attach_vduse(daemon, wish).await,
            Self::Nbd => attach_nbd(daemon, wish).await,
            Self::Loop => attach_loop(daemon, wish).await,
        }
    }
}

/// A device of that name which a dead daemon left goes on here, its users having waited.
async fn attach_vduse(daemon: &Daemon, wish: &Wish<'_>) -> Result<Device, Error> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let queues = wish
        .queues
        .map_or(processors.min(DEFAULT_QUEUES), usize::from);
    let disk = BlockExportOptionsVduseBlk {
        num_queues: u16::try_from(queues).ok(),
        logical_block_size: Some(wish.block_size.into()),
        serial: Some(wish.serial.to_owned()),
        attach: Some(true),
        ..BlockExportOptionsVduseBlk::new(wish.name)
    };
    let kind = BlockExportKind::VduseBlk(disk);
    let options = BlockExportOptions {
        writable: Some(!wish.read_only),
        ..BlockExportOptions::new(kind, EXPORT, wish.node_name.clone())
    };
    daemon.exports.add(options).await?;
    let made = daemon.exports.query().into_iter();
    let device = made
        .filter(|export| export.id == EXPORT)
        .find_map(|export| export.device);
    let device = device.ok_or_else(|| {
        Error::generic("the kernel has the device, but makes no disk of it")
            .with_hint("See what it says: dmesg | tail")
    })?;
    let kernel = Kernel::Vduse {
        device: device.into(),
    };
    let (holder, path) = Holder::start(task(wish, kernel), Vec::new()).await?;
    Ok(Device {
        path,
        holder,
        ending: Ending::Export,
    })
}

async fn attach_nbd(daemon: &Daemon, wish: &Wish<'_>) -> Result<Device, Error> {
    let options = NbdLinkOptions {
        id: EXPORT.to_owned(),
        node_name: wish.node_name.clone(),
        writable: !wish.read_only,
        connections: wish.queues,
    };
    let link = daemon.exports.link_nbd(&options).await?;
    let kernel = Kernel::Nbd {
        size: link.size,
        block_size: wish.block_size,
        flags: link.flags,
    };
    let (holder, path) = Holder::start(task(wish, kernel), link.sockets).await?;
    Ok(Device {
        path,
        holder,
        ending: Ending::Holder,
    })
}

/// The file system is taken from its path as soon as the loop device has the file: nobody else comes to it, nothing is left of it when
/// this process dies, and it ends, with the export, when the loop device lets the file go.
async fn attach_loop(daemon: &Daemon, wish: &Wish<'_>) -> Result<Device, Error> {
    let registry = Registry::of_user();
    let directory = registry.directory().map_err(|error| {
        let reason = reason(&error);
        Error::generic(format!("cannot mount the disk for a loop device: {reason}"))
            .with_source(error)
    })?;
    let path = directory.join(format!("{}.disk", std::process::id()));
    let mountpoint = Mountpoint::prepare(&path, Kind::File, &registry)?;
    let options = MountExport {
        id: EXPORT.to_owned(),
        mountpoint: text_of(mountpoint.path())?.to_owned(),
        layout: MountLayout::File {
            node_name: wish.node_name.clone(),
        },
        writable: !wish.read_only,
        io_uring: OnOffAuto::Auto,
        outlives: false,
    };
    daemon.exports.mount(&options, None).await?;
    let kernel = Kernel::Loop {
        file: mountpoint.path().to_path_buf(),
        read_only: wish.read_only,
        block_size: wish.block_size,
        name: wish.serial.to_owned(),
    };
    let held = Holder::start(task(wish, kernel), Vec::new()).await;
    let taken_away = tokio::task::spawn_blocking(move || {
        let unmounted = unmount(mountpoint.path(), InUse::Detach);
        drop(mountpoint);
        unmounted
    });
    let taken_away = taken_away.await.unwrap_or(Ok(()));
    let (holder, path) = held?;
    taken_away.map_err(|error| Error::os("cannot hide the mount of a loop device", error))?;
    Ok(Device {
        path,
        holder,
        ending: Ending::Users,
    })
}

fn task(wish: &Wish<'_>, kernel: Kernel) -> Task {
    Task {
        kernel,
        cdi: wish.cdi.map(str::to_owned),
        daemon: std::process::id(),
    }
}
