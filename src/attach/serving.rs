//! A device that this process serves: until it is detached, or goes by itself. A wish to end (SIGTERM and the like) waits until nobody
//! uses the device.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use serde_json::json;
use stord_qmp::Error;
use stord_qmp::schema::export::{BlockExportDeleted, BlockExportRemoveMode};
use stord_qmp::visitor::EventData;
use tokio::sync::mpsc::Receiver;

use super::detach::{DETACH, FORCE};
use super::holder::Holder;
use super::via::{Device, EXPORT, Ending};
use crate::daemon::Daemon;
use crate::daemonize::Background;
use crate::monitor::events::Dated;
use crate::mount::channel::Channel;
use crate::mount::handover::Door;
use crate::mount::registry::{Registered, Registry};
use crate::notify;
use crate::report::Origin;

/// Who knocks says at once what he wants.
const PATIENCE: Duration = Duration::from_secs(5);
/// What can be written out before users are cut off has so long to get there.
const FORCE_PATIENCE: Duration = Duration::from_secs(20);
/// With the wish to end, time between two looks whether the device is still in use.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// A device that is served and that others can find.
pub struct Attached {
    daemon: Rc<Daemon>,
    path: PathBuf,
    holder: Holder,
    ending: Ending,
    door: Door,
    registered: Registered,
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Serving,
    /// Somebody wants the end, when nobody uses the device any more.
    Ending,
    /// It goes with its last user.
    Lingering,
    /// Nothing is left to be served.
    Over,
}

impl Attached {
    /// A device that is made and registered.
    ///
    /// # Errors
    /// Others cannot ask for its end.
    pub fn new(
        daemon: &Rc<Daemon>,
        device: Device,
        registry: &Registry,
        registered: Registered,
    ) -> Result<Self, Error> {
        let Device {
            path,
            holder,
            ending,
        } = device;
        daemon.attached.borrow_mut().replace(path.clone());
        Ok(Self {
            daemon: Rc::clone(daemon),
            path,
            holder,
            ending,
            door: Door::open(registry.socket_of(std::process::id()))?,
            registered,
        })
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the starter go, and serves until the end. `deleted` hears of the export's end.
    ///
    /// # Errors
    /// The daemon could not go into the background, or not end in an orderly way.
    pub async fn serve(
        mut self,
        mut deleted: Receiver<Dated>,
        background: Option<Background>,
    ) -> Result<(), Error> {
        self.daemon.announce();
        let is_foreground = background.is_none();
        let ready = background.map_or(Ok(()), Background::complete);
        if ready.is_ok() {
            notify::ready();
        } else {
            self.daemon.shutdown.request();
        }
        self.wait(&mut deleted, is_foreground).await;
        notify::stopping();
        let Self {
            daemon,
            holder,
            door,
            registered,
            ..
        } = self;
        drop(door);
        let closed = daemon.close().await;
        drop(holder);
        drop(registered);
        ready.and(closed)
    }

    async fn wait(&mut self, deleted: &mut Receiver<Dated>, is_foreground: bool) {
        let daemon = Rc::clone(&self.daemon);
        let mut state = State::Serving;
        let mut is_held = true;
        let mut told = false;
        while state != State::Over {
            let look_again = async {
                if told {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            };
            let channel = tokio::select! {
                // The only export ends by itself when the device is gone.
                () = deletion(deleted) => return,
                () = self.holder.gone(), if is_held => {
                    is_held = false;
                    match self.ending {
                        Ending::Holder => return,
                        Ending::Users => state = State::Lingering,
                        // It is there all the same.
                        Ending::Export => {}
                    }
                    continue;
                }
                () = daemon.shutdown.requested(), if state == State::Serving => {
                    state = State::Ending;
                    continue;
                }
                () = look_again, if state == State::Ending => {
                    match self.release(false).await {
                        Ok(next) => state = next,
                        Err(error) if !told => {
                            told = true;
                            tracing::warn!(%error, "waiting until the device is not in use");
                            if is_foreground {
                                let message = format!("{}; waiting for the end of that", error.message);
                                Origin::none().warning(&message, None);
                            }
                        }
                        Err(_) => {}
                    }
                    continue;
                }
                channel = self.door.client() => channel,
            };
            if let Some(next) = self.answer(channel).await {
                state = next;
            }
        }
    }

    /// Does what somebody at the door wants.
    async fn answer(&mut self, channel: Channel) -> Option<State> {
        let heard = tokio::task::spawn_blocking(move || {
            let mut channel = channel;
            channel.set_patience(Some(PATIENCE))?;
            let (line, _) = channel.receive()?;
            Ok::<_, std::io::Error>((channel, line))
        });
        let (channel, line) = heard.await.ok()?.ok()?;
        let force = match line.as_str() {
            DETACH => false,
            FORCE => true,
            _ => return None,
        };
        let released = if force {
            let limited = tokio::time::timeout(FORCE_PATIENCE, self.release(true));
            limited.await.unwrap_or(Ok(State::Over))
        } else {
            self.release(false).await
        };
        let (next, answer) = match released {
            Ok(next) => (Some(next), json!({"detached": true})),
            // Its users have been warned.
            Err(_) if force => (Some(State::Over), json!({"detached": true})),
            Err(error) => (None, json!({"refusal": error.message, "hint": error.hint})),
        };
        let sent = tokio::task::spawn_blocking(move || channel.send(&answer.to_string(), &[]));
        // Who does not hear it sees the daemon end.
        let _ = sent.await;
        next
    }

    /// Has the holder take the device away.
    async fn release(&mut self, force: bool) -> Result<State, Error> {
        self.holder.release(force).await?;
        match self.ending {
            Ending::Users if !force => return Ok(State::Lingering),
            Ending::Users | Ending::Holder => {}
            Ending::Export => {
                let mode = if force {
                    BlockExportRemoveMode::Hard
                } else {
                    BlockExportRemoveMode::Safe
                };
                self.daemon.exports.del(EXPORT, mode).await?;
            }
        }
        Ok(State::Over)
    }
}

/// Waits for the end of an export, of which there is one. Can be given up and tried again.
async fn deletion(events: &mut Receiver<Dated>) {
    while let Some(event) = events.recv().await {
        if event.0.name == BlockExportDeleted::NAME {
            return;
        }
    }
}
