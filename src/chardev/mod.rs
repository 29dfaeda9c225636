//! Character devices: named byte streams to the outside, each with at most one user, unless it is a
//! multiplexer.
//!
//! A device yields one [`Connection`] after another to its user. A listening socket yields one for
//! each client, the next one only when it is asked for, so clients are served one at a time and the
//! others wait in the kernel's queue. Files, standard streams and `null` yield one in all.
//! Dropping a device closes it and removes the socket file it made.

mod backend;
mod device;
mod file;
mod hub;
mod log;
mod mux;
mod null;
mod parallel;
mod pipe;
mod pty;
pub mod ringbuf;
mod serial;
mod socket;
mod stdio;
mod udp;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use stord_credentials::Credentials;
use stord_qmp::Error;
use stord_qmp::schema::chardev::{
    ChardevBackendInfo, ChardevBackendKind, ChardevCommon, ChardevInfo, ChardevOptions,
    ChardevReturn,
};
use tokio::io::{AsyncRead, AsyncWrite};

pub use backend::{Backend, CLASSES, class_of};
pub use device::{Chardev, User};

use crate::lifecycle::Shutdown;
use crate::report::Origin;
use log::Log;

/// Both directions of one stream.
pub struct Connection {
    /// What the other side sends; ends when the other side is gone.
    pub reader: Box<dyn AsyncRead + Unpin>,
    /// What the other side receives.
    pub writer: Box<dyn AsyncWrite + Unpin>,
}

/// All character devices, by id.
#[derive(Default)]
pub struct Chardevs {
    by_id: RefCell<BTreeMap<String, Rc<Chardev>>>,
}

/// Where and when devices are made.
pub struct Setting<'a> {
    /// What asks for the device.
    pub origin: &'a Origin,
    /// Whether the daemon goes into the background.
    pub daemonize: bool,
    /// Whether the device may be a descriptor that whoever started the daemon left open.
    pub takes_descriptors: bool,
    /// What ends the waiting for a client.
    pub shutdown: &'a Shutdown,
    /// Where TLS credentials and rules are found.
    pub credentials: &'a Arc<Credentials>,
}

impl Chardevs {
    /// Makes a device, and returns what its maker must be told. With `wait` this takes until the
    /// first client has come, or the daemon is to end. Needs a `LocalSet`.
    ///
    /// # Errors
    /// The id is taken, or the backend cannot be had.
    pub async fn add(
        &self,
        options: ChardevOptions,
        setting: Setting<'_>,
    ) -> Result<ChardevReturn, Error> {
        let ChardevOptions { id, backend } = options;
        self.check_free(&id)?;
        let log = Log::open(common(&backend.kind)).await?;
        let backend = self.open(&id, backend.kind, &setting).await?;
        // Another device of that id may have been made meanwhile.
        self.check_free(&id)?;
        let pty = backend.pty();
        let device = Rc::new(Chardev::new(id.clone(), backend, log));
        self.by_id.borrow_mut().insert(id, device);
        Ok(ChardevReturn { pty })
    }

    /// Removes a device and makes another one in its place. If that fails the id is free.
    ///
    /// # Errors
    /// The new one cannot be made.
    pub async fn change(
        &self,
        options: ChardevOptions,
        setting: Setting<'_>,
    ) -> Result<ChardevReturn, Error> {
        self.by_id.borrow_mut().remove(&options.id);
        self.add(options, setting).await
    }

    /// Refuses to change a device that cannot be changed.
    ///
    /// # Errors
    /// There is no such device, or it has a user.
    pub fn check_change(&self, id: &str) -> Result<(), Error> {
        let device = self.find(id);
        let device =
            device.ok_or_else(|| Error::generic(format!("Chardev '{id}' does not exist")))?;
        if device.is_shared() {
            return Err(Error::generic(
                "For mux or hub device hotswap is not supported yet",
            ));
        }
        if device.has_users() {
            return Err(Error::generic(
                "Chardev user does not support chardev hotswap",
            ));
        }
        Ok(())
    }

