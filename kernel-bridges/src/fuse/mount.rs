//! Mounting: a file system over an existing regular file or directory, whose INIT request is answered before anybody can wait for it.
//!
//! With the privilege, the file system is set up unattached (Linux 5.2), its INIT answered, its queues started, and only then does it
//! appear at the path, usable at once. Elsewhere a thread is reading from the device when mount(2) is called; and where mounting is
//! not allowed, `fusermount3` does it and hands the device over.
//!
//! Unmounting is by path, and only if the path still leads to our file system.

use std::ffi::CString;
use std::fs;
use std::io::{IoSliceMut, Read as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair,
};
use nix::unistd::{getegid, geteuid, write};

use super::abi::InitFlags;
use super::init::{self, Proposal};
use super::kernel::{self, FsContext};

/// The source of our mounts, by which they can be told from others in `/proc/mounts`.
pub(super) const SOURCE: &str = "stord";
/// Programs that mount for those who may not, in the order of trying.
const HELPERS: [&str; 2] = ["fusermount3", "fusermount"];
/// How long to wait between two looks whether mount(2) has made the device readable.
const INIT_RETRY: Duration = Duration::from_micros(200);

/// What is asked of a mount.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    /// Let other users than ours in; the mode of the file decides what they may do.
    pub(super) allow_other: bool,
    /// The root is a directory, not a regular file.
    pub(super) directory: bool,
    pub(super) proposal: Proposal,
}

impl Options {
    /// The same for a mount whose connection we could not end: io_uring entries end with the connection only.
    fn without_io_uring(mut self) -> Self {
        self.proposal.io_uring = false;
        self
    }
}

