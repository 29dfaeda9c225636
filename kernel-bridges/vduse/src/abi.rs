//! The structures and ioctl(2)s of linux/vduse.h, version 0 of its interface.

// UNSAFETY: ioctl(2) on descriptors of /dev/vduse with pointers to the structures that the header names for each.
#![expect(unsafe_code, reason = "ioctls have no safe binding")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Room for a device's name and the zero byte after it.
pub(crate) const NAME_MAX: usize = 256;

/// `struct vduse_dev_config`, up to the configuration space that follows it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DevConfig {
    pub(crate) name: [u8; NAME_MAX],
    pub(crate) vendor_id: u32,
    pub(crate) device_id: u32,
    pub(crate) features: u64,
    pub(crate) vq_num: u32,
    pub(crate) vq_align: u32,
    pub(crate) reserved: [u32; 13],
    pub(crate) config_size: u32,
}

/// `struct vduse_iotlb_entry`.
#[derive(Clone, Copy, Debug, FromZeros, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IotlbEntry {
    pub(crate) offset: u64,
    pub(crate) start: u64,
    pub(crate) last: u64,
    pub(crate) perm: u8,
    pub(crate) padding: [u8; 7],
}

/// `struct vduse_config_data`, up to the bytes that follow it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigData {
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

/// `struct vduse_vq_config`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct VqConfig {
    pub(crate) index: u32,
    pub(crate) max_size: u16,
    pub(crate) reserved: [u16; 13],
}

/// `struct vduse_vq_info`; the state is the union of the split and the packed one.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct VqInfo {
    pub(crate) index: u32,
    pub(crate) num: u32,
    pub(crate) desc_addr: u64,
    pub(crate) driver_addr: u64,
    pub(crate) device_addr: u64,
    pub(crate) state: [u16; 4],
    pub(crate) ready: u8,
    pub(crate) padding: [u8; 7],
}

/// `struct vduse_vq_eventfd`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct VqEventfd {
    pub(crate) index: u32,
    pub(crate) fd: i32,
}

/// `struct vduse_iova_umem`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct IovaUmem {
    pub(crate) uaddr: u64,
    pub(crate) iova: u64,
    pub(crate) size: u64,
    pub(crate) reserved: [u64; 3],
}

/// `struct vduse_iova_info`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct IovaInfo {
    pub(crate) start: u64,
    pub(crate) last: u64,
    pub(crate) capability: u64,
    pub(crate) reserved: [u64; 3],
}

/// `VDUSE_IOVA_CAP_UMEM`.
pub(crate) const CAP_UMEM: u64 = 1;
/// `VDUSE_EVENTFD_DEASSIGN`.
pub(crate) const NO_EVENTFD: i32 = -1;

/// `struct vduse_dev_request`; the payload is the union of those of all types.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DevRequest {
    pub(crate) kind: u32,
    pub(crate) request_id: u32,
    pub(crate) reserved: [u32; 4],
    pub(crate) payload: [u8; 128],
}

/// `struct vduse_dev_response`, likewise.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DevResponse {
    pub(crate) request_id: u32,
    pub(crate) result: u32,
    pub(crate) reserved: [u32; 4],
    pub(crate) payload: [u8; 128],
}

const BASE: u8 = 0x81;

nix::ioctl_read!(vduse_get_api_version, BASE, 0x00, u64);
nix::ioctl_write_ptr!(vduse_set_api_version, BASE, 0x01, u64);
nix::ioctl_write_ptr!(vduse_create_dev, BASE, 0x02, DevConfig);
nix::ioctl_write_ptr!(vduse_destroy_dev, BASE, 0x03, [u8; NAME_MAX]);
nix::ioctl_readwrite!(vduse_iotlb_get_fd, BASE, 0x10, IotlbEntry);
nix::ioctl_read!(vduse_dev_get_features, BASE, 0x11, u64);
nix::ioctl_write_ptr!(vduse_dev_set_config, BASE, 0x12, ConfigData);
nix::ioctl_none!(vduse_dev_inject_config_irq, BASE, 0x13);
nix::ioctl_write_ptr!(vduse_vq_setup, BASE, 0x14, VqConfig);
nix::ioctl_readwrite!(vduse_vq_get_info, BASE, 0x15, VqInfo);
nix::ioctl_write_ptr!(vduse_vq_setup_kickfd, BASE, 0x16, VqEventfd);
nix::ioctl_write_ptr!(vduse_vq_inject_irq, BASE, 0x17, u32);
nix::ioctl_write_ptr!(vduse_iotlb_reg_umem, BASE, 0x18, IovaUmem);
nix::ioctl_write_ptr!(vduse_iotlb_dereg_umem, BASE, 0x19, IovaUmem);
nix::ioctl_readwrite!(vduse_iotlb_get_info, BASE, 0x1a, IovaInfo);

