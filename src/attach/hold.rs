//! The holder of a device: a process that sets it up, keeps it as long as its daemon lives, and takes it away, by itself when the daemon
//! has died.
//!
//! ```text
//!   daemon                      holder
//!   task, descriptors    ──►
//!                               sets the device up
//!                        ◄──    its path, or a refusal
//!   release, or force    ──►
//!                               looks whether it is in use, writes it out, takes it away
//!                        ◄──    released, or a refusal
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::JoinHandle;

use clap::Args;
use nix::libc::STDIN_FILENO;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{Shutdown, shutdown};
use serde_json::{Value, json};
use stord_bridges::devices::{KernelNbd, LoopDevice, LoopSettings, NbdSettings, NoNbdDevice};
use stord_qmp::Error;

use super::{cdi, in_use};
use crate::daemonize;
use crate::mount::channel::Channel;
use crate::mount::registry::Registry;
use crate::report::reason;

/// Take the device away unless it is in use.
pub const RELEASE: &str = "release";
/// Take the device away.
pub const FORCE: &str = "force";

/// What a holder is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The device.
    pub kernel: Kernel,
    /// The name that containers get it by.
    pub cdi: Option<String>,
    /// The process that serves it.
    pub daemon: u32,
}

/// What to tell the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// A loop device over a file.
    Loop {
        file: PathBuf,
        read_only: bool,
        block_size: u32,
        name: String,
    },
    /// A virtio disk that the daemon makes and unmakes.
    Vduse { device: PathBuf },
    /// An NBD device over the sockets that come with the task.
    Nbd {
        size: u64,
        block_size: u32,
        flags: u16,
    },
}

impl Task {
    /// For [`read`](Self::read).
    pub fn write(&self) -> String {
        let kernel = match &self.kernel {
            Kernel::Loop {
                file,
                read_only,
                block_size,
                name,
            } => json!({"via": "loop", "file": file.to_str(), "read-only": read_only,
                "block-size": block_size, "name": name}),
            Kernel::Vduse { device } => json!({"via": "vduse", "device": device.to_str()}),
            Kernel::Nbd {
                size,
                block_size,
                flags,
            } => json!({"via": "nbd", "size": size, "block-size": block_size, "flags": flags}),
        };
        json!({"kernel": kernel, "cdi": self.cdi, "daemon": self.daemon}).to_string()
    }

    /// Reads what [`write`](Self::write) wrote; `None` if it is something else.
    pub fn read(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        let kernel = value.get("kernel")?;
        let number = |key: &str| kernel.get(key)?.as_u64();
        let text = |key: &str| kernel.get(key)?.as_str();
        let block_size = || u32::try_from(number("block-size")?).ok();
        let kernel = match text("via")? {
            "loop" => Kernel::Loop {
                file: text("file")?.into(),
                read_only: kernel.get("read-only")?.as_bool()?,
                block_size: block_size()?,
                name: text("name")?.to_owned(),
            },
            "vduse" => Kernel::Vduse {
                device: text("device")?.into(),
            },
            "nbd" => Kernel::Nbd {
                size: number("size")?,
                block_size: block_size()?,
                flags: u16::try_from(number("flags")?).ok()?,
            },
            _ => return None,
        };
        Some(Self {
            kernel,
            cdi: value.get("cdi")?.as_str().map(str::to_owned),
            daemon: u32::try_from(value.get("daemon")?.as_u64()?).ok()?,
        })
    }
}

/// Hold a device as long as its daemon lives.
#[derive(Clone, Debug, Args)]
pub struct HoldArgs {
    /// The way the device comes about, for whoever looks at the list of processes
    via: String,
}

/// Holds the device that the process at standard input asks for.
pub fn run(_args: &HoldArgs) -> ExitCode {
    let held = daemonize::leave_session()
        .and_then(|()| outlive_signals())
        .and_then(|()| Channel::from_standard_input())
        .and_then(hold);
    match held {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody is there to be told.
        Err(_) => ExitCode::FAILURE,
    }
}

/// What ends a daemon must not end its holder before it.
fn outlive_signals() -> io::Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    Ok(signals.thread_block()?)
}

fn hold(mut daemon: Channel) -> io::Result<()> {
    let (text, sockets) = daemon.receive()?;
    let task = Task::read(&text).ok_or(io::ErrorKind::InvalidData)?;
    let held = match Held::set_up(&task, sockets) {
        Ok(held) => held,
        Err(error) => return daemon.send(&refusal(&error), &[]),
    };
    let answer = json!({"device": held.path().to_str()}).to_string();
    // If it does not hear this, it is gone, which shows below.
    let _ = daemon.send(&answer, &[]);
    let released = json!({"released": true}).to_string();
    let device = held.path().to_path_buf();
    let answered = loop {
        let force = match daemon.receive() {
            Ok((line, _)) if line == RELEASE => false,
            Ok((line, _)) if line == FORCE => true,
            Ok(_) => continue,
            Err(_) => {
                held.let_go();
                break Ok(());
            }
        };
        match in_use::seize(held.path(), force) {
            Ok(seized) if held.is_the_daemon_s() => {
                drop(seized);
                // It may find that it cannot be taken away after all.
                let _ = daemon.send(&released, &[]);
            }
            Ok(seized) => {
                held.let_go();
                // The last user, so that nobody has come in between.
                drop(seized);
                break daemon.send(&released, &[]);
            }
            Err(error) => {
                let _ = daemon.send(&refusal(&error), &[]);
            }
        }
    };
    // One of a dead daemon waits for the next.
    if !in_use::is_served_by_vduse(&device) {
        if let Some(name) = &task.cdi {
            cdi::remove(name);
        }
        forget_dead(task.daemon);
    }
    answered
}

