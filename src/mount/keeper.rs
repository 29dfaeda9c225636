//! The keeper of a mount: a process that holds the mount's descriptors and does nothing, until the daemon that serves it dies.
//! Then it starts another, which takes the mount over; the users of the file have waited, and notice no more than that.
//!
//! Each daemon of a kept mount has a keeper of its own, started when the mount is served and ended, in an orderly end, before it is
//! unmounted. A mount whose daemons die one after the other is given up: the keeper ends, with it the connection, and the users get
//! errors, as they would without a keeper.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::Args;
use stord_qmp::Error;

use super::channel::Channel;
use super::handover::{END, Offer, PATIENCE, RELEASE, RELEASED, send_offer};
use super::plan::{EXPORT, Plan, text_of};
use super::store::{self, Stored};
use crate::daemon::Daemon;
use crate::daemonize;
use crate::report::{program, reason};

/// A daemon that has served for so long did not die of what its predecessor died of.
const GOOD_LIFE: Duration = Duration::from_millis(500);
/// So many daemons in a row that died sooner are enough.
const MAX_DEATHS: u64 = 5;
/// So often a new daemon is started, with this pause in between.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// Who keeps this process's mount, until this value is dropped: a process of ours, or the service manager.
#[derive(Debug)]
pub struct Keeper {
    _process: Option<Process>,
    _manager: Option<Stored>,
}

/// The keeper at the other end of a channel.
#[derive(Debug)]
struct Process(Channel);

impl Drop for Process {
    fn drop(&mut self) {
        // If it does not hear this, it is gone.
        let _ = self.0.send(END, &[]);
    }
}

impl Keeper {
    /// Starts a keeper if the plan wants one; a service has its manager for that.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_if_wanted(
        daemon: &Daemon,
        plan: &Plan,
        image: &OwnedFd,
        is_service: bool,
    ) -> Result<Option<Self>, Error> {
        if !plan.keep {
            return Ok(None);
        }
        let connection = daemon
            .exports
            .connection(EXPORT)
            .ok_or_else(|| Error::generic("the mount cannot be kept"))?;
        let failed = |error: io::Error| {
            let reason = reason(&error);
            Error::generic(format!("cannot start a keeper: {reason}")).with_source(error)
        };
        if is_service {
            let stored = store::put(plan, &connection, image).map_err(failed)?;
            return Ok(Some(Self {
                _process: None,
                _manager: Some(stored),
            }));
        }
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let spawned = Command::new("/proc/self/exe")
            .arg0(program())
            .arg("keep")
            .arg(&plan.mountpoint)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        spawned.map_err(failed)?;
        let channel = Channel::new(ours);
        let text = Offer::text(plan, &connection);
        send_offer(&channel, &text, image, connection.devices()).map_err(failed)?;
        Ok(Some(Self {
            _process: Some(Process(channel)),
            _manager: None,
        }))
    }
}

/// Hold a mount until its daemon dies.
#[derive(Clone, Debug, Args)]
pub struct KeepArgs {
    /// The mountpoint, for whoever looks at the list of processes
    mountpoint: PathBuf,
}

/// Keeps the mount that the process at standard input serves.
pub fn run(args: &KeepArgs) -> ExitCode {
    let kept = daemonize::leave_session()
        .and_then(|()| Channel::from_standard_input())
        .and_then(|channel| keep(channel, args));
    match kept {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody is there to be told.
        Err(_) => ExitCode::FAILURE,
    }
}

fn keep(mut daemon: Channel, args: &KeepArgs) -> io::Result<()> {
    let began = Instant::now();
    let (text, descriptors) = daemon.receive()?;
    let mut offer = Offer::read(&text, descriptors).map_err(io::Error::other)?;
    loop {
        match daemon.receive() {
            Ok((line, _)) if line == END => return Ok(()),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    drop(daemon);
    offer.plan.deaths = if began.elapsed() < GOOD_LIFE {
        offer.plan.deaths + 1
    } else {
        0
    };
    if offer.plan.deaths > MAX_DEATHS {
        return Err(io::Error::other("they die one after the other"));
    }
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            sleep(PAUSE);
        }
        if replace(&offer, args).is_ok() {
            return Ok(());
        }
    }
    Err(io::Error::other("no daemon takes the mount over"))
}

/// Starts a daemon that takes the mount over; returns when it serves it.
fn replace(offer: &Offer, args: &KeepArgs) -> io::Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let image = text_of(&offer.plan.image).map_err(io::Error::other)?;
    let mut child = Command::new("/proc/self/exe")
        .arg0(program())
        .args(["mount", "--take-over", image])
        .arg(&args.mountpoint)
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let mut channel = Channel::new(ours);
    let text = Offer::text(&offer.plan, &offer.connection);
    let talked = (|| {
        channel.set_patience(Some(PATIENCE))?;
        send_offer(&channel, &text, &offer.image, offer.connection.devices())?;
        expect(&mut channel, RELEASE)?;
        // The dead have released everything, or will have when the locks are free.
        channel.send(RELEASED, &[])?;
        expect(&mut channel, END)
    })();
    if talked.is_err() {
        drop(channel);
        let _ = child.kill();
        let _ = child.wait();
    }
    talked
}

fn expect(channel: &mut Channel, wanted: &str) -> io::Result<()> {
    let (line, _) = channel.receive()?;
    if line == wanted {
        Ok(())
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}
