//! The daemon's side of the conversation with its device's holder.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;
use stord_qmp::Error;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::hold::{FORCE, Kernel, RELEASE, Task};
use crate::mount::channel::Channel;
use crate::mount::handover::PATIENCE;
use crate::report::{program, reason};

/// A holder that has set a device up.
pub struct Holder {
    answers: Lines<BufReader<OwnedReadHalf>>,
    requests: OwnedWriteHalf,
}

impl Holder {
    /// Starts one, and gives the path of the device when it can be used.
    ///
    /// # Errors
    /// There can be no process, or the holder says why there is no device.
    pub async fn start(task: Task, descriptors: Vec<OwnedFd>) -> Result<(Self, PathBuf), Error> {
        let talk = tokio::task::spawn_blocking(move || start(&task, &descriptors));
        let (stream, answer) = talk
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()))
            .map_err(failed)?;
        let device = read(&answer)?;
        let path = device.get("device").and_then(Value::as_str);
        let path = path.ok_or_else(strange)?.into();
        let connect = || {
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        };
        let (reader, requests) = connect().map_err(failed)?.into_split();
        let holder = Self {
            answers: BufReader::new(reader).lines(),
            requests,
        };
        Ok((holder, path))
    }

    /// Has the device taken away. That can take as long as it takes to write out what the kernel holds of it.
    ///
    /// # Errors
    /// It is in use and `force` is false, or what the kernel holds cannot be written.
    pub async fn release(&mut self, force: bool) -> Result<(), Error> {
        let line = format!("{}\n", if force { FORCE } else { RELEASE });
        let gone = |_| {
            Error::generic("the process that holds the device is gone")
                .with_hint("The device goes when its last user has closed it.")
        };
        self.requests
            .write_all(line.as_bytes())
            .await
            .map_err(gone)?;
        match self.answers.next_line().await {
            Ok(Some(answer)) => read(&answer).map(drop),
            Ok(None) => Err(gone(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(gone(error)),
        }
    }

    /// Waits for the holder's end. Can be given up and tried again.
    pub async fn gone(&mut self) {
        while let Ok(Some(line)) = self.answers.next_line().await {
            tracing::debug!(line, "the holder speaks unasked");
        }
    }
}

fn start(task: &Task, descriptors: &[OwnedFd]) -> io::Result<(net::UnixStream, String)> {
    let (ours, theirs) = net::UnixStream::pair()?;
    let via = match task.kernel {
        Kernel::Vduse { .. } => "vduse",
        Kernel::Loop { .. } => "loop",
        Kernel::Nbd { .. } => "nbd",
    };
    Command::new("/proc/self/exe")
        .arg0(program())
        .args(["hold", via])
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let mut channel = Channel::new(ours);
    channel.set_patience(Some(PATIENCE))?;
    let borrowed: Vec<_> = descriptors.iter().map(OwnedFd::as_fd).collect();
    channel.send(&task.write(), &borrowed)?;
    let (answer, _) = channel.receive()?;
    channel.set_patience(None)?;
    Ok((channel.into_stream(), answer))
}

/// What the holder says, unless it refuses.
fn read(answer: &str) -> Result<Value, Error> {
    let value: Value = serde_json::from_str(answer).map_err(|_| strange())?;
    let Some(refusal) = value.get("refusal").and_then(Value::as_str) else {
        return Ok(value);
    };
    let error = Error::generic(refusal);
    Err(match value.get("hint").and_then(Value::as_str) {
        Some(hint) => error.with_hint(hint),
        None => error,
    })
}

fn strange() -> Error {
    Error::generic("the device's holder cannot be understood")
}

fn failed(error: io::Error) -> Error {
    let reason = reason(&error);
    Error::generic(format!("the device cannot be held: {reason}")).with_source(error)
}
