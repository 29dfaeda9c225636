//! Monitors: where clients speak QMP. Each sits on a character device of its own and serves one
//! client after the other; all of them act on one daemon.

mod bitmaps;
mod chardevs;
pub mod commands;
pub mod events;
mod jobs;
pub mod nodes;
mod objects;
mod rate;
mod session;
mod snapshots;

use std::rc::Rc;
use std::time::Duration;

use stord_qmp::Error;
use stord_qmp::schema::monitor::{MonitorMode, MonitorOptions};
use tokio::task::JoinHandle;

pub use session::Service;

use crate::chardev::{Chardevs, User};

/// How long clients have, when the daemon ends, to read what was already said to them.
const FAREWELL: Duration = Duration::from_secs(1);

/// The monitors.
#[derive(Default)]
pub struct Monitors {
    list: Vec<Monitor>,
    running: Vec<JoinHandle<()>>,
}

struct Monitor {
    id: Option<String>,
    chardev: Rc<User>,
    pretty: bool,
}

impl Monitors {
    /// Adds a monitor, which serves nobody before [`Monitors::start`].
    ///
    /// # Errors
    /// Its id or character device is taken, or there is no such device.
    pub fn add(&mut self, options: MonitorOptions, chardevs: &Chardevs) -> Result<(), Error> {
        let MonitorOptions {
            id,
            mode,
            pretty,
            chardev,
        } = options;
        if mode == Some(MonitorMode::Readline) {
            return Err(Error::generic("Only QMP is supported"));
        }
        let chardev = chardevs.get(&chardev)?;
        if let Some(id) = &id
            && self.list.iter().any(|other| other.id.as_ref() == Some(id))
        {
            return Err(Error::generic(format!("Duplicate ID '{id}' for monitor")));
        }
        let chardev = Rc::new(chardev.claim()?);
        chardev.set_open(true);
        tracing::debug!(id, chardev = chardev.device().id(), "monitor");
        self.list.push(Monitor {
            id,
            chardev,
            pretty: pretty.unwrap_or(false),
        });
        Ok(())
    }

    /// Lets the monitors serve. Not before start-up is complete, so that no client finds the daemon
    /// half made. Needs a `LocalSet`.
    pub fn start<S: 'static>(&mut self, service: &Rc<Service<S>>) {
        for monitor in &self.list {
            let (chardev, pretty) = (Rc::clone(&monitor.chardev), monitor.pretty);
            let service = Rc::clone(service);
            self.running.push(tokio::task::spawn_local(async move {
                while !service.shutdown.is_requested() {
                    let connection = tokio::select! {
                        connection = chardev.connect() => connection,
                        () = service.shutdown.requested() => return,
                    };
                    session::serve(&service, connection, pretty).await;
                }
            }));
        }
    }

    /// Ends every monitor once its client has read its replies and events, or has not in time.
    /// The shutdown must have been requested and the events been closed.
    pub async fn finish(self) {
        let deadline = tokio::time::Instant::now() + FAREWELL;
        for mut task in self.running {
            let ended = tokio::time::timeout_at(deadline, &mut task).await;
            if ended.is_err() {
                task.abort();
            }
        }
    }
}

#[cfg(test)]
mod tests;
