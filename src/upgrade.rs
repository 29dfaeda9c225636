//! `stord upgrade`: the stord that runs this takes mounts over from those that serve them, which may be older: their users notice
//! a pause. A daemon that cannot be replaced goes on serving.

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use clap::Args;
use stord_qmp::Error;

use crate::mount::handover::knock;
use crate::mount::mountpoint::absolute;
use crate::mount::registry::{Found, Registry};
use crate::report::{self, Origin, reason};

/// Have this stord serve mounts that another one serves.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct UpgradeArgs {
    /// The mount, by its mountpoint, its image, or the process that serves it
    #[arg(value_name = "MOUNTPOINT|IMAGE|PID")]
    target: Option<String>,
    /// All mounts of this user
    #[arg(long)]
    all: bool,
}

/// Takes the mounts over, and returns the exit status.
pub fn run(argv0: &OsStr, args: &UpgradeArgs) -> ExitCode {
    let registry = Registry::of_user();
    let mut status = ExitCode::SUCCESS;
    let mut fail = |error: &Error| {
        Origin::none().error(error);
        status = ExitCode::FAILURE;
    };
    match find(args, &registry) {
        Ok(mounts) => {
            for mount in &mounts {
                match upgrade(argv0, mount, &registry) {
                    Ok(message) => report::print(&format!("{message}\n")),
                    Err(error) => fail(&error),
                }
            }
        }
        Err(error) => fail(&error),
    }
    status
}

fn find(args: &UpgradeArgs, registry: &Registry) -> Result<Vec<Found>, Error> {
    let found = match &args.target {
        None => registry.mounts(),
        Some(target) => match target.parse::<u32>() {
            Ok(pid) => {
                let list = registry.mounts().into_iter();
                list.filter(|found| found.entry.pid == pid).collect()
            }
            Err(_) => registry.find(&absolute(Path::new(target))),
        },
    };
    let found: Vec<Found> = found.into_iter().filter(Found::is_alive).collect();
    match &args.target {
        Some(target) if found.is_empty() => Err(Error::generic(format!(
            "no stord of yours has a mount at '{target}'"
        ))
        .with_hint("Daemons started with options instead of 'stord mount' are replaced by ending and starting them.")),
        _ => Ok(found),
    }
}

fn upgrade(argv0: &OsStr, mount: &Found, registry: &Registry) -> Result<String, Error> {
    let entry = &mount.entry;
    let shown = entry.at.display();
    if entry.device.is_some() {
        return Err(Error::generic(format!(
            "'{shown}' is a device, whose daemon cannot be replaced"
        ))
        .with_hint("Detach it, and attach it again."));
    }
    let failed = |error: std::io::Error| {
        let reason = reason(&error);
        Error::generic(format!(
            "the mount at '{shown}' cannot be taken over: {reason}"
        ))
        .with_source(error)
    };
    let channel = knock(&registry.socket_of(entry.pid)).map_err(|error| {
        failed(error).with_hint(format!(
            "Its daemon (process {}) runs in the foreground or is too old: unmount it and mount it again.",
            entry.pid
        ))
    })?;
    let mut child = Command::new("/proc/self/exe")
        .arg0(argv0)
        .args(["mount", "--take-over"])
        .arg(&entry.image)
        .arg(&entry.at)
        .stdin(OwnedFd::from(channel.into_stream()))
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let pid = child.id();
    let serves = child
        .stdout
        .take()
        .is_some_and(|mut stdout| stdout.read_exact(&mut [0]).is_ok());
    if serves {
        return Ok(format!(
            "'{}' at '{shown}' is served by process {pid} now",
            entry.image.display()
        ));
    }
    // It has said why.
    let _ = child.wait();
    Err(
        Error::generic(format!("the mount at '{shown}' was not taken over"))
            .with_hint(format!("Process {} serves it still.", entry.pid)),
    )
}
