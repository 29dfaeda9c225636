//! Takes descriptors that whoever started the daemon left open for it, by their number.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use stord_qmp::Error;

/// A duplicate of the descriptor of that number, which stays open.
///
/// # Errors
/// The text is no number, or no descriptor has it.
pub fn duplicate(text: &str) -> Result<OwnedFd, Error> {
    let number: RawFd = text
        .parse()
        .map_err(|_| Error::generic(format!("Unable to parse FD number {text}")))?;
    get(number).map_err(|error| {
        let reason = Error::reason(&error);
        Error::generic(format!("Could not use file descriptor '{text}': {reason}"))
            .with_source(error)
    })
}

fn get(number: RawFd) -> io::Result<OwnedFd> {
    let process = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?)
}
