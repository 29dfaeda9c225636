//! Taking a mount over from the process at standard input, which is the one that serves it, or the keeper of a dead one.
//!
//! A dead process may still have writes under way in the kernel; they hold the image's locks. The image is opened only when it has
//! been let go, so that nothing old overwrites what is written from now on.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use stord_block::drivers::protocol::file::supplied::supply;
use stord_qmp::Error;
use tokio::time::Instant;

use super::channel::Channel;
use super::handover::{END, Offer, PATIENCE, RELEASE, RELEASED};
use super::keeper::Keeper;
use super::mountpoint::Mountpoint;
use super::plan::{EXPORT, Plan, text_of};
use super::registry::Registry;
use super::serving::Mounted;
use crate::daemon::Daemon;
use crate::daemonize::Background;
use crate::report::reason;

/// So long the image may stay in use after its last user has let go or died.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Takes the mount over, serves it until the end, and returns the exit status.
///
/// # Errors
/// It cannot be taken over; the other process has it still, or has it back.
pub async fn run(background: Background) -> Result<ExitCode, Error> {
    let mut channel = Channel::from_standard_input().map_err(lost)?;
    channel.set_patience(Some(PATIENCE)).map_err(lost)?;
    let (text, descriptors) = channel.receive().map_err(lost)?;
    let Offer {
        plan,
        mut connection,
        image,
    } = Offer::read(&text, descriptors)?;
    supply(text_of(&plan.image)?, image.try_clone().map_err(lost)?);
    let daemon = Daemon::start()?;
    let deleted = daemon.events.subscribe();
    channel.send(RELEASE, &[]).map_err(lost)?;
    let (said, requests) = channel.receive().map_err(lost)?;
    if said != RELEASED {
        return Err(match Offer::read(&said, Vec::new()) {
            Err(refusal) => refusal,
            Ok(_) => Error::generic("the other stord does not let the mount go"),
        });
    }
    let started = async {
        if let Some(requests) = requests.into_iter().next() {
            connection.take_requests(requests)?;
        }
        open_when_free(&daemon, &plan).await?;
        plan.open_partitions(&daemon).await?;
        plan.export(&daemon, Some(connection)).await?;
        Keeper::start_if_wanted(&daemon, &plan, &image, false)
    };
    let keeper = match started.await {
        Ok(keeper) => keeper,
        Err(error) => {
            // The image is let go before the other hears of it. What is mounted stays so.
            if let Err(error) = daemon.exports.hand_over(EXPORT).await {
                tracing::debug!(%error, "nothing was mounted");
            }
            daemon.close().await?;
            drop(channel);
            return Err(error);
        }
    };
    leave_alone(channel).await;
    forget_dead(&plan);
    let mountpoint = Mountpoint::of_mount(&plan.mountpoint, plan.created);
    let mounted = Mounted::register(&daemon, plan, image, mountpoint, keeper)?;
    mounted.serve(deleted, Some(background)).await
}

/// Goes on with the mount that a service's dead daemon had left with the manager, and returns the exit status in the end.
///
/// # Errors
/// It cannot be taken over, and is given up.
pub async fn resume(offer: Offer) -> Result<ExitCode, Error> {
    let Offer {
        plan,
        connection,
        image,
    } = offer;
    supply(text_of(&plan.image)?, image.try_clone().map_err(lost)?);
    let mountpoint = Mountpoint::of_mount(&plan.mountpoint, plan.created);
    let daemon = Daemon::start()?;
    let deleted = daemon.events.subscribe();
    let started = async {
        open_when_free(&daemon, &plan).await?;
        plan.open_partitions(&daemon).await?;
        plan.export(&daemon, Some(connection)).await?;
        Keeper::start_if_wanted(&daemon, &plan, &image, true)
    };
    let keeper = match started.await {
        Ok(keeper) => keeper,
        Err(error) => {
            daemon.close().await?;
            return Err(error);
        }
    };
    forget_dead(&plan);
    let mounted = Mounted::register(&daemon, plan, image, mountpoint, keeper)?;
    mounted.serve(deleted, None).await
}

/// Removes what dead daemons of the mount have left in the registry.
fn forget_dead(plan: &Plan) {
    for dead in Registry::of_user().find(&plan.mountpoint) {
        if dead.entry.at == plan.mountpoint && !dead.is_alive() {
            dead.remove();
        }
    }
}

/// Tells the other that it can end, and waits until it has.
async fn leave_alone(mut channel: Channel) {
    let ended = tokio::task::spawn_blocking(move || {
        // Whatever it does, the mount is served here from now on.
        if channel.send(END, &[]).is_ok() {
            let _ = channel.receive();
        }
    });
    let _ = ended.await;
}

/// Opens the image as soon as nobody else writes to it.
async fn open_when_free(daemon: &Daemon, plan: &Plan) -> Result<(), Error> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match plan.open_image(daemon).await {
            Err(error) if error.message.contains("lock") && Instant::now() < deadline => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            result => return result,
        }
    }
}

fn lost(error: io::Error) -> Error {
    let reason = reason(&error);
    Error::generic(format!("cannot take the mount over: {reason}")).with_source(error)
}