/// Removes the entry of a daemon that could not do so itself.
fn forget_dead(daemon: u32) {
    for found in Registry::of_user().devices() {
        if found.entry.pid == daemon && !found.is_alive() {
            found.remove();
        }
    }
}

fn refusal(error: &Error) -> String {
    json!({"refusal": error.message, "hint": error.hint}).to_string()
}

/// A device that is set up.
enum Held {
    Vduse(PathBuf),
    Loop(LoopDevice),
    Nbd {
        device: KernelNbd,
        runner: JoinHandle<()>,
    },
}

impl Held {
    fn set_up(task: &Task, sockets: Vec<OwnedFd>) -> Result<Self, Error> {
        let held = match &task.kernel {
            Kernel::Vduse { device } => Ok(Self::Vduse(device.clone())),
            Kernel::Loop {
                file,
                read_only,
                block_size,
                name,
            } => Self::set_up_loop(file, *read_only, *block_size, name),
            Kernel::Nbd {
                size,
                block_size,
                flags,
            } => Self::set_up_nbd(
                NbdSettings {
                    size: *size,
                    block_size: *block_size,
                    flags: *flags,
                },
                sockets,
            ),
        }?;
        if let Some(name) = &task.cdi
            && let Err(error) = cdi::write(name, held.path())
        {
            held.let_go();
            return Err(error);
        }
        Ok(held)
    }

    fn set_up_loop(
        file: &Path,
        read_only: bool,
        block_size: u32,
        name: &str,
    ) -> Result<Self, Error> {
        let open = || File::options().read(true).write(!read_only).open(file);
        let attached = open().and_then(|file| {
            LoopDevice::attach(LoopSettings {
                file: file.as_fd(),
                read_only,
                block_size,
                name,
            })
        });
        attached.map(Self::Loop).map_err(|error| {
            let reason = reason(&error);
            Error::generic(format!("cannot set a loop device up: {reason}")).with_source(error)
        })
    }

    fn set_up_nbd(settings: NbdSettings, sockets: Vec<OwnedFd>) -> Result<Self, Error> {
        let device = KernelNbd::set_up(settings, &sockets).map_err(|error| {
            let message = match &error {
                NoNbdDevice::Refused(error) => {
                    format!("cannot set an NBD device up: {}", reason(error))
                }
                other => other.to_string(),
            };
            let is_busy = matches!(error, NoNbdDevice::Busy(_));
            let error = Error::generic(message).with_source(error);
            if is_busy {
                error.with_hint("Load the module with more, when none is in use: modprobe -r nbd && modprobe nbd nbds_max=64")
            } else {
                error
            }
        })?;
        // The kernel has its own.
        drop(sockets);
        let failed = |error: io::Error| {
            let reason = reason(&error);
            Error::generic(format!("cannot run an NBD device: {reason}")).with_source(error)
        };
        let running = device.duplicate().map_err(failed)?;
        let runner = std::thread::Builder::new().spawn(move || {
            if let Err(error) = running.run() {
                tracing::warn!(%error, "the NBD device has ended");
            }
            // Whoever waits for the daemon's word is to know that there is nothing left to hold.
            let _ = shutdown(STDIN_FILENO, Shutdown::Read);
        });
        let runner = runner.map_err(failed)?;
        let is_ready = device.is_ready();
        let held = Self::Nbd { device, runner };
        if !is_ready {
            held.let_go();
            return Err(Error::generic("the kernel's NBD device does not come up"));
        }
        Ok(held)
    }

    fn path(&self) -> &Path {
        match self {
            Self::Vduse(device) => device,
            Self::Loop(device) => device.path(),
            Self::Nbd { device, .. } => device.path(),
        }
    }

    /// Whether only the daemon can take it away.
    fn is_the_daemon_s(&self) -> bool {
        matches!(self, Self::Vduse(_))
    }

    /// Takes the device away, or has it go with its last user.
    fn let_go(self) {
        match self {
            Self::Vduse(_) => {}
            Self::Loop(device) => {
                // It has gone if this fails.
                let _ = device.detach();
            }
            Self::Nbd { device, runner } => {
                let _ = device.disconnect();
                // A panic there has ended the device all the same.
                let _ = runner.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn task_is_read_as_it_was_written() {
        for kernel in [
            Kernel::Vduse {
                device: "/dev/vda".into(),
            },
            Kernel::Loop {
                file: "/run/stord/1.disk".into(),
                read_only: true,
                block_size: 4096,
                name: "stord-1".to_owned(),
            },
            Kernel::Nbd {
                size: 1 << 40,
                block_size: 512,
                flags: 0x1ff,
            },
        ] {
            let task = Task {
                kernel,
                cdi: Some("disk".to_owned()),
                daemon: 7,
            };
            assert_eq!(Task::read(&task.write()), Some(task));
        }
        assert_eq!(Task::read("{}"), None);
    }
}