type Fd<'a> = BorrowedFd<'a>;

pub(crate) fn get_api_version(control: Fd<'_>) -> Result<u64, Errno> {
    let mut version = 0;
    // SAFETY: writes one u64, which lives across the call.
    unsafe { vduse_get_api_version(control.as_raw_fd(), &raw mut version) }?;
    Ok(version)
}

pub(crate) fn set_api_version(control: Fd<'_>, version: u64) -> Result<(), Errno> {
    // SAFETY: reads one u64, which lives across the call.
    unsafe { vduse_set_api_version(control.as_raw_fd(), &raw const version) }.map(drop)
}

pub(crate) fn create_dev(control: Fd<'_>, head: &DevConfig, config: &[u8]) -> Result<(), Errno> {
    let length = u32::try_from(config.len()).map_err(|_| Errno::E2BIG)?;
    let head = DevConfig {
        config_size: length,
        ..*head
    };
    let message = aligned(head.as_bytes(), config);
    // SAFETY: reads the structure and `config_size` bytes behind it; all of that is in `message`, which is aligned for it.
    unsafe { vduse_create_dev(control.as_raw_fd(), message.as_ptr().cast()) }.map(drop)
}

pub(crate) fn destroy_dev(control: Fd<'_>, name: &[u8; NAME_MAX]) -> Result<(), Errno> {
    // SAFETY: reads the name, which lives across the call.
    unsafe { vduse_destroy_dev(control.as_raw_fd(), name) }.map(drop)
}

pub(crate) fn iotlb_get_fd(
    device: Fd<'_>,
    start: u64,
    last: u64,
) -> Result<(OwnedFd, IotlbEntry), Errno> {
    let mut entry = IotlbEntry {
        start,
        last,
        ..IotlbEntry::new_zeroed()
    };
    // SAFETY: reads and writes the structure, which lives across the call.
    let fd = unsafe { vduse_iotlb_get_fd(device.as_raw_fd(), &raw mut entry) }?;
    // SAFETY: the kernel has just made this descriptor for this caller.
    Ok((unsafe { OwnedFd::from_raw_fd(fd) }, entry))
}

pub(crate) fn dev_get_features(device: Fd<'_>) -> Result<u64, Errno> {
    let mut features = 0;
    // SAFETY: writes one u64, which lives across the call.
    unsafe { vduse_dev_get_features(device.as_raw_fd(), &raw mut features) }?;
    Ok(features)
}

pub(crate) fn dev_set_config(device: Fd<'_>, offset: u32, bytes: &[u8]) -> Result<(), Errno> {
    let length = u32::try_from(bytes.len()).map_err(|_| Errno::E2BIG)?;
    let message = aligned(ConfigData { offset, length }.as_bytes(), bytes);
    // SAFETY: reads the structure and `length` bytes behind it; all of that is in `message`, which is aligned for it.
    unsafe { vduse_dev_set_config(device.as_raw_fd(), message.as_ptr().cast()) }.map(drop)
}

pub(crate) fn dev_inject_config_irq(device: Fd<'_>) -> Result<(), Errno> {
    // SAFETY: passes no pointer.
    unsafe { vduse_dev_inject_config_irq(device.as_raw_fd()) }.map(drop)
}

pub(crate) fn vq_setup(device: Fd<'_>, config: &VqConfig) -> Result<(), Errno> {
    // SAFETY: reads the structure, which lives across the call.
    unsafe { vduse_vq_setup(device.as_raw_fd(), config) }.map(drop)
}

