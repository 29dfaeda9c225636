//! A mounted file system without queues: what one process gives to another, so that it serves the same mount from then on.
//!
//! The kernel keeps the connection as long as somebody has one of its descriptors open, and its users wait meanwhile. INIT has been
//! answered and is not repeated. Requests that a dead process had fetched and not answered belong to the descriptor that they were
//! fetched from; the kernel hands them out again on request (Linux 6.9), marked as such in their id. All of them can be carried out
//! twice: their users have not been told that they are done, and the kernel lets nothing that depends on them begin before.
//!
//! With io_uring, requests do not belong to descriptors, and nothing of a dead process can be had. One that leaves passes its entries on,
//! with the requests in them (`held`).

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::unistd::write;
use serde_json::{Value, json};
use stord_qmp::Error;
use zerocopy::IntoBytes as _;

use super::abi::{NOTIFY_RESEND, OutHeader};
use super::held::HeldEntries;
use super::kernel;
use super::mount::Mount;

/// A FUSE connection that another process served, or is going to serve.
#[derive(Debug)]
pub struct Connection {
    /// One for each queue that it had.
    pub(super) devices: Vec<OwnedFd>,
    pub(super) mount: Mount,
    pub(super) allow_other: bool,
    /// Mode, owner and times, of the root and then of each file in a directory.
    pub(super) attributes: Vec<Value>,
    pub(super) transport: Transport,
}

/// How requests come.
#[derive(Debug)]
pub(super) enum Transport {
    Classic,
    /// Through io_uring. The entries follow when the process that has them has stopped.
    Ring(Option<HeldEntries>),
}

/// The members of a description with the attributes. What does not know io_uring knows only the first, and keeps off the second.
const ATTRIBUTES: &str = "attributes";
const ATTRIBUTES_OF_RING: &str = "io-uring-attributes";

impl Connection {
    /// The descriptors, which have to go to the other process together with the description.
    pub fn devices(&self) -> &[OwnedFd] {
        &self.devices
    }

    /// Whether requests come through io_uring: then [`requests`](Self::requests) are the last thing to go to the other process.
    pub fn has_ring(&self) -> bool {
        matches!(self.transport, Transport::Ring(_))
    }

    /// The requests that a process has not answered which has stopped to serve the connection, in a file. `None` where the kernel has
    /// them.
    ///
    /// # Errors
    /// There is no memory for the file.
    pub fn requests(&self) -> Result<Option<OwnedFd>, Errno> {
        match &self.transport {
            Transport::Ring(Some(entries)) => entries.write().map(Some),
            _ => Ok(None),
        }
    }

    /// Takes over [`requests`](Self::requests) of another process.
    ///
    /// # Errors
    /// They cannot be understood, or there is no place for them in memory.
    pub fn take_requests(&mut self, file: OwnedFd) -> Result<(), Error> {
        let entries = HeldEntries::read(file).ok_or_else(|| {
            Error::generic("the requests that are under way cannot be taken over")
        })?;
        self.transport = Transport::Ring(Some(entries));
        Ok(())
    }

    /// All the rest, for [`restore`](Self::restore).
    pub fn describe(&self) -> Value {
        let attributes = if self.has_ring() {
            ATTRIBUTES_OF_RING
        } else {
            ATTRIBUTES
        };
        json!({
            "path": self.mount.path().to_str(),
            "device-number": self.mount.device_number(),
            "by-helper": self.mount.is_by_helper(),
            "allow-other": self.allow_other,
            attributes: self.attributes,
        })
    }

    /// Puts a connection together from its description and its descriptors. `None` for a description that is none.
    pub fn restore(description: &Value, devices: Vec<OwnedFd>) -> Option<Self> {
        let get = |key: &str| description.get(key);
        if devices.is_empty() {
            return None;
        }
        let (attributes, transport) = match (get(ATTRIBUTES), get(ATTRIBUTES_OF_RING)) {
            (Some(attributes), _) => (attributes, Transport::Classic),
            (None, Some(attributes)) => (attributes, Transport::Ring(None)),
            (None, None) => return None,
        };
        Some(Self {
            devices,
            mount: Mount::known(
                PathBuf::from(get("path")?.as_str()?),
                get("device-number")?.as_u64()?,
                get("by-helper")?.as_bool()?,
            ),
            allow_other: get("allow-other")?.as_bool()?,
            attributes: attributes.as_array()?.clone(),
            transport,
        })
    }

    /// Has the kernel hand out again what was fetched and not answered. Gives the descriptors to serve, `wanted` of them if possible.
    pub(super) fn resend(mut devices: Vec<OwnedFd>, wanted: usize) -> Result<Vec<OwnedFd>, Errno> {
        let first = devices.first().ok_or(Errno::EBADF)?;
        let notice = OutHeader {
            len: u32::try_from(size_of::<OutHeader>()).expect("16"),
            error: NOTIFY_RESEND,
            unique: 0,
        };
        match write(first, notice.as_bytes()) {
            Ok(_) => {}
            // A kernel that cannot: closing the descriptors ends these requests with an error.
            Err(Errno::EINVAL) => {
                tracing::warn!("this kernel does not send requests again: those under way fail");
                devices = vec![kernel::clone_device(first.as_fd())?];
            }
            Err(errno) => return Err(errno),
        }
        // What was under way has left the descriptors, so that any of them may go.
        devices.truncate(wanted);
        Ok(devices)
    }
}
