//! The kernel's NBD device: an export behind connected sockets as a block device, for as long as a thread of the caller stays with it
//! (`NBD_DO_IT`). When the process ends, in whatever way, so does the device, and what was under way gets an error.
//!
//! The device is set up with ioctls, not over netlink: a device of netlink's stays when its server dies, with its requests under way
//! stuck until a timeout, and a timeout would also take a slow disk for a dead server and make requests twice.

// UNSAFETY: ioctls that pass numbers and descriptors only.
#![expect(unsafe_code, reason = "these ioctls have no safe binding elsewhere")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;

// linux/nbd.h
const NBD_SET_SOCK: libc::Ioctl = 0xab00;
const NBD_SET_BLKSIZE: libc::Ioctl = 0xab01;
const NBD_SET_SIZE: libc::Ioctl = 0xab02;
const NBD_DO_IT: libc::Ioctl = 0xab03;
const NBD_CLEAR_SOCK: libc::Ioctl = 0xab04;
const NBD_DISCONNECT: libc::Ioctl = 0xab08;
const NBD_SET_TIMEOUT: libc::Ioctl = 0xab09;
const NBD_SET_FLAGS: libc::Ioctl = 0xab0a;
// linux/fs.h
const BLKRRPART: libc::Ioctl = 0x125f;

/// A device has so long to come up.
const START: Duration = Duration::from_secs(10);
/// Time between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// With several connections the kernel takes one for dead whose request takes longer than this many seconds (30 if it is not told),
/// and makes the request again elsewhere; while the first may yet be carried out. So, never: the end of the server ends the device.
const TIMEOUT: u64 = 60 * 60 * 24 * 365;

/// What a device is to be.
#[derive(Clone, Copy, Debug)]
pub struct NbdSettings {
    /// The disk's size in bytes.
    pub size: u64,
    /// The logical block size in bytes.
    pub block_size: u32,
    /// The transmission flags of the server.
    pub flags: u16,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum NoNbdDevice {
    /// The kernel's driver is not there.
    #[error("there are no NBD devices")]
    None,
    /// So many devices are there, all of them in use.
    #[error("all {0} NBD devices are in use")]
    Busy(usize),
    /// The kernel refuses.
    #[error("{0}")]
    Refused(#[source] io::Error),
}

/// A device that is set up.
#[derive(Debug)]
pub struct KernelNbd {
    path: PathBuf,
    device: File,
}

impl KernelNbd {
    /// Sets a free device up to send its requests to these sockets, of which it keeps copies.
    ///
    /// # Errors
    /// None is free, or the kernel refuses.
    pub fn set_up(settings: NbdSettings, sockets: &[impl AsFd]) -> Result<Self, NoNbdDevice> {
        let candidates = devices();
        for name in &candidates {
            // The process that serves it.
            if Path::new("/sys/block").join(name).join("pid").exists() {
                continue;
            }
            let path = Path::new("/dev").join(name);
            let device = match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(device) => Self { path, device },
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => continue,
                Err(error) => return Err(NoNbdDevice::Refused(error)),
            };
            match device.configure(settings, sockets) {
                Ok(()) => return Ok(device),
                // Somebody else was faster.
                Err(Errno::EBUSY) => {}
                Err(errno) => {
                    // What has been told to it so far is forgotten when it is closed.
                    let _ = device.command(NBD_CLEAR_SOCK, 0);
                    return Err(NoNbdDevice::Refused(errno.into()));
                }
            }
        }
        match candidates.len() {
            0 => Err(NoNbdDevice::None),
            count => Err(NoNbdDevice::Busy(count)),
        }
    }

    fn configure(&self, settings: NbdSettings, sockets: &[impl AsFd]) -> Result<(), Errno> {
        for socket in sockets {
            let number = u64::try_from(socket.as_fd().as_raw_fd()).map_err(|_| Errno::EBADF)?;
            self.command(NBD_SET_SOCK, number)?;
        }
        self.command(NBD_SET_BLKSIZE, settings.block_size.into())?;
        self.command(NBD_SET_SIZE, settings.size)?;
        self.command(NBD_SET_TIMEOUT, TIMEOUT)?;
        self.command(NBD_SET_FLAGS, settings.flags.into())
    }

    /// `/dev/nbdN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same device for another thread, such as the one that runs it.
    ///
    /// # Errors
    /// There is no descriptor to be had.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(Self {
            path: self.path.clone(),
            device: self.device.try_clone()?,
        })
    }

    /// Runs the device until it is disconnected or the server is gone. What is under way then gets an error.
    ///
    /// # Errors
    /// It did not begin.
    pub fn run(self) -> io::Result<()> {
        let ran = self.command(NBD_DO_IT, 0);
        let _ = self.command(NBD_CLEAR_SOCK, 0);
        match ran {
            Ok(()) | Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ETIMEDOUT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for the device to come up, and has the kernel look for partitions. False if it does not come up.
    pub fn is_ready(&self) -> bool {
        let name = self.path.file_name().unwrap_or_default();
        let size = Path::new("/sys/block").join(name).join("size");
        let deadline = Instant::now() + START;
        // The last thing that the kernel does.
        while fs::read_to_string(&size).is_ok_and(|size| size.trim() == "0") {
            if Instant::now() > deadline {
                return false;
            }
            sleep(LOOK_AGAIN);
        }
        // Whoever looks at new devices keeps it busy for a moment, and has them looked for, too.
        while self.command(BLKRRPART, 0) == Err(Errno::EBUSY) && Instant::now() < deadline {
            sleep(LOOK_AGAIN);
        }
        true
    }

    /// Takes leave of the server, so that the device ends.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn disconnect(&self) -> io::Result<()> {
        Ok(self.command(NBD_DISCONNECT, 0)?)
    }

    fn command(&self, command: libc::Ioctl, argument: u64) -> Result<(), Errno> {
        // SAFETY: none of the commands takes its argument for an address.
        let result =
            unsafe { libc::ioctl(self.device.as_raw_fd(), command, argument as libc::c_ulong) };
        Errno::result(result).map(drop)
    }
}

/// The devices by name, in the order of their numbers.
fn devices() -> Vec<String> {
    let Ok(all) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    let number = |name: String| name.strip_prefix("nbd")?.parse::<u32>().ok();
    let names = all.filter_map(|item| item.ok()?.file_name().into_string().ok());
    let mut numbers: Vec<u32> = names.filter_map(number).collect();
    numbers.sort_unstable();
    numbers
        .iter()
        .map(|number| format!("nbd{number}"))
        .collect()
}
