//! `stord umount`: ends a mount and returns when everything is on stable storage.
//!
//! It asks the kernel to unmount, which refuses while the file is in use; the daemon notices that
//! its file system is gone, flushes, closes and ends, and its entry in the registry goes last.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stord_bridges::mount_table::{is_dead, mount_at};
use stord_qmp::Error;

use crate::mount::mountpoint::{absolute, clean, remove_created};
use crate::mount::registry::{Found, LOOK_EVERY, MARGIN, Registry};
use crate::mount::unmount::{InUse, unmount};
use crate::report::{self, Origin, reason};

/// End a mount.
#[derive(Clone, Debug, Args)]
pub struct UmountArgs {
    /// The mountpoint or the image
    #[arg(value_name = "MOUNTPOINT|IMAGE")]
    target: PathBuf,
    /// Unmount even if it is in use: its users get errors
    #[arg(short, long)]
    force: bool,
}

/// Unmounts, and returns the exit status.
pub fn run(args: &UmountArgs) -> ExitCode {
    match end_mount(args, &Registry::of_user()) {
        Ok(message) => {
            report::print(&format!("{message}\n"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            Origin::none().error(&error);
            ExitCode::FAILURE
        }
    }
}

fn end_mount(args: &UmountArgs, registry: &Registry) -> Result<String, Error> {
    let target = absolute(&args.target);
    let shown = args.target.display();
    let (alive, dead) = find(&target, registry);
    if let Some(found) = alive.iter().chain(&dead).find(|f| f.entry.device.is_some()) {
        let device = found.entry.at.display();
        return Err(
            Error::generic(format!("'{shown}' is attached as '{device}', not mounted"))
                .with_hint(format!("Detach it with: stord detach '{device}'")),
        );
    }
    match alive.as_slice() {
        [] => {}
        [one] => return end_daemon(args, one),
        several => {
            let list = several
                .iter()
                .map(|f| format!("'{}'", f.entry.at.display()));
            let list: Vec<String> = list.collect();
            return Err(
                Error::generic(format!("'{shown}' is mounted more than once"))
                    .with_hint(format!("Name one of the mountpoints: {}", list.join(", "))),
            );
        }
    }
    let mut cleaned = false;
    for found in &dead {
        let mountpoint = &found.entry.at;
        if mount_at(mountpoint).is_some_and(|mount| mount.is_ours()) && is_dead(mountpoint) {
            clean(mountpoint, registry)?;
        }
        if found.entry.created {
            remove_created(mountpoint);
        }
        found.remove();
        cleaned = true;
    }
    if cleaned {
        return Ok(format!(
            "'{shown}' was left behind by a dead stord and is cleared"
        ));
    }
    end_unregistered(args, &target)
}

/// The entries of a mount, of daemons that live and of dead ones.
fn find(target: &Path, registry: &Registry) -> (Vec<Found>, Vec<Found>) {
    let deadline = Instant::now() + MARGIN;
    loop {
        let found = registry.find(target).into_iter();
        let (alive, dead): (Vec<_>, Vec<_>) = found.partition(Found::is_alive);
        // A mount that answers though its daemon is dead has just been taken over by another.
        let is_taken_over = |found: &Found| {
            let mountpoint = &found.entry.at;
            mount_at(mountpoint).is_some_and(|mount| mount.is_ours()) && !is_dead(mountpoint)
        };
        if !alive.is_empty() || !dead.iter().any(is_taken_over) || Instant::now() > deadline {
            return (alive, dead);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Ends a mount that a daemon of this user serves.
fn end_daemon(args: &UmountArgs, found: &Found) -> Result<String, Error> {
    let mountpoint = &found.entry.at;
    if mount_at(mountpoint).is_some_and(|mount| mount.is_ours()) {
        take_away(args, mountpoint)?;
    }
    let pid = found.entry.pid;
    if args.force {
        let process = i32::try_from(pid).map(Pid::from_raw);
        // It may have ended meanwhile, which is what is wanted.
        let _ = process.map(|process| kill(process, Signal::SIGTERM));
    }
    if !found.ends() {
        return Err(Error::generic(format!(
            "'{}' is unmounted, but its daemon (process {pid}) does not end",
            mountpoint.display()
        ))
        .with_hint("What was written may not be on disk yet. Look at its storage."));
    }
    Ok(format!(
        "'{}' is unmounted from '{}'",
        found.entry.image.display(),
        mountpoint.display()
    ))
}

/// Ends a mount that another user's or a QMP-driven daemon serves.
fn end_unregistered(args: &UmountArgs, target: &Path) -> Result<String, Error> {
    let shown = args.target.display();
    match mount_at(target) {
        Some(mount) if mount.is_ours() => {
            take_away(args, target)?;
            Ok(format!("'{shown}' is unmounted"))
        }
        Some(mount) => Err(Error::generic(format!(
            "'{shown}' was not mounted by stord, but by '{}'",
            mount.source
        ))),
        None => Err(Error::generic(format!("'{shown}' is not mounted"))),
    }
}

fn take_away(args: &UmountArgs, mountpoint: &Path) -> Result<(), Error> {
    let in_use = if args.force {
        InUse::Detach
    } else {
        InUse::Refuse
    };
    unmount(mountpoint, in_use).map_err(|error| {
        let shown = mountpoint.display();
        let is_busy = error.kind() == std::io::ErrorKind::ResourceBusy;
        let reason = reason(&error);
        let error = Error::generic(format!("cannot unmount '{shown}': {reason}"));
        if is_busy {
            error.with_hint(format!(
                "Somebody has it open: see fuser -vm '{shown}', and losetup -a for loop devices."
            ))
        } else {
            error
        }
    })
}
