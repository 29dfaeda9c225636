//! `stord detach`: ends a device and returns when everything is on stable storage. The device's daemon does it, and refuses while the
//! device is in use.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;
use stord_qmp::Error;

use super::{cdi, in_use};
use crate::mount::handover::knock;
use crate::mount::mountpoint::absolute;
use crate::mount::registry::{Found, Registry};
use crate::report::{self, Origin, reason};

/// Take the device away unless it is in use.
pub const DETACH: &str = "detach";
/// Take the device away.
pub const FORCE: &str = "detach-force";

/// Detach a device.
#[derive(Clone, Debug, Args)]
pub struct DetachArgs {
    /// The device or the image
    #[arg(value_name = "DEVICE|IMAGE")]
    target: PathBuf,
    /// Detach it even if it is in use: its users get errors
    #[arg(short, long)]
    force: bool,
}

/// Detaches, and returns the exit status.
pub fn run(args: &DetachArgs) -> ExitCode {
    match detach(args, &Registry::of_user()) {
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

fn detach(args: &DetachArgs, registry: &Registry) -> Result<String, Error> {
    let shown = args.target.display();
    let found = registry.find(&absolute(&args.target));
    if let Some(mount) = found.iter().find(|found| found.entry.device.is_none()) {
        let at = mount.entry.at.display();
        return Err(
            Error::generic(format!("'{shown}' is mounted, not attached"))
                .with_hint(format!("Unmount it with: stord umount '{at}'")),
        );
    }
    let (alive, dead): (Vec<_>, Vec<_>) = found.into_iter().partition(Found::is_alive);
    match alive.as_slice() {
        [] => {}
        [one] => return end_daemon(args, one, registry),
        several => {
            let list = several
                .iter()
                .map(|f| format!("'{}'", f.entry.at.display()));
            let list: Vec<String> = list.collect();
            return Err(
                Error::generic(format!("'{shown}' is attached more than once"))
                    .with_hint(format!("Name one of the devices: {}", list.join(", "))),
            );
        }
    }
    for found in &dead {
        if in_use::is_served_by_vduse(&found.entry.at) {
            let (device, pid) = (found.entry.at.display(), found.entry.pid);
            let image = found.entry.image.display();
            return Err(Error::generic(format!(
                "'{device}' cannot be detached: its daemon (process {pid}) is dead, and its users wait"
            ))
            .with_hint(format!("Attach it again as it was, which goes on with the device, and detach it then: stord attach '{image}'")));
        }
        forget(found);
    }
    if dead.is_empty() {
        return Err(Error::generic(format!("'{shown}' is not attached"))
            .with_hint("See what is with: stord ls"));
    }
    Ok(format!(
        "'{shown}' was left behind by a dead stord and is cleared"
    ))
}

/// Removes what is left of a device whose daemon and holder are dead. The kernel's part has gone with them.
pub fn forget(found: &Found) {
    let device = found.entry.device.as_ref();
    if let Some(name) = device.and_then(|device| device.cdi.as_deref()) {
        cdi::remove(name);
    }
    found.remove();
}

/// Has the daemon of a device end it.
fn end_daemon(args: &DetachArgs, found: &Found, registry: &Registry) -> Result<String, Error> {
    let (device, pid) = (&found.entry.at, found.entry.pid);
    ask(device, pid, args.force, registry)?;
    if !found.ends() {
        return Err(Error::generic(format!(
            "'{}' is detached, but its daemon (process {pid}) does not end",
            device.display()
        ))
        .with_hint("Somebody may have it open still, or its storage does not respond. What was written may not be on disk yet."));
    }
    Ok(format!(
        "'{}' is detached from '{}'",
        found.entry.image.display(),
        device.display()
    ))
}

fn ask(device: &Path, pid: u32, force: bool, registry: &Registry) -> Result<(), Error> {
    let talked = knock(&registry.socket_of(pid)).and_then(|mut channel| {
        channel.send(if force { FORCE } else { DETACH }, &[])?;
        Ok(channel.receive()?.0)
    });
    let answer = talked.map_err(|error| {
        let reason = reason(&error);
        Error::generic(format!(
            "cannot detach '{}': its daemon (process {pid}) does not answer: {reason}",
            device.display()
        ))
        .with_source(error)
    })?;
    let value: Value = serde_json::from_str(&answer).unwrap_or_default();
    match value.get("refusal").and_then(Value::as_str) {
        None => Ok(()),
        Some(refusal) => {
            let error = Error::generic(refusal);
            Err(match value.get("hint").and_then(Value::as_str) {
                Some(hint) => error.with_hint(hint),
                None => error,
            })
        }
    }
}
