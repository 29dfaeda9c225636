//! Puts the daemon into the background such that whoever started it learns, by the exit status of
//! the process it started, whether the daemon is up: 0 once start-up is complete, else the status
//! with which start-up ended.
//!
//! The process starts itself again, in place of a fork(2) that has no safe form: same executable,
//! same arguments, same working directory and descriptors. Only standard input differs: in the
//! background it is the pipe on which the starter waits. Standard error stays the starter's until
//! [`Background::complete`], so start-up errors reach it.

use std::ffi::{CString, OsStr, OsString};
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, getppid, setsid};
use stord_qmp::Error;

use crate::report::reason;

/// Holds the starter's process id in the background process.
const STARTER: &str = "STORD_STARTER";

/// Which half of the process this is.
#[derive(Debug)]
pub enum Half {
    /// The one that was started, which has nothing left to do but to exit with this code.
    Starter(ExitCode),
    /// The daemon.
    Daemon(Background),
}

/// A daemon in the background whose starter still waits.
#[derive(Debug)]
pub struct Background {
    starter: std::fs::File,
}

/// Splits the process in two. The starter's half waits for [`Background::complete`] or the end of
/// the other half; the daemon's half is in a session of its own. Call it before any thread is
/// started and anything is opened, since the daemon's half does everything up to here again.
///
/// # Errors
/// No pipe or no process is to be had.
pub fn detach(argv0: &OsStr, args: &[OsString]) -> Result<Half, Error> {
    if is_background() {
        return background(argv0).map(Half::Daemon).map_err(failed);
    }
    start_background(argv0, args)
        .map(Half::Starter)
        .map_err(failed)
}

/// Whether this process is the daemon's half.
fn is_background() -> bool {
    // Only the process that set the variable counts, not one that passed it on.
    std::env::var(STARTER).is_ok_and(|pid| pid == getppid().to_string())
}

fn start_background(argv0: &OsStr, args: &[OsString]) -> std::io::Result<ExitCode> {
    let (mut status, ready) = std::io::pipe()?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(argv0)
        .args(args)
        .env(STARTER, std::process::id().to_string())
        .stdin(Stdio::from(ready));
    let mut daemon = command.spawn()?;
    // It holds our copy of the pipe's other end.
    drop(command);
    if status.read_exact(&mut [0]).is_ok() {
        return Ok(ExitCode::SUCCESS);
    }
    // The daemon ended, having said why.
    let code = daemon.wait()?.code().unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// The background half of a process that somebody else started, to take something over, and who
/// waits at its standard output.
///
/// # Errors
/// No descriptor is to be had.
pub fn taking_over(argv0: &OsStr) -> Result<Background, Error> {
    let starter = std::io::stdout().as_fd().try_clone_to_owned();
    starter
        .and_then(|starter| settle_in_background(argv0, starter))
        .map_err(failed)
}

/// Leaves the session of whoever started this process, and its directory.
///
/// # Errors
/// The process leads a group.
pub fn leave_session() -> std::io::Result<()> {
    setsid()?;
    chdir("/")?;
    Ok(())
}

fn background(argv0: &OsStr) -> std::io::Result<Background> {
    let starter = std::io::stdin().as_fd().try_clone_to_owned()?;
    settle_in_background(argv0, starter)
}

fn settle_in_background(argv0: &OsStr, starter: OwnedFd) -> std::io::Result<Background> {
    setsid()?;
    umask(Mode::S_IWGRP | Mode::S_IRWXO);
    set_name(argv0);
    Ok(Background {
        starter: starter.into(),
    })
}

/// Gives the process the name that `ps` would show had it been started by its own path.
fn set_name(argv0: &OsStr) {
    let path = argv0.as_encoded_bytes();
    let base = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
    if let Ok(name) = CString::new(base) {
        // Only looks depend on it.
        let _ = prctl::set_name(&name);
    }
}

impl Background {
    /// Cuts the last ties (working directory, standard streams) and lets the starter exit with 0.
    ///
    /// # Errors
    /// `/dev/null` cannot be opened; the starter then exits with 1.
    pub fn complete(mut self) -> Result<(), Error> {
        chdir("/").map_err(|errno| failed(errno.into()))?;
        redirect_streams().map_err(failed)?;
        // The starter may have been killed; the daemon stays up all the same.
        let _ = self.starter.write_all(&[0]);
        Ok(())
    }
}

fn redirect_streams() -> std::io::Result<()> {
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}

fn failed(error: std::io::Error) -> Error {
    Error::generic(format!("cannot daemonize: {}", reason(&error))).with_source(error)
}