    /// Removes a device.
    ///
    /// # Errors
    /// There is no such device, or it has a user.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        let device = self.find(id).ok_or_else(|| not_found(id))?;
        if device.has_users() {
            return Err(Error::generic(format!("Chardev '{id}' is busy")));
        }
        self.by_id.borrow_mut().remove(id);
        Ok(())
    }

    /// Removes every device.
    pub fn clear(&self) {
        // Those that others use go last.
        let devices = std::mem::take(&mut *self.by_id.borrow_mut());
        drop(devices);
    }

    /// Sends a break, if the device can.
    ///
    /// # Errors
    /// There is no such device.
    pub fn send_break(&self, id: &str) -> Result<(), Error> {
        let device = self.find(id).ok_or_else(|| not_found(id))?;
        device.backend().send_break();
        Ok(())
    }

    /// Every device as clients see it.
    pub fn query(&self) -> Vec<ChardevInfo> {
        let info = |device: Rc<Chardev>| ChardevInfo {
            label: device.id().to_owned(),
            filename: device.backend().filename(),
            frontend_open: device.is_open(),
        };
        self.all().into_iter().map(info).collect()
    }

    /// The device of that id.
    pub fn find(&self, id: &str) -> Option<Rc<Chardev>> {
        self.by_id.borrow().get(id).cloned()
    }

    /// The device of that id, for a monitor.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, id: &str) -> Result<Rc<Chardev>, Error> {
        self.find(id)
            .ok_or_else(|| Error::generic(format!("chardev \"{id}\" not found")))
    }

    /// Every device, by id.
    pub fn all(&self) -> Vec<Rc<Chardev>> {
        self.by_id.borrow().values().cloned().collect()
    }

    fn check_free(&self, id: &str) -> Result<(), Error> {
        // Devices have a property of that name beside them in the tree of objects.
        if id == "type" || self.by_id.borrow().contains_key(id) {
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        Ok(())
    }

    async fn open(
        &self,
        id: &str,
        kind: ChardevBackendKind,
        setting: &Setting<'_>,
    ) -> Result<Box<dyn Backend>, Error> {
        Ok(match kind {
            ChardevBackendKind::File(file) => Box::new(file::File::open(&file.data).await?),
            ChardevBackendKind::Hub(hub) => Box::new(hub::Hub::open(&hub.data, id, self)?),
            ChardevBackendKind::Memory(ring) => {
                Box::new(ringbuf::Ringbuf::open(&ring.data, "memory")?)
            }
            ChardevBackendKind::Mux(mux) => {
                Box::new(mux::Mux::open(&mux.data, self, setting.shutdown)?)
            }
            ChardevBackendKind::Null(_) => Box::new(null::Null::default()),
            ChardevBackendKind::Parallel(port) => {
                Box::new(parallel::Parallel::open(&port.data.device)?)
            }
            ChardevBackendKind::Pipe(pipe) => Box::new(pipe::Pipe::open(&pipe.data.device)?),
            ChardevBackendKind::Pty(pty) => Box::new(pty::Pty::open(&pty.data)?),
            ChardevBackendKind::Ringbuf(ring) => {
                Box::new(ringbuf::Ringbuf::open(&ring.data, "ringbuf")?)
            }
            ChardevBackendKind::Serial(port) => Box::new(serial::Serial::open(&port.data.device)?),
            ChardevBackendKind::Socket(socket) => socket::open(socket.data, id, setting).await?,
            ChardevBackendKind::Stdio(stdio) => {
                let is_stdio = |device: Rc<Chardev>| device.class().name == "chardev-stdio";
                if setting.daemonize {
                    return Err(Error::generic("cannot use stdio with -daemonize"));
                }
                if self.all().into_iter().any(is_stdio) {
                    return Err(Error::generic(
                        "cannot use stdio by multiple character devices",
                    ));
                }
                Box::new(stdio::Stdio::open(&stdio.data))
            }
            ChardevBackendKind::Udp(udp) => Box::new(udp::Udp::open(&udp.data).await?),
        })
    }
}

/// The kinds of backends as clients see them.
pub fn backends() -> Vec<ChardevBackendInfo> {
    let info = |name: &&str| ChardevBackendInfo {
        name: (*name).to_owned(),
    };
    stord_qmp::chardev_opts::BACKENDS.iter().map(info).collect()
}

fn not_found(id: &str) -> Error {
    Error::generic(format!("Chardev '{id}' not found"))
}

/// The options that every kind has.
fn common(kind: &ChardevBackendKind) -> &ChardevCommon {
    match kind {
        ChardevBackendKind::File(file) => &file.data.common,
        ChardevBackendKind::Hub(hub) => &hub.data.common,
        ChardevBackendKind::Memory(ring) | ChardevBackendKind::Ringbuf(ring) => &ring.data.common,
        ChardevBackendKind::Mux(mux) => &mux.data.common,
        ChardevBackendKind::Null(common) => &common.data,
        ChardevBackendKind::Parallel(port)
        | ChardevBackendKind::Pipe(port)
        | ChardevBackendKind::Serial(port) => &port.data.common,
        ChardevBackendKind::Pty(pty) => &pty.data.common,
        ChardevBackendKind::Socket(socket) => &socket.data.common,
        ChardevBackendKind::Stdio(stdio) => &stdio.data.common,
        ChardevBackendKind::Udp(udp) => &udp.data.common,
    }
}
