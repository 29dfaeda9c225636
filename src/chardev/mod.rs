//! Character devices: named byte streams to the outside, each used by at most one monitor.
//!
//! A device yields one [`Connection`] after another. A listening socket yields one for each client,
//! the next one only when it is asked for, so clients are served one at a time and the others wait
//! in the kernel's queue. Files, standard streams, `null` and connecting sockets yield one in all.
//! Dropping a device closes it and removes the socket file it made.

mod file;
mod null;
mod resolve;
mod socket;
mod stdio;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use stord_qmp::schema::chardev::{ChardevBackendKind, ChardevOptions, ChardevStdio};
use stord_qmp::{Error, identifier};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::lifecycle::Shutdown;
use crate::report::Origin;

/// Both directions of one stream.
pub struct Connection {
    /// What the other side sends; ends when the other side is gone.
    pub reader: Box<dyn AsyncRead + Unpin>,
    /// What the other side receives.
    pub writer: Box<dyn AsyncWrite + Unpin>,
}

/// What a device is connected to. Methods take `&self`, yet only one frontend calls them.
enum Backend {
    Single(Cell<Option<Connection>>),
    Server(socket::Server),
    Client(socket::Client),
    Stdio(stdio::Stdio),
}

/// A character device.
pub struct Chardev {
    id: String,
    backend: Backend,
    in_use: Cell<bool>,
}

impl Chardev {
    /// The device's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Makes the caller the device's only user.
    ///
    /// # Errors
    /// It has one already.
    pub fn claim(&self) -> Result<(), Error> {
        if self.in_use.replace(true) {
            let id = &self.id;
            return Err(Error::generic(format!("chardev '{id}' is already in use")));
        }
        Ok(())
    }

    /// The next connection; never, if the device has had its last. Call it again only after the
    /// last connection is dropped.
    pub async fn connect(&self) -> Connection {
        let last = match &self.backend {
            Backend::Single(connection) => connection.take(),
            Backend::Stdio(stdio) => stdio.take(),
            Backend::Client(client) => client.take(),
            Backend::Server(server) => return server.accept().await,
        };
        match last {
            Some(connection) => connection,
            None => std::future::pending().await,
        }
    }
}

/// All character devices, by id.
#[derive(Default)]
pub struct Chardevs {
    by_id: BTreeMap<String, Rc<Chardev>>,
}

/// Where and when devices are made.
pub struct Setting<'a> {
    /// What asks for the device.
    pub origin: &'a Origin,
    /// Whether the daemon goes into the background.
    pub daemonize: bool,
    /// What ends the waiting for a client.
    pub shutdown: &'a Shutdown,
}

impl Chardevs {
    /// Makes a device. With `wait` this takes until the first client has come, or the
    /// daemon is to end.
    ///
    /// # Errors
    /// The id is taken or malformed, or the backend cannot be had.
    pub async fn add(
        &mut self,
        options: ChardevOptions,
        setting: Setting<'_>,
    ) -> Result<(), Error> {
        identifier::check("id", &options.id)?;
        if self.by_id.contains_key(&options.id) {
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{}' to object (type 'container')",
                options.id
            )));
        }
        let backend = match options.backend.kind {
            ChardevBackendKind::Null(_) => Backend::Single(Cell::new(Some(null::open()))),
            ChardevBackendKind::File(file) => {
                Backend::Single(Cell::new(Some(file::open(&file.data).await?)))
            }
            ChardevBackendKind::Stdio(stdio) => {
                Backend::Stdio(self.open_stdio(&stdio.data, setting.daemonize)?)
            }
            ChardevBackendKind::Socket(socket) => {
                if socket.data.server.unwrap_or(true) {
                    let server = socket::Server::listen(&socket.data).await?;
                    if socket.data.wait.unwrap_or(false) {
                        let description = server.description();
                        setting.origin.info(&format!(
                            "QEMU waiting for connection on: disconnected:{description}"
                        ));
                        tokio::select! {
                            () = server.wait_for_client() => {}
                            () = setting.shutdown.requested() => {}
                        }
                    }
                    Backend::Server(server)
                } else {
                    Backend::Client(socket::Client::connect(&socket.data).await?)
                }
            }
        };
        let device = Chardev {
            id: options.id.clone(),
            backend,
            in_use: Cell::new(false),
        };
        self.by_id.insert(options.id, Rc::new(device));
        Ok(())
    }

    /// The device of that id.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, id: &str) -> Result<Rc<Chardev>, Error> {
        self.by_id
            .get(id)
            .cloned()
            .ok_or_else(|| Error::generic(format!("chardev \"{id}\" not found")))
    }

    fn open_stdio(&self, options: &ChardevStdio, daemonize: bool) -> Result<stdio::Stdio, Error> {
        if daemonize {
            return Err(Error::generic("cannot use stdio with -daemonize"));
        }
        let taken = |device: &Rc<Chardev>| matches!(device.backend, Backend::Stdio(_));
        if self.by_id.values().any(taken) {
            return Err(Error::generic(
                "cannot use stdio by multiple character devices",
            ));
        }
        Ok(stdio::Stdio::open(options))
    }
}

#[cfg(test)]
mod tests;
