//! What the back end tells the front end unasked, over the channel that the front end gave for that: the disk has another length.
//!
//! A front end that does not read its channel holds up nothing but the task here.

use std::io;
use std::os::fd::OwnedFd;

use socket2::Socket;
use stord_aio::sync::watch;
use tokio::task::JoinHandle;

use super::channel::Channel;
use super::message::{CONFIG_CHANGED, Header};

/// The channel in use; ends with this.
pub(super) struct Notices(JoinHandle<()>);

impl Notices {
    /// Tells of changes that `resizes` has not seen.
    ///
    /// # Errors
    /// The descriptor is no socket.
    pub(super) fn start(descriptor: OwnedFd, mut resizes: watch::Receiver<()>) -> io::Result<Self> {
        let socket = Socket::from(descriptor);
        socket.r#type()?;
        let channel = Channel::new(socket)?;
        let task = tokio::task::spawn_local(async move {
            while resizes.changed().await.is_ok() {
                let sent = channel.send(Header::notice(CONFIG_CHANGED), &[], None);
                if let Err(error) = sent.await {
                    tracing::debug!(%error, "the front end does not hear of the new length");
                    return;
                }
            }
        });
        Ok(Self(task))
    }
}

impl Drop for Notices {
    fn drop(&mut self) {
        self.0.abort();
    }
}