pub(crate) fn vq_get_info(device: Fd<'_>, index: u32) -> Result<VqInfo, Errno> {
    let mut info = VqInfo {
        index,
        ..VqInfo::default()
    };
    // SAFETY: reads and writes the structure, which lives across the call.
    unsafe { vduse_vq_get_info(device.as_raw_fd(), &raw mut info) }?;
    Ok(info)
}

pub(crate) fn vq_setup_kickfd(device: Fd<'_>, eventfd: &VqEventfd) -> Result<(), Errno> {
    // SAFETY: reads the structure, which lives across the call.
    unsafe { vduse_vq_setup_kickfd(device.as_raw_fd(), eventfd) }.map(drop)
}

pub(crate) fn vq_inject_irq(device: Fd<'_>, index: u32) -> Result<(), Errno> {
    // SAFETY: reads one u32, which lives across the call.
    unsafe { vduse_vq_inject_irq(device.as_raw_fd(), &raw const index) }.map(drop)
}

/// The kernel pins the pages, so they stay even where the mapping goes.
pub(crate) fn iotlb_reg_umem(device: Fd<'_>, umem: &IovaUmem) -> Result<(), Errno> {
    // SAFETY: reads the structure, which lives across the call. What the kernel writes into the pages it pins is
    // the business of their owner, who gives them as `UserMemory`, to which there are no references.
    unsafe { vduse_iotlb_reg_umem(device.as_raw_fd(), umem) }.map(drop)
}

pub(crate) fn iotlb_dereg_umem(device: Fd<'_>, umem: &IovaUmem) -> Result<(), Errno> {
    // SAFETY: reads the structure, which lives across the call.
    unsafe { vduse_iotlb_dereg_umem(device.as_raw_fd(), umem) }.map(drop)
}

pub(crate) fn iotlb_get_info(device: Fd<'_>, start: u64, last: u64) -> Result<IovaInfo, Errno> {
    let mut info = IovaInfo {
        start,
        last,
        ..IovaInfo::default()
    };
    // SAFETY: reads and writes the structure, which lives across the call.
    unsafe { vduse_iotlb_get_info(device.as_raw_fd(), &raw mut info) }?;
    Ok(info)
}

/// A structure and what follows it, at an address that suits any structure here.
fn aligned(head: &[u8], tail: &[u8]) -> Vec<u64> {
    let mut words = vec![0u64; (head.len() + tail.len()).div_ceil(size_of::<u64>())];
    let bytes = words.as_mut_slice().as_mut_bytes();
    let (front, rest) = bytes.split_at_mut(head.len());
    front.copy_from_slice(head);
    rest[..tail.len()].copy_from_slice(tail);
    words
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// The figures are those that a C compiler gives for linux/vduse.h.
    #[test]
    fn structures_are_laid_out_as_in_the_header() {
        assert_eq!(size_of::<DevConfig>(), 336);
        assert_eq!(offset_of!(DevConfig, device_id), 260);
        assert_eq!(offset_of!(DevConfig, features), 264);
        assert_eq!(offset_of!(DevConfig, vq_num), 272);
        assert_eq!(offset_of!(DevConfig, config_size), 332);
        assert_eq!(size_of::<IotlbEntry>(), 32);
        assert_eq!(offset_of!(IotlbEntry, perm), 24);
        assert_eq!(size_of::<ConfigData>(), 8);
        assert_eq!(size_of::<VqConfig>(), 32);
        assert_eq!(size_of::<VqInfo>(), 48);
        assert_eq!(offset_of!(VqInfo, state), 32);
        assert_eq!(offset_of!(VqInfo, ready), 40);
        assert_eq!(size_of::<VqEventfd>(), 8);
        assert_eq!(size_of::<IovaUmem>(), 48);
        assert_eq!(size_of::<IovaInfo>(), 48);
        assert_eq!(size_of::<DevRequest>(), 152);
        assert_eq!(offset_of!(DevRequest, payload), 24);
        assert_eq!(size_of::<DevResponse>(), 152);
        assert_eq!(offset_of!(DevResponse, payload), 24);
    }

    #[test]
    fn what_follows_a_structure_is_directly_behind_it() {
        let head = ConfigData {
            offset: 1,
            length: 3,
        };
        let message = aligned(head.as_bytes(), b"abc");
        assert_eq!(message.as_bytes().len(), 16);
        assert_eq!(&message.as_bytes()[8..11], b"abc");
    }
}
