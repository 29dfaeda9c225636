//! `stord mount`: shows an image as a raw file, or its partitions as files, for people. It is the daemon's own code under
//! another command line: one image, one export, no monitor, and messages that say what to do.
//!
//! Order of start-up: look at the image, prepare the mountpoint, open, export, and only then say
//! that it is there and let the starter go. Order of the end: export, nodes, mountpoint, and last
//! the registry's entry, for whose disappearance `stord umount` waits.
//!
//! A mount can outlive the process that serves it: `handover` is the conversation in which one process leaves it to another,
//! `takeover` the other's part, and `keeper` the process that waits for a daemon's death.

mod announce;
pub mod channel;
pub mod guess;
pub mod handover;
pub mod image;
pub mod keeper;
pub mod mountpoint;
mod partition;
pub mod plan;
pub mod registry;
mod serving;
mod store;
mod takeover;
pub mod unmount;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use stord_qmp::Error;

pub use announce::size_text;
pub use plan::{disk_options, image_options};

use crate::daemon::{Daemon, run_local};
use crate::daemonize::Background;
use crate::notify;
use crate::remote;
use crate::report::Origin;
use announce::announce;
use guess::Format;
use image::Image;
use keeper::Keeper;
use mountpoint::{Kind, Mountpoint};
use plan::{Choice, Layout, Plan, text_of};
use registry::Registry;
use serving::Mounted;

/// Show a disk image as a raw file.
#[derive(Clone, Debug, Args)]
pub struct MountArgs {
    /// The disk image, a file or a block device, or the URI of an NBD export
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
    /// Keep the mount when its daemon dies: users of the file wait until another one serves it
    #[arg(long)]
    keep: bool,
    /// Take a mount over from the process at standard input
    #[arg(long, hide = true)]
    pub take_over: bool,
    /// Open the image as this format instead of guessing it
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
}

/// Mounts and serves until the end, and returns the exit status.
pub fn run(args: MountArgs, background: Option<Background>) -> ExitCode {
    run_local(async move {
        let status = match background {
            Some(background) if args.take_over => takeover::run(background).await,
            background => serve(&args, background).await,
        };
        status.unwrap_or_else(|error| {
            Origin::none().error(&error);
            ExitCode::FAILURE
        })
    })
}

async fn serve(args: &MountArgs, background: Option<Background>) -> Result<ExitCode, Error> {
    let is_service = background.is_none() && notify::is_heard();
    if is_service && let Some(offer) = store::take() {
        return takeover::resume(offer).await;
    }
    let registry = Registry::of_user();
    let image = Image::look_at(&args.image, args.read_only, args.format, &registry)?;
    let mountpoint = prepare_mountpoint(args, &image, &registry)?;
    let daemon = Daemon::start()?;
    let deleted = daemon.events.subscribe();
    let started = async {
        let plan = mount(&daemon, args, &image, &mountpoint).await?;
        let keeper = Keeper::start_if_wanted(&daemon, &plan, &image.handle, is_service)?;
        let mounted = Mounted::register(&daemon, plan, image.handle, mountpoint, keeper)?;
        announce(&daemon, mounted.plan(), args).await?;
        Ok(mounted)
    };
    let mounted: Mounted = match started.await {
        Ok(mounted) => mounted,
        Err(error) => {
            daemon.close().await?;
            return Err(error);
        }
    };
    mounted.serve(deleted, background).await
}

/// Opens and mounts the image.
async fn mount(
    daemon: &Daemon,
    args: &MountArgs,
    image: &Image,
    mountpoint: &Mountpoint,
) -> Result<Plan, Error> {
    let mut plan = Plan {
        image: image.path.clone(),
        is_device: image.is_device,
        format: image.format,
        read_only: args.read_only,
        layout: Layout::Whole,
        keep: args.keep,
        mountpoint: mountpoint.path().to_path_buf(),
        created: mountpoint.is_created(),
        deaths: 0,
    };
    let choice = match (args.partition, args.partitions) {
        (Some(number), _) => Choice::Partition(number),
        (None, true) => Choice::Partitions,
        (None, false) => Choice::Disk,
    };
    plan.open(daemon, &args.image, choice).await?;
    plan.export(daemon, None).await?;
    Ok(plan)
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
    if remote::is_remote(&args.image) {
        return Err(Error::generic("no mountpoint is given")
            .with_hint("Say where to mount: stord mount URI MOUNTPOINT"));
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
