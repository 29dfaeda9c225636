//! System calls for FUSE that have no safe binding elsewhere: the mount API of Linux 5.2, cloned device descriptors, and a stat that
//! asks the file system nothing.

// UNSAFETY: bare system calls; each passes numbers, descriptors and C strings that live across the call.
#![expect(
    unsafe_code,
    reason = "these system calls have no safe binding elsewhere"
)]

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::libc;
use nix::sys::stat::Mode;

// linux/mount.h
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const MOUNT_ATTR_NOSUID: libc::c_uint = 0x2;
const MOUNT_ATTR_NODEV: libc::c_uint = 0x4;
const MOUNT_ATTR_NOATIME: libc::c_uint = 0x10;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;

nix::ioctl_read!(
    /// Makes a freshly opened device descriptor another one of the connection whose descriptor is passed.
    fuse_dev_ioc_clone,
    229,
    0,
    u32
);

/// `struct fuse_backing_map`.
#[repr(C)]
pub struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

nix::ioctl_write_ptr!(
    /// Makes a file known to a connection, as one that the kernel may read and write for it.
    fuse_dev_ioc_backing_open,
    229,
    1,
    BackingMap
);

nix::ioctl_write_ptr!(
    /// Takes that back, but for files that are open.
    fuse_dev_ioc_backing_close,
    229,
    2,
    u32
);

/// Makes a file known to the connection of `device`, and gives the number by which it goes there.
pub(super) fn open_backing(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<i32, Errno> {
    let map = BackingMap {
        fd: file.as_raw_fd(),
        flags: 0,
        padding: 0,
    };
    // SAFETY: the ioctl reads the one structure, which lives across the call.
    unsafe { fuse_dev_ioc_backing_open(device.as_raw_fd(), &raw const map) }
}

/// Forgets a file made known by [`open_backing`].
pub(super) fn close_backing(device: BorrowedFd<'_>, id: i32) -> Result<(), Errno> {
    let id = u32::try_from(id).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the ioctl reads one u32, which lives across the call.
    unsafe { fuse_dev_ioc_backing_close(device.as_raw_fd(), &raw const id) }.map(drop)
}

/// Opens the FUSE device.
pub(super) fn open_device() -> Result<OwnedFd, Errno> {
    open("/dev/fuse", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
}

/// Opens another descriptor of the same connection, with a queue of replies of its own.
pub(super) fn clone_device(device: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let clone = open_device()?;
    let mut source = u32::try_from(device.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    // SAFETY: the ioctl reads one u32, which lives across the call.
    unsafe { fuse_dev_ioc_clone(clone.as_raw_fd(), &raw mut source) }?;
    Ok(clone)
}

/// A file system being set up, which nobody can see yet.
pub(super) struct FsContext(OwnedFd);

impl FsContext {
    /// Starts to set up a file system of the type `name`. `ENOSYS` before Linux 5.2.
    pub(super) fn open(name: &CStr) -> Result<Self, Errno> {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) };
        Ok(Self(owned(fd)?))
    }

    /// Sets an option that has a value.
    pub(super) fn set(&self, key: &CStr, value: &CStr) -> Result<(), Errno> {
        self.configure(FSCONFIG_SET_STRING, Some(key), Some(value))
    }

    /// Sets an option that has none.
    pub(super) fn set_flag(&self, key: &CStr) -> Result<(), Errno> {
        self.configure(FSCONFIG_SET_FLAG, Some(key), None)
    }

    /// Creates the file system and gives a mount of it that is attached nowhere yet.
    pub(super) fn create(&self) -> Result<OwnedFd, Errno> {
        self.configure(FSCONFIG_CMD_CREATE, None, None)?;
        let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOATIME;
        // SAFETY: passes numbers only.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.0.as_raw_fd(),
                FSMOUNT_CLOEXEC,
                attributes,
            )
        };
        owned(fd)
    }

    fn configure(
        &self,
        command: libc::c_uint,
        key: Option<&CStr>,
        value: Option<&CStr>,
    ) -> Result<(), Errno> {
        let pointer = |text: Option<&CStr>| text.map_or(ptr::null(), CStr::as_ptr);
        // SAFETY: the strings are C strings that live across the call, or absent where the command takes none.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command,
                pointer(key),
                pointer(value),
                0,
            )
        };
        Errno::result(result).map(drop)
    }
}

/// What ends the connection of the file system on the device with this minor number, when `1` is written to it. It concerns that
/// connection even if another one gets the number meanwhile.
pub(super) fn connection_end(minor: u64) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let usual = format!("/sys/fs/fuse/connections/{minor}/abort");
    match open(usual.as_str(), flags, Mode::empty()) {
        // Not every system has it mounted there, and a file system that nobody sees will do.
        Err(Errno::ENOENT) => {
            let connections = FsContext::open(c"fusectl")?.create()?;
            openat(
                connections,
                format!("{minor}/abort").as_str(),
                flags,
                Mode::empty(),
            )
        }
        opened => opened,
    }
}

/// Attaches a mount at a path.
pub(super) fn attach(mount: BorrowedFd<'_>, path: &CStr) -> Result<(), Errno> {
    // SAFETY: both paths are C strings that live across the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    Errno::result(result).map(drop)
}

/// The device number of the file system at a path, or of an open mount where the path is empty. A FUSE file system is not asked.
pub(super) fn device_number(at: Option<BorrowedFd<'_>>, path: &CStr) -> Result<u64, Errno> {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT | libc::AT_EMPTY_PATH;
    let at = at.map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd());
    // SAFETY: the path is a C string, and `status` has room for the structure; both live across the call.
    let result = unsafe {
        libc::statx(
            at,
            path.as_ptr(),
            flags,
            libc::STATX_TYPE,
            status.as_mut_ptr(),
        )
    };
    Errno::result(result)?;
    // SAFETY: all zeroes is a valid value of the structure, and the call only fills it in.
    let status = unsafe { status.assume_init() };
    Ok(libc::makedev(status.stx_dev_major, status.stx_dev_minor))
}

/// Takes over a descriptor that came in a message.
pub(super) fn received(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel made this descriptor for the receiver of the message, which hands it on to nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn owned(fd: libc::c_long) -> Result<OwnedFd, Errno> {
    let fd = Errno::result(fd)?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the system call has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
