//! How a process leaves its mount to another: it offers all that the other needs, and when the other is ready, stops serving,
//! writes everything out and lets go of the image; then the other opens it and goes on. The users of the mount wait meanwhile. Until
//! the other has said that it serves, this process takes the mount back should the other fail.
//!
//! ```text
//!   leaves                          takes
//!   offer: plan, descriptors   ──►
//!                              ◄──  release     (it could start)
//!   stops, flushes, closes
//!   released, requests         ──►   (requests: where they come through io_uring)
//!                                   opens, serves
//!                              ◄──  end
//!   ends without unmounting
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::geteuid;
use serde_json::{Value, json};
use stord_block::drivers::protocol::file::supplied::supply;
use stord_bridges::Connection;
use stord_qmp::Error;
use tokio::net::UnixListener;

use super::channel::Channel;
use super::plan::{EXPORT, Plan, flush_image};
use crate::daemon::Daemon;
use crate::report::reason;

/// The other is ready to open the image.
pub const RELEASE: &str = "release";
/// The image is free.
pub const RELEASED: &str = "released";
/// The other serves the mount.
pub const END: &str = "end";

/// The longest wait for the next line of the other.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where other processes of this user ask for something: for the mount, or that a device be detached.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    /// Opens it at a path in a directory of this user's.
    ///
    /// # Errors
    /// There can be no socket.
    pub fn open(path: PathBuf) -> Result<Self, Error> {
        // What a process of the same number left behind.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(|error| {
            let reason = reason(&error);
            Error::generic(format!("cannot listen at '{}': {reason}", path.display()))
                .with_source(error)
        })?;
        Ok(Self { listener, path })
    }

    /// Waits for somebody who may ask.
    pub async fn client(&self) -> Channel {
        loop {
            match self.accept().await {
                Ok(Some(channel)) => return channel,
                Ok(None) => tracing::warn!("another user knocked"),
                Err(error) => {
                    tracing::warn!(%error, "a request at the door failed");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<Option<Channel>> {
        let (stream, _) = self.listener.accept().await?;
        if stream.peer_cred()?.uid() != geteuid().as_raw() {
            return Ok(None);
        }
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(Some(Channel::new(stream)))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What is offered to the other process.
#[derive(Debug)]
pub struct Offer {
    /// What is mounted and how.
    pub plan: Plan,
    /// The mount.
    pub connection: Connection,
    /// Leads to the image.
    pub image: OwnedFd,
}

impl Offer {
    /// The text of an offer, which goes with the image's descriptor and then those of the connection.
    pub fn text(plan: &Plan, connection: &Connection) -> String {
        json!({"plan": plan.to_json(), "connection": connection.describe()}).to_string()
    }

    /// Puts an offer together.
    ///
    /// # Errors
    /// It is a refusal, or cannot be understood.
    pub fn read(text: &str, mut descriptors: Vec<OwnedFd>) -> Result<Self, Error> {
        let strange = || Error::generic("the other stord's offer cannot be understood");
        let value: Value = serde_json::from_str(text).map_err(|_| strange())?;
        if let Some(refusal) = value.get("refusal").and_then(Value::as_str) {
            let error = Error::generic(refusal);
            return Err(match value.get("hint").and_then(Value::as_str) {
                Some(hint) => error.with_hint(hint),
                None => error,
            });
        }
        if descriptors.is_empty() {
            return Err(strange());
        }
        let image = descriptors.remove(0);
        let plan = value.get("plan").and_then(Plan::from_json);
        let connection = value
            .get("connection")
            .and_then(|description| Connection::restore(description, descriptors));
        match (plan, connection) {
            (Some(plan), Some(connection)) => Ok(Self {
                plan,
                connection,
                image,
            }),
            _ => Err(strange()),
        }
    }
}

/// Sends an offer.
///
/// # Errors
/// The other end is gone.
pub fn send_offer(
    channel: &Channel,
    text: &str,
    image: &OwnedFd,
    devices: &[OwnedFd],
) -> io::Result<()> {
    let mut descriptors = vec![image.as_fd()];
    descriptors.extend(devices.iter().map(AsFd::as_fd));
    channel.send(text, &descriptors)
}

/// How a conversation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The other serves the mount.
    Left,
    /// This process serves it still, or again.
    Stayed,
}

/// Leaves the mount to the process at the other end, if it can take it.
///
/// # Errors
/// The other could not, and this process cannot serve the mount again either.
pub async fn hand_over(
    daemon: &Daemon,
    plan: &Plan,
    image: &OwnedFd,
    channel: Channel,
) -> Result<Outcome, Error> {
    let mut channel = Talk(Some(channel));
    tokio::select! {
        offered = offer(daemon, plan, image, &mut channel) => {
            if let Err(error) = offered {
                tracing::info!(%error, "the mount stays here");
                return Ok(Outcome::Stayed);
            }
        }
        // Nothing has changed so far.
        () = daemon.shutdown.requested() => return Ok(Outcome::Stayed),
    }
    let connection = match daemon.exports.hand_over(EXPORT).await {
        Ok(connection) => connection,
        Err(error) => {
            channel.refuse(&error).await;
            return Ok(Outcome::Stayed);
        }
    };
    if !plan.read_only
        && let Err(error) = flush_image(daemon).await
    {
        // What is in memory is all that is left of it: only this process can try again.
        plan.export(daemon, Some(connection)).await?;
        channel.refuse(&error).await;
        return Ok(Outcome::Stayed);
    }
    daemon.graph.close_all().await;
    match connection.requests() {
        Ok(requests) => {
            channel.say(RELEASED, requests).await;
            if channel.hear().await.is_ok_and(|line| line == END) {
                return Ok(Outcome::Left);
            }
        }
        Err(errno) => {
            let error = Error::os("Failed to pass the requests of the mount on", errno);
            channel.refuse(&error).await;
        }
    }
    tracing::warn!("the other process did not take the mount: serving it again");
    if let (Some(path), Ok(image)) = (plan.image.to_str(), image.try_clone()) {
        supply(path, image);
    }
    plan.open_image(daemon).await?;
    plan.open_partitions(daemon).await?;
    plan.export(daemon, Some(connection)).await?;
    Ok(Outcome::Stayed)
}

async fn offer(
    daemon: &Daemon,
    plan: &Plan,
    image: &OwnedFd,
    channel: &mut Talk,
) -> Result<(), Error> {
    let lost = |error: io::Error| Error::generic(reason(&error)).with_source(error);
    let Some(connection) = daemon.exports.connection(EXPORT) else {
        let error = Error::generic(format!(
            "the mount at '{}' cannot be handed over: the kernel reads its image by itself",
            plan.mountpoint.display()
        ))
        .with_hint("Mounts made with 'stord mount --keep' can be; others have to be unmounted and mounted again.");
        channel.refuse(&error).await;
        return Err(error);
    };
    let text = Offer::text(plan, &connection);
    let image = image.try_clone().map_err(lost)?;
    let sent = channel.with(move |channel| {
        channel.set_patience(Some(PATIENCE))?;
        send_offer(channel, &text, &image, connection.devices())
    });
    sent.await.map_err(lost)?;
    match channel.hear().await {
        Ok(line) if line == RELEASE => Ok(()),
        Ok(line) => Err(Error::generic(format!("the other says '{line}'"))),
        Err(error) => Err(lost(error)),
    }
}

/// A channel whose blocking calls happen elsewhere.
struct Talk(Option<Channel>);

impl Talk {
    async fn with<T: Send + 'static>(
        &mut self,
        act: impl FnOnce(&mut Channel) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let mut channel = self.0.take().ok_or(io::ErrorKind::NotConnected)?;
        let acted = tokio::task::spawn_blocking(move || {
            let result = act(&mut channel);
            (channel, result)
        });
        let (channel, result) = acted.await.map_err(io::Error::other)?;
        self.0 = Some(channel);
        result
    }

    /// What becomes of the line shows in the next one that is heard.
    async fn say(&mut self, line: &'static str, descriptor: Option<OwnedFd>) {
        let _ = self
            .with(move |channel| {
                let descriptors: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
                channel.send(line, &descriptors)
            })
            .await;
    }

    async fn refuse(&mut self, error: &Error) {
        let refusal = json!({"refusal": error.message, "hint": error.hint}).to_string();
        // The other hears that the channel is closed, or this.
        let _ = self.with(move |channel| channel.send(&refusal, &[])).await;
    }

    async fn hear(&mut self) -> io::Result<String> {
        self.with(|channel| Ok(channel.receive()?.0)).await
    }
}

/// Connects to the process that serves a mount or a device, at its door.
///
/// # Errors
/// There is no door, or it is another user's.
pub fn knock(door: &Path) -> io::Result<Channel> {
    let stream = std::os::unix::net::UnixStream::connect(door)?;
    let peer = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)?;
    if peer.uid() != geteuid().as_raw() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(Channel::new(stream))
}
