//! The ioctl(2)s that tools send to find out what a disk is like.
//!
//! Over FUSE only those can be answered whose number says how many bytes they return: `BLKGETSIZE64` and `BLKBSZGET`. `BLKSSZGET`,
//! `BLKROGET` and the like do not say, and the kernel then has no place to put an answer.

use stord_aio::Errno;

use super::abi::{IoctlOut, IoctlOutNumber, IoctlOutSize};
use super::disk_file::{BLOCK_SIZE, DiskFile};
use super::request::Reply;

// linux/fs.h
const BLKBSZGET: u64 = nix::request_code_read!(0x12, 112, size_of::<usize>());
const BLKGETSIZE64: u64 = nix::request_code_read!(0x12, 114, size_of::<usize>());

impl DiskFile {
    pub(super) fn ioctl(&self, command: u32) -> Result<Reply, Errno> {
        match u64::from(command) {
            BLKGETSIZE64 => Ok(Reply::of(&IoctlOutSize {
                out: IoctlOut::default(),
                value: self.backend.size(),
            })),
            // Its number promises eight bytes, but it returns an int.
            BLKBSZGET => Ok(Reply::of(&IoctlOutNumber {
                out: IoctlOut::default(),
                value: self.backend.alignment().max(BLOCK_SIZE),
            })),
            _ => Err(Errno::ENOTTY),
        }
    }
}
