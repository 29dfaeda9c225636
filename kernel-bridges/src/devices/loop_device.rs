//! Loop devices: a file as a block device, which goes when its last user has closed it (loop(4)).

// UNSAFETY: ioctls; the one structure that is passed lives across the call, all else are numbers.
#![expect(unsafe_code, reason = "these ioctls have no safe binding elsewhere")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use zerocopy::{FromZeros, Immutable, IntoBytes};

const CONTROL: &str = "/dev/loop-control";
/// Somebody else may be faster to take a free device, so often.
const ATTEMPTS: u32 = 64;

// linux/loop.h
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_PARTSCAN: u32 = 8;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const NAME_SIZE: usize = 64;

nix::ioctl_none_bad!(
    /// Forgets the file, now or with the last user.
    loop_clr_fd,
    0x4c01
);
nix::ioctl_write_ptr_bad!(
    /// Sets a device up in one step (Linux 5.8).
    loop_configure,
    0x4c0a,
    LoopConfig
);
nix::ioctl_none_bad!(
    /// The number of a free device, which is made if there is none.
    loop_ctl_get_free,
    0x4c82
);

/// `struct loop_info64`.
#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_SIZE],
    crypt_name: [u8; NAME_SIZE],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
pub struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// What a loop device is to be.
#[derive(Clone, Copy, Debug)]
pub struct LoopSettings<'a> {
    /// The content.
    pub file: BorrowedFd<'a>,
    /// Whether nobody may write.
    pub read_only: bool,
    /// The logical block size in bytes, 512 to 4096.
    pub block_size: u32,
    /// A name that udev makes known below `/dev/disk/by-loop-ref`; up to 63 bytes of it are kept.
    pub name: &'a str,
}

/// A loop device that is kept from going by this value.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    device: File,
}

impl LoopDevice {
    /// Makes the file a free device's content. Its partitions are looked for, with reads of the file.
    ///
    /// # Errors
    /// `NotFound` where there are no loop devices, else what the kernel says.
    pub fn attach(settings: LoopSettings<'_>) -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        let config = settings.config();
        for _ in 0..ATTEMPTS {
            // SAFETY: the ioctl takes nothing but the descriptor.
            let number = unsafe { loop_ctl_get_free(control.as_raw_fd()) }?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let mut mode = OpenOptions::new();
            let device = mode.read(true).write(!settings.read_only).open(&path)?;
            // SAFETY: the kernel reads one structure of that layout, which lives across the call.
            match unsafe { loop_configure(device.as_raw_fd(), &raw const config) } {
                Ok(_) => return Ok(Self { path, device }),
                Err(Errno::EBUSY) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(Errno::EBUSY.into())
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has the device go with its last user, of which this value is one.
    ///
    /// # Errors
    /// It has gone already.
    pub fn detach(self) -> io::Result<()> {
        // SAFETY: the ioctl takes nothing but the descriptor.
        unsafe { loop_clr_fd(self.device.as_raw_fd()) }?;
        Ok(())
    }
}

impl LoopSettings<'_> {
    fn config(&self) -> LoopConfig {
        let mut config = LoopConfig::new_zeroed();
        config.fd = u32::try_from(self.file.as_raw_fd()).expect("descriptors are not negative");
        config.block_size = self.block_size;
        // Direct I/O is done without where the block size does not allow it.
        config.info.flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_PARTSCAN | LO_FLAGS_DIRECT_IO;
        if self.read_only {
            config.info.flags |= LO_FLAGS_READ_ONLY;
        }
        // The last byte stays 0.
        let name = self.name.bytes().take(NAME_SIZE - 1);
        for (place, byte) in config.info.file_name.iter_mut().zip(name) {
            *place = byte;
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn structures_have_the_kernel_s_size() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }

    #[test]
    fn long_names_keep_their_end_mark() {
        let file = File::open("/dev/null").expect("it is everywhere");
        let config = LoopSettings {
            file: file.as_fd(),
            read_only: true,
            block_size: 4096,
            name: &"n".repeat(100),
        }
        .config();
        assert_eq!(config.info.file_name[NAME_SIZE - 2..], [b'n', 0]);
        assert_ne!(config.info.flags & LO_FLAGS_READ_ONLY, 0);
    }
}
