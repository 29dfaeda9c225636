//! `stord attach`: shows an image as a block device of this machine, for people. Like `stord mount` it is the daemon's own code under
//! another command line.
//!
//! Two processes serve a device. The **daemon** opens the image and answers requests; it never touches the device, since a process that
//! waits for a device that it serves itself cannot even be killed. The **holder** sets the device up, keeps it, looks whether it is in
//! use, writes out what the kernel holds of it, and takes it away; it serves nothing. When the daemon dies, the holder clears up.
//!
//! Order of start-up: look at the image, open it, have the device made, make it known, and only then print its name and let the starter
//! go. Order of the end: the device (which refuses while it is in use), the image, and last the registry's entry, for whose
//! disappearance `stord detach` waits.

pub mod cdi;
pub mod detach;
pub mod hold;
mod holder;
mod in_use;
pub mod ls;
mod modules;
mod serial;
mod serving;
mod via;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use nix::unistd::geteuid;
use stord_qmp::Error;

use crate::daemon::{Daemon, run_local};
use crate::daemonize::Background;
use crate::mount::guess::Format;
use crate::mount::image::Image;
use crate::mount::plan::{Choice, Layout, Plan, text_of};
use crate::mount::registry::{DeviceEntry, Entry, Found, Registry};
use crate::report::{self, Origin};
use serving::Attached;
use via::{Device, Via, Wish};

/// So long the image may stay locked after the death of its daemon.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Logical block sizes that a device can have, in bytes.
const BLOCK_SIZES: [u32; 4] = [512, 1024, 2048, 4096];

/// Attach a disk image as a block device.
///
/// Prints the device's path once it can be used. The daemon that serves it stays in the background until the device is detached.
#[derive(Clone, Debug, Args)]
pub struct AttachArgs {
    /// The disk image, a file or a block device
    image: PathBuf,
    /// How the device comes about
    #[arg(long, value_name = "WAY", default_value = "vduse")]
    via: Via,
    /// Do not let anybody write
    #[arg(short, long)]
    read_only: bool,
    /// Stay in the foreground until interrupted
    #[arg(short, long)]
    pub foreground: bool,
    /// Attach only this partition of the image
    #[arg(short, long, value_name = "N")]
    partition: Option<u32>,
    /// Open the image as this format instead of guessing it
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// The serial number by which udev knows the device, of at most 20 characters [default: made
    /// from the image's path]
    #[arg(long, value_name = "TEXT", value_parser = serial::check)]
    serial: Option<String>,
    /// Queues of the device, each with a thread to serve it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: Option<u16>,
    /// The smallest request, in bytes
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = block_size)]
    logical_block_size: u32,
    /// Let containers have the device: podman run --device stord.io/disk=NAME
    #[arg(long, value_name = "NAME", value_parser = cdi::check)]
    cdi: Option<String>,
}

fn block_size(text: &str) -> Result<u32, String> {
    let size = text.parse().ok().filter(|size| BLOCK_SIZES.contains(size));
    size.ok_or_else(|| "it is 512, 1024, 2048 or 4096".to_owned())
}

/// Attaches and serves until the end, and returns the exit status.
pub fn run(args: AttachArgs, background: Option<Background>) -> ExitCode {
    run_local(async move {
        match serve(&args, background).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                Origin::none().error(&error);
                ExitCode::FAILURE
            }
        }
    })
}

