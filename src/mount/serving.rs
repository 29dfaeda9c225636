//! A mount that this process serves: until it is unmounted, or told to end, or another process takes it over.

use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::rc::Rc;

use stord_qmp::Error;
use tokio::sync::mpsc::Receiver;

use super::handover::{Door, Outcome, hand_over};
use super::keeper::Keeper;
use super::mountpoint::Mountpoint;
use super::plan::Plan;
use super::registry::{Entry, Registered, Registry};
use super::unmount::{InUse, unmount};
use crate::daemon::Daemon;
use crate::daemonize::Background;
use crate::monitor::events::Dated;
use crate::notify;

/// A mount that is served and that others can find.
pub struct Mounted {
    daemon: Rc<Daemon>,
    plan: Plan,
    /// Leads to the image.
    image: OwnedFd,
    mountpoint: Mountpoint,
    registry: Registry,
    registered: Registered,
    keeper: Option<Keeper>,
}

/// Why serving ended.
enum End {
    /// Unmounted, or told to.
    Over,
    /// Another process serves it.
    Left,
    /// Nobody can.
    Lost(Error),
}

impl Mounted {
    /// Lets others know of a mount that is served already.
    ///
    /// # Errors
    /// The registry cannot be written.
    pub fn register(
        daemon: &Rc<Daemon>,
        plan: Plan,
        image: OwnedFd,
        mountpoint: Mountpoint,
        keeper: Option<Keeper>,
    ) -> Result<Self, Error> {
        let registry = Registry::of_user();
        let registered = registry.register(&Entry {
            pid: std::process::id(),
            image: plan.image.clone(),
            at: plan.mountpoint.clone(),
            created: plan.created,
            device: None,
        })?;
        Ok(Self {
            daemon: Rc::clone(daemon),
            plan,
            image,
            mountpoint,
            registry,
            registered,
            keeper,
        })
    }

    /// What is mounted.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Lets the starter go, and serves until the end. `deleted` hears of the export's end. In the foreground, the mount cannot be
    /// taken over: its daemon has somebody who waits for it.
    ///
    /// # Errors
    /// The daemon could not go into the background, or not end in an orderly way.
    pub async fn serve(
        self,
        mut deleted: Receiver<Dated>,
        background: Option<Background>,
    ) -> Result<ExitCode, Error> {
        let door = match &background {
            Some(_) => Door::open(self.registry.socket_of(std::process::id())),
            None => Err(Error::generic("in the foreground")),
        };
        let door = door
            .inspect_err(|error| tracing::debug!(%error, "the mount cannot be taken over"))
            .ok();
        self.daemon.announce();
        let ready = background.map_or(Ok(()), Background::complete);
        let mut end = End::Over;
        if ready.is_ok() {
            notify::ready();
            end = self.wait(&mut deleted, door.as_ref()).await;
            notify::stopping();
        }
        drop(door);
        let closed = self.finish(end).await;
        ready.and(closed).map(|()| ExitCode::SUCCESS)
    }

    async fn wait(&self, deleted: &mut Receiver<Dated>, door: Option<&Door>) -> End {
        let Self {
            daemon,
            plan,
            image,
            ..
        } = self;
        loop {
            let client = async {
                match door {
                    Some(door) => door.client().await,
                    None => std::future::pending().await,
                }
            };
            let channel = tokio::select! {
                () = daemon.shutdown.requested() => return End::Over,
                // The only export ends by itself when somebody unmounts it.
                _ = deleted.recv() => return End::Over,
                channel = client => channel,
            };
            match hand_over(daemon, plan, image, channel).await {
                Ok(Outcome::Stayed) => {}
                Ok(Outcome::Left) => return End::Left,
                Err(error) => return End::Lost(error),
            }
        }
    }

    async fn finish(self, end: End) -> Result<(), Error> {
        let Self {
            daemon,
            plan,
            image: _,
            mountpoint,
            registry: _,
            registered,
            keeper,
        } = self;
        // While it has the mount's descriptors, the mount's users wait instead of hearing of the end.
        drop(keeper);
        let mut result = daemon.close().await;
        match end {
            End::Over => drop(mountpoint),
            End::Left => mountpoint.leave(),
            End::Lost(error) => {
                if let Err(error) = unmount(&plan.mountpoint, InUse::Detach) {
                    tracing::warn!(%error, "cannot unmount");
                }
                drop(mountpoint);
                result = Err(error);
            }
        }
        drop(registered);
        result
    }
}
