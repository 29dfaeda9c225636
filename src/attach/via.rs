//! The ways from an image to a block device.

use std::path::PathBuf;

use clap::ValueEnum;
use stord_bridges::{MountExport, MountLayout, NbdLinkOptions};
use stord_qmp::Error;
use stord_qmp::schema::block::OnOffAuto;

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
const EXPORT: &str = "attach";

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
    pub cdi: Option<&'a str>,
}

/// A device that can be used.
pub struct Device {
    pub path: PathBuf,
    pub holder: Holder,
    /// When the holder lets it go, it stays until its last user has closed it, and the export with it.
    pub lingers: bool,
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
            Self::Vduse => Err(Error::generic("stord does not have 'vduse-blk' yet")),
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
            Self::Vduse => Err(Error::generic("stord does not have 'vduse-blk' yet")),
            Self::Nbd => attach_nbd(daemon, wish).await,
            Self::Loop => attach_loop(daemon, wish).await,
        }
    }
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
        lingers: false,
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
        lingers: true,
    })
}

fn task(wish: &Wish<'_>, kernel: Kernel) -> Task {
    Task {
        kernel,
        cdi: wish.cdi.map(str::to_owned),
        daemon: std::process::id(),
    }
}