/// Why mounting failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum MountError {
    #[error("cannot open /dev/fuse: {}", .0.desc())]
    Device(#[source] Errno),
    #[error("mounting at '{path}' failed: {}", .errno.desc())]
    Mount {
        path: String,
        #[source]
        errno: Errno,
    },
    #[error("fusermount3 is not installed")]
    NoHelper,
    #[error("{0}")]
    Helper(String),
    #[error("the kernel's first request was not understood: {}", .0.desc())]
    Init(#[source] Errno),
}

/// A connection to the kernel, with its file system mounted or ready to be.
pub(super) struct Mounted {
    /// The device; its INIT has been answered.
    pub(super) device: OwnedFd,
    /// What kernel and daemon agreed upon.
    pub(super) flags: InitFlags,
    pub(super) mount: Mount,
    /// What has still to be done for the file system to appear.
    pub(super) attachment: Attachment,
}

/// A file system on its way to its path.
pub(super) struct Attachment {
    path: PathBuf,
    /// `None` where the file system has appeared already.
    detached: Option<OwnedFd>,
}

/// A mount of ours at a path.
#[derive(Clone, Debug)]
pub(super) struct Mount {
    path: PathBuf,
    device_number: u64,
    by_helper: bool,
}

impl Mounted {
    /// Sets a file system up over `path`, which is absolute. Blocks.
    pub(super) fn new(path: &Path, options: Options) -> Result<Self, MountError> {
        match unattached(path, options) {
            Err(MountError::Mount {
                errno: Errno::ENOSYS | Errno::EPERM | Errno::EINVAL,
                ..
            }) => {}
            other => return other,
        }
        match by_mount(path, options) {
            Err(MountError::Mount {
                errno: Errno::EPERM,
                ..
            }) => by_helper(path, options.without_io_uring()),
            other => other,
        }
    }
}

impl Attachment {
    /// Makes the file system appear at its path, if it has not yet. Blocks.
    pub(super) fn attach(self) -> Result<(), MountError> {
        let Some(detached) = self.detached else {
            return Ok(());
        };
        let target = c_path(&self.path)?;
        kernel::attach(detached.as_fd(), &target).map_err(|errno| failed(&self.path, errno))
    }
}

impl Mount {
    /// A mount that another process made.
    pub(super) fn known(path: PathBuf, device_number: u64, by_helper: bool) -> Self {
        Self {
            path,
            device_number,
            by_helper,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a set-user-id program made it, which has to unmount it too.
    pub(super) fn is_by_helper(&self) -> bool {
        self.by_helper
    }

    /// The number of the file system's device.
    pub(super) fn device_number(&self) -> u64 {
        self.device_number
    }

    /// Takes the file system away from its path, even while it is in use. Blocks as long as the kernel has something to write back.
    ///
    /// The connection lives on until its last user has gone, unless `abort` ends it for them.
    /// False when the file system was not there any more.
    pub(super) fn unmount(&self, abort: bool) -> bool {
        if !self.is_at_path() {
            return false;
        }
        if self.by_helper {
            unmount_by_helper(&self.path);
            return true;
        }
        let in_use = if abort {
            MntFlags::MNT_DETACH | MntFlags::MNT_FORCE
        } else {
            MntFlags::MNT_DETACH
        };
        let unmounted = match umount2(&self.path, MntFlags::empty()) {
            Err(Errno::EBUSY) => umount2(&self.path, in_use),
            other => other,
        };
        if let Err(errno) = unmounted {
            tracing::warn!(path = %self.path.display(), %errno, "cannot unmount");
        }
        true
    }

    /// Ends the connection, whoever uses it, as far as the system lets us, unless it `is_over`: then its number may be another's.
    pub(super) fn abort(&self, is_over: impl Fn() -> bool) {
        let aborted = kernel::connection_end(nix::libc::minor(self.device_number).into())
            .and_then(|end| if is_over() { Ok(0) } else { write(&end, b"1") });
        if aborted.is_err() && self.is_at_path() {
            let flags = MntFlags::MNT_DETACH | MntFlags::MNT_FORCE;
            if let Err(errno) = umount2(&self.path, flags) {
                tracing::warn!(path = %self.path.display(), %errno, "cannot end the FUSE connection");
            }
        }
    }

    fn is_at_path(&self) -> bool {
        let path = c_path(&self.path);
        path.is_ok_and(|path| kernel::device_number(None, &path) == Ok(self.device_number))
    }
}

/// Takes a mount whose daemon is dead away from its path. Blocks.
pub(super) fn clear_dead(path: &Path) {
    if umount2(path, MntFlags::MNT_DETACH).is_err() {
        unmount_by_helper(path);
    }
}

fn unmount_by_helper(path: &Path) {
    let unmounted = HELPERS.iter().find_map(|helper| {
        Command::new(helper)
            .args(["-u", "-q", "-z", "--"])
            .arg(path)
            .stdin(Stdio::null())
            .status()
            .ok()
    });
    if !unmounted.is_some_and(|status| status.success()) {
        tracing::warn!(path = %path.display(), "fusermount3 could not unmount");
    }
}

/// The kernel's new way: nothing is at the path before INIT has been answered.
fn unattached(path: &Path, options: Options) -> Result<Mounted, MountError> {
    let device = kernel::open_device().map_err(MountError::Device)?;
    let (mount, flags) = set_up(&device, options).map_err(|errno| failed(path, errno))?;
    let device_number =
        kernel::device_number(Some(mount.as_fd()), c"").map_err(|errno| failed(path, errno))?;
    Ok(Mounted {
        device,
        flags,
        mount: Mount {
            path: path.to_owned(),
            device_number,
            by_helper: false,
        },
        attachment: Attachment {
            path: path.to_owned(),
            detached: Some(mount),
        },
    })
}

fn set_up(device: &OwnedFd, options: Options) -> Result<(OwnedFd, InitFlags), Errno> {
    let context = FsContext::open(c"fuse")?;
    context.set(c"source", &c_text(SOURCE)?)?;
    for (key, value) in values(device.as_fd(), options) {
        context.set(&c_text(key)?, &c_text(&value)?)?;
    }
    for flag in flags(options) {
        context.set_flag(&c_text(flag)?)?;
    }
    let mount = context.create()?;
    let flags = init::answer(device.as_fd(), options.proposal)?;
    Ok((mount, flags))
}

/// mount(2), with a thread already waiting for INIT.
fn by_mount(path: &Path, options: Options) -> Result<Mounted, MountError> {
    let device = kernel::open_device().map_err(MountError::Device)?;
    let mut data: Vec<String> = values(device.as_fd(), options)
        .map(|(key, value)| format!("{key}={value}"))
        .into();
    data.extend(flags(options).map(str::to_owned));
    let data = data.join(",");
    let given_up = AtomicBool::new(false);
    let answered = thread::scope(|scope| {
        let answer = scope.spawn(|| answer_when_mounted(&device, options, &given_up));
        let mounted = mount(
            Some(SOURCE),
            path,
            Some("fuse"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME,
            Some(data.as_str()),
        );
        if let Err(errno) = mounted {
            given_up.store(true, Ordering::Release);
            // It ends with an error that says less than this one.
            let _ = answer.join();
            return Err(failed(path, errno));
        }
        match answer.join() {
            Ok(answered) => answered.map_err(MountError::Init),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    finish(path, device, answered?, false)
}

/// Answers INIT as soon as the device is mounted.
fn answer_when_mounted(
    device: &OwnedFd,
    options: Options,
    given_up: &AtomicBool,
) -> Result<InitFlags, Errno> {
    loop {
        match init::answer(device.as_fd(), options.proposal) {
            // Not mounted yet.
            Err(Errno::EPERM) if !given_up.load(Ordering::Acquire) => {
                thread::sleep(INIT_RETRY);
            }
            answered => return answered,
        }
    }
}

/// A set-user-id program mounts and sends the device.
fn by_helper(path: &Path, options: Options) -> Result<Mounted, MountError> {
    let mut mount_options = vec![
        "rw".to_owned(),
        "nosuid".to_owned(),
        "nodev".to_owned(),
        "noatime".to_owned(),
        format!("fsname={SOURCE}"),
        format!("max_read={}", options.proposal.max_transfer),
    ];
    mount_options.extend(flags(options).map(str::to_owned));
    let mount_options = mount_options.join(",");
    for helper in HELPERS {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(|errno| failed(path, errno))?;
        let spawned = Command::new(helper)
            .args(["-o", &mount_options, "--"])
            .arg(path)
            // The number of the socket: its standard input.
            .env("_FUSE_COMMFD", "0")
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut child) = spawned else { continue };
        let received = receive_descriptor(&ours);
        let mut said = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            // What it says is only for a message.
            let _ = stderr.read_to_string(&mut said);
        }
        // Its status says no more than whether the descriptor came.
        let _ = child.wait();
        let Some(device) = received else {
            let said = said.trim();
            let said = if said.is_empty() {
                format!("{helper} failed")
            } else {
                said.to_owned()
            };
            return Err(MountError::Helper(said));
        };
        let flags = init::answer(device.as_fd(), options.proposal).map_err(MountError::Init)?;
        return finish(path, device, flags, true);
    }
    Err(MountError::NoHelper)
}

fn receive_descriptor(socket: &OwnedFd) -> Option<OwnedFd> {
    let mut byte = [0u8; 1];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let message = loop {
        match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(Errno::EINTR) => {}
            Err(_) => return None,
            Ok(message) => break message,
        }
    };
    for control in message.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            return fds.into_iter().next().map(kernel::received);
        }
    }
    None
}

fn finish(
    path: &Path,
    device: OwnedFd,
    flags: InitFlags,
    by_helper: bool,
) -> Result<Mounted, MountError> {
    let device_number =
        kernel::device_number(None, &c_path(path)?).map_err(|errno| failed(path, errno))?;
    Ok(Mounted {
        device,
        flags,
        mount: Mount {
            path: path.to_owned(),
            device_number,
            by_helper,
        },
        attachment: Attachment {
            path: path.to_owned(),
            detached: None,
        },
    })
}

fn values(device: BorrowedFd<'_>, options: Options) -> [(&'static str, String); 5] {
    [
        ("fd", device.as_raw_fd().to_string()),
        // A directory or a regular file, in octal.
        (
            "rootmode",
            if options.directory { "40000" } else { "100000" }.to_owned(),
        ),
        ("user_id", geteuid().to_string()),
        ("group_id", getegid().to_string()),
        ("max_read", options.proposal.max_transfer.to_string()),
    ]
}

fn flags(options: Options) -> impl Iterator<Item = &'static str> {
    std::iter::once("default_permissions").chain(options.allow_other.then_some("allow_other"))
}

