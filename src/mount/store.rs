//! The service manager's store of descriptors: for a mount that runs as a service, it does what a keeper does for others. When the
//! daemon dies, the manager starts it again and gives it back what it had put there (`FileDescriptorStoreMax=` in the unit, and
//! `Restart=on-failure`; sd_pid_notify_with_fds(3), sd_listen_fds(3)).
//!
//! Three names: the plan and the connection as text in a file in memory, the image, and the connection's descriptors by number.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};
use stord_bridges::Connection;

use super::channel::MAX_DESCRIPTORS;
use super::handover::Offer;
use super::plan::Plan;
use crate::notify;

const STATE: &str = "stord-state";
const IMAGE: &str = "stord-image";
const DEVICE: &str = "stord-device-";
/// Descriptors that a manager hands over begin with this number.
const FIRST: usize = 3;

/// What is in the store; removed from it with this value.
#[derive(Debug)]
pub struct Stored {
    devices: usize,
}

impl Drop for Stored {
    fn drop(&mut self) {
        forget(self.devices);
    }
}

/// Puts a mount into the store.
///
/// # Errors
/// The manager does not take it.
pub fn put(plan: &Plan, connection: &Connection, image: &OwnedFd) -> io::Result<Stored> {
    let stored = Stored {
        devices: connection.devices().len(),
    };
    // What was there is of an earlier daemon.
    forget(stored.devices);
    let mut state = File::from(memfd_create(c"stord", MFdFlags::MFD_CLOEXEC)?);
    state.write_all(Offer::text(plan, connection).as_bytes())?;
    notify::keep(STATE, state.as_fd())?;
    notify::keep(IMAGE, image.as_fd())?;
    for (number, device) in connection.devices().iter().enumerate() {
        notify::keep(&format!("{DEVICE}{number}"), device.as_fd())?;
    }
    Ok(stored)
}

fn forget(devices: usize) {
    for number in 0..devices {
        notify::forget(&format!("{DEVICE}{number}"));
    }
    notify::forget(IMAGE);
    notify::forget(STATE);
}

/// What a daemon that died has left in the store. `None` if there is nothing, or not all of it.
pub fn take() -> Option<Offer> {
    let variable = |name| std::env::var(name).ok();
    if variable("LISTEN_PID")? != std::process::id().to_string() {
        return None;
    }
    let names = variable("LISTEN_FDNAMES")?;
    let names: Vec<&str> = names.split(':').collect();
    let find = |name: &str| {
        let index = names.iter().position(|known| *known == name)?;
        let found = stord_sockets::duplicate_all(&(FIRST + index).to_string());
        found.ok()?.pop()
    };
    let mut state = File::from(find(STATE)?);
    let mut text = String::new();
    state.rewind().ok()?;
    state.read_to_string(&mut text).ok()?;
    let mut descriptors = vec![find(IMAGE)?];
    let devices = (0..MAX_DESCRIPTORS).map_while(|number| find(&format!("{DEVICE}{number}")));
    descriptors.extend(devices);
    Offer::read(&text, descriptors).ok()
}
