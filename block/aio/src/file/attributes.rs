//! Attributes of files that a file system may or may not have.

// UNSAFETY: ioctl(2) has no safe form.
#![expect(unsafe_code, reason = "ioctl")]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// FS_NOCOW_FL of linux/fs.h.
const NOCOW: libc::c_long = 0x0080_0000;
/// FS_XFLAG_EXTSIZE of linux/fs.h.
const HAS_EXTENT_SIZE: u32 = 0x0000_0800;

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ExtendedAttributes {
    flags: u32,
    extent_size: u32,
    extent_count: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

mod ioctl {
    use super::ExtendedAttributes;

    nix::ioctl_read!(get_flags, b'f', 1, libc::c_long);
    nix::ioctl_write_ptr!(set_flags, b'f', 2, libc::c_long);
    nix::ioctl_read!(get_extended, b'X', 31, ExtendedAttributes);
    nix::ioctl_write_ptr!(set_extended, b'X', 32, ExtendedAttributes);
}

/// Turns copy on write off for a file that is still empty.
///
/// # Errors
///
/// ENOTTY or ENOTSUP where the file system has no such thing.
pub fn disable_copy_on_write(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut flags: libc::c_long = 0;
    // SAFETY: the kernel writes one long, or with the same number on some file systems an int,
    // into one long.
    unsafe { ioctl::get_flags(fd.as_raw_fd(), &raw mut flags)? };
    flags |= NOCOW;
    // SAFETY: the kernel reads one long.
    unsafe { ioctl::set_flags(fd.as_raw_fd(), &raw const flags)? };
    Ok(())
}

/// Asks the file system to allocate in extents of so many bytes.
///
/// # Errors
///
/// ENOTTY or ENOTSUP where the file system has no such thing.
pub fn set_extent_size_hint(fd: BorrowedFd<'_>, bytes: u32) -> Result<(), Errno> {
    let mut attributes = ExtendedAttributes::default();
    // SAFETY: the kernel writes one structure of this layout.
    unsafe { ioctl::get_extended(fd.as_raw_fd(), &raw mut attributes)? };
    attributes.flags |= HAS_EXTENT_SIZE;
    attributes.extent_size = bytes;
    // SAFETY: the kernel reads one structure of this layout.
    unsafe { ioctl::set_extended(fd.as_raw_fd(), &raw const attributes)? };
    Ok(())
}