fn failed(path: &Path, errno: Errno) -> MountError {
    MountError::Mount {
        path: path.display().to_string(),
        errno,
    }
}

fn c_text(text: &str) -> Result<CString, Errno> {
    CString::new(text).map_err(|_| Errno::EINVAL)
}

fn c_path(path: &Path) -> Result<CString, MountError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| failed(path, Errno::EINVAL))
}

impl MountError {
    /// What a person can do about it.
    pub(super) fn hint(&self) -> Option<String> {
        match self {
            Self::Device(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => Some(
                "/dev/fuse is missing: load the kernel module with 'modprobe fuse'; a container must be given the device (--device /dev/fuse)"
                    .to_owned(),
            ),
            Self::Device(_) => Some(
                "/dev/fuse must be readable and writable for the user that runs the daemon (mode 0666)"
                    .to_owned(),
            ),
            Self::NoHelper => Some(
                "only root can mount without fusermount3: install the package fuse3".to_owned(),
            ),
            Self::Helper(said) if said.contains("user_allow_other") => Some(format!(
                "{said}; add that line to /etc/fuse.conf, or use allow-other=off"
            )),
            Self::Helper(said) if said.contains("Permission denied") && confined_helper() => {
                Some(format!(
                    "{said}; the AppArmor profile of fusermount3 allows mounts below $HOME, /mnt, /media, /tmp and $XDG_RUNTIME_DIR only \
                     (\"failed mntpnt match\" in the kernel's log): use such a path, or extend /etc/apparmor.d/local/fusermount3"
                ))
            }
            Self::Helper(said) => Some(said.clone()),
            other => Some(other.to_string()),
        }
    }
}

/// Whether AppArmor restricts where fusermount3 may mount.
fn confined_helper() -> bool {
    Path::new("/etc/apparmor.d/fusermount3").exists()
        && fs::exists("/sys/kernel/security/apparmor").unwrap_or(false)
}
