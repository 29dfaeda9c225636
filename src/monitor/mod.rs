//! Monitors: where clients speak QMP. Each sits on a character device of its own and serves one
//! client after the other; all of them act on one daemon.

pub mod commands;
pub mod events;
mod jobs;
mod session;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use stord_qmp::Error;
use stord_qmp::schema::monitor::MonitorOptions;
use tokio::task::JoinHandle;

pub use session::Service;

use crate::chardev::Chardevs;

/// How long clients have, when the daemon ends, to read what was already said to them.
const FAREWELL: Duration = Duration::from_secs(1);

/// The monitors.
#[derive(Default)]
pub struct Monitors {
    running: RefCell<Vec<Monitor>>,
    made: Cell<usize>,
}

struct Monitor {
    id: String,
    task: JoinHandle<()>,
}

impl Monitors {
    /// Starts a monitor. Needs a `LocalSet`.
    ///
    /// # Errors
    /// Its id or character device is taken, or there is no such device.
    pub fn add<S: 'static>(
        &self,
        options: MonitorOptions,
        chardevs: &Chardevs,
        service: &Rc<Service<S>>,
    ) -> Result<(), Error> {
        let chardev = chardevs.get(&options.chardev)?;
        if let Some(id) = &options.id
            && self
                .running
                .borrow()
                .iter()
                .any(|monitor| monitor.id == *id)
        {
            return Err(Error::generic(format!("Duplicate ID '{id}' for monitor")));
        }
        chardev.claim()?;
        let number = self.made.replace(self.made.get() + 1);
        let id = options
            .id
            .unwrap_or_else(|| format!("compat_monitor{number}"));
        let pretty = options.pretty.unwrap_or(false);
        tracing::debug!(id, chardev = chardev.id(), "monitor");
        let service = Rc::clone(service);
        let task = tokio::task::spawn_local(async move {
            while !service.shutdown.is_requested() {
                let connection = tokio::select! {
                    connection = chardev.connect() => connection,
                    () = service.shutdown.requested() => return,
                };
                session::serve(&service, connection, pretty).await;
            }
        });
        self.running.borrow_mut().push(Monitor { id, task });
        Ok(())
    }

    /// Ends every monitor once its client has read its replies and events, or has not in time.
    /// The shutdown must have been requested and the events been closed.
    pub async fn finish(&self) {
        let monitors = self.running.take();
        let deadline = tokio::time::Instant::now() + FAREWELL;
        for mut monitor in monitors {
            if tokio::time::timeout_at(deadline, &mut monitor.task)
                .await
                .is_err()
            {
                monitor.task.abort();
            }
        }
    }
}