async fn serve(args: &AttachArgs, background: Option<Background>) -> Result<(), Error> {
    let shown = args.image.display();
    if !geteuid().is_root() {
        return Err(
            Error::generic("only root can attach devices").with_hint(format!(
                "Any user can see the disk as a file with: stord mount '{shown}'"
            )),
        );
    }
    args.via.check(args)?;
    modules::make_ready(args.via)?;
    let registry = Registry::of_user();
    if let Some(name) = &args.cdi {
        cdi::check_free(name, &registry)?;
    }
    let image = Image::look_at(&args.image, args.read_only, args.format, &registry)?;
    text_of(&image.path)?;
    let daemon = Daemon::start()?;
    let deleted = daemon.events.subscribe();
    let started = async {
        let is_left = |found: &Found| found.entry.image == image.path && !found.is_alive();
        let is_left = registry.devices().iter().any(is_left);
        let plan = open(&daemon, args, image, is_left).await?;
        let serial = serial::of(args.serial.as_deref(), &plan.image, args.partition);
        let name = serial::of(None, &plan.image, args.partition);
        let wish = wish(args, &plan, &serial, &name);
        let device = args.via.attach(&daemon, &wish).await?;
        register(&daemon, args, &plan, serial, device, &registry)
    };
    let attached: Attached = match started.await {
        Ok(attached) => attached,
        Err(error) => {
            daemon.close().await?;
            return Err(error);
        }
    };
    report::print(&format!("{}\n", attached.path().display()));
    attached.serve(deleted, background).await
}

fn wish<'a>(args: &'a AttachArgs, plan: &Plan, serial: &'a str, name: &'a str) -> Wish<'a> {
    Wish {
        node_name: plan.layout.node(),
        read_only: args.read_only,
        queues: args.queues,
        block_size: args.logical_block_size,
        serial,
        name,
        cdi: args.cdi.as_deref(),
    }
}

/// Opens the image, or the partition of it. After a dead daemon, it may be locked until what that had begun has left the kernel.
async fn open(
    daemon: &Daemon,
    args: &AttachArgs,
    image: Image,
    is_left: bool,
) -> Result<Plan, Error> {
    let shown = args.image.display();
    let mut plan = Plan {
        image: image.path,
        is_device: image.is_device,
        format: image.format,
        read_only: args.read_only,
        layout: Layout::Whole,
        keep: false,
        mountpoint: PathBuf::new(),
        created: false,
        deaths: 0,
    };
    let choice = args.partition.map_or(Choice::Disk, Choice::Partition);
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match plan.open(daemon, &args.image, choice).await {
            Err(error)
                if is_left && error.message.contains("lock") && Instant::now() < deadline =>
            {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            opened => break opened?,
        }
    }
    if args.format.is_none() && plan.format == Format::Raw {
        Origin::none().info(&format!(
            "'{shown}' has no known image format and was opened as raw"
        ));
    }
    let nodes = daemon.graph.query_named_block_nodes(false).await?;
    let name = plan.layout.node();
    let node = nodes
        .iter()
        .find(|node| node.node_name.as_deref() == Some(name.as_str()));
    let size = node.map_or(0, |node| node.image.virtual_size);
    let block_size = args.logical_block_size;
    if size % i64::from(block_size) != 0 {
        let error = Error::generic(format!(
            "the size of '{shown}', {size} bytes, is no multiple of the logical block size, {block_size} bytes"
        ));
        return Err(if block_size == 512 {
            error.with_hint(format!(
                "A device ends with a whole block. Enlarge the image first: stord resize '{shown}' +{}",
                i64::from(block_size) - size % i64::from(block_size)
            ))
        } else {
            error
        });
    }
    Ok(plan)
}

fn register(
    daemon: &std::rc::Rc<Daemon>,
    args: &AttachArgs,
    plan: &Plan,
    serial: String,
    device: Device,
    registry: &Registry,
) -> Result<Attached, Error> {
    // What a dead daemon has left, whose device this may be now.
    for found in registry.devices() {
        if found.entry.at == device.path && !found.is_alive() {
            found.remove();
        }
    }
    let registered = registry.register(&Entry {
        pid: std::process::id(),
        image: plan.image.clone(),
        at: device.path.clone(),
        created: false,
        device: Some(DeviceEntry {
            via: args.via.name().to_owned(),
            read_only: args.read_only,
            serial: args.via.has_serial().then_some(serial),
            cdi: args.cdi.clone(),
        }),
    })?;
    Attached::new(daemon, device, registry, registered)
}
