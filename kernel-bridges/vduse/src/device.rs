//! /dev/vduse/NAME: one device, which one process at a time can have open.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::errno::Errno;
use zerocopy::{FromZeros, IntoBytes};

use crate::abi::{self, DevRequest, IovaUmem, VqConfig, VqEventfd, VqInfo};
use crate::control::{DeviceName, FEATURE_RING_PACKED};
use crate::iotlb::{IotlbEntry, IovaRegion, UserMemory};
use crate::message::{self, Message, MessageId, QueueState, Response};

/// A device that this process serves.
///
/// Its methods do not block, whatever the driver does; [`read_message`](Self::read_message) gives `None` where it would have to. The descriptor becomes
/// readable when there is a message.
#[derive(Debug)]
pub struct Device {
    file: File,
    name: DeviceName,
}

/// What the driver has made of a virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueInfo {
    /// How many entries it has.
    pub size: u32,
    /// The address of the descriptors.
    pub descriptors: u64,
    /// The address of the driver's area: the available ring of a split queue.
    pub driver_area: u64,
    /// The address of the device's area: the used ring of a split queue.
    pub device_area: u64,
    /// Where the device is to begin.
    pub state: QueueState,
    /// Whether it is set up.
    pub ready: bool,
}

impl Device {
    /// Opens a device: a new one, or one that a process left which is gone. What the kernel asked that process and did not get an answer to
    /// comes again.
    ///
    /// # Errors
    /// `ResourceBusy` while another process has it open; `NotFound` if there is none of that name.
    pub fn open(name: &DeviceName) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(Self::path_of(name))?;
        Ok(Self {
            file,
            name: name.clone(),
        })
    }

    /// Where a device of that name appears.
    pub fn path_of(name: &DeviceName) -> PathBuf {
        PathBuf::from("/dev/vduse").join(name.as_str())
    }

    /// Its name.
    pub fn name(&self) -> &DeviceName {
        &self.name
    }

    /// The features that the driver has chosen of those offered; 0 before it has, and after a reset.
    ///
    /// # Errors
    /// `PermissionDenied` once the kernel has given the device up.
    pub fn features(&self) -> io::Result<u64> {
        Ok(abi::dev_get_features(self.as_fd())?)
    }

    /// Writes bytes of the configuration space. The driver hears of it by [`inject_config_interrupt`](Self::inject_config_interrupt).
    ///
    /// # Errors
    /// `InvalidInput` where they are not inside it, or none.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        Ok(abi::dev_set_config(self.as_fd(), offset, bytes)?)
    }

    /// Tells the driver that the configuration space has changed.
    ///
    /// # Errors
    /// `InvalidInput` if there is no driver that is ready.
    pub fn inject_config_interrupt(&self) -> io::Result<()> {
        Ok(abi::dev_inject_config_irq(self.as_fd())?)
    }

    /// Says how many entries a queue may have. Has to be said of every queue before the device goes on the vdpa bus.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such queue.
    pub fn set_up_queue(&self, index: u32, max_size: u16) -> io::Result<()> {
        let config = VqConfig {
            index,
            max_size,
            reserved: [0; 13],
        };
        Ok(abi::vq_setup(self.as_fd(), &config)?)
    }

    /// What the driver has made of a queue.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such queue.
    pub fn queue_info(&self, index: u32) -> io::Result<QueueInfo> {
        let VqInfo {
            num,
            desc_addr,
            driver_addr,
            device_addr,
            state,
            ready,
            ..
        } = abi::vq_get_info(self.as_fd(), index)?;
        let is_packed = self.features()? & FEATURE_RING_PACKED != 0;
        Ok(QueueInfo {
            size: num,
            descriptors: desc_addr,
            driver_area: driver_addr,
            device_area: device_addr,
            state: QueueState::read(state, is_packed),
            ready: ready != 0,
        })
    }

    /// Says which eventfd the driver's kicks of a queue go to; `None` for nowhere. A kick that went nowhere is told when there is one. A
    /// reset takes it away.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such queue or that is no eventfd.
    pub fn set_kick(&self, index: u32, eventfd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let fd = eventfd.map_or(abi::NO_EVENTFD, |eventfd| eventfd.as_raw_fd());
        Ok(abi::vq_setup_kickfd(
            self.as_fd(),
            &VqEventfd { index, fd },
        )?)
    }

    /// Tells the driver that it finds entries in a queue's used ring.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such queue, or no driver that is ready.
    pub fn inject_interrupt(&self, queue: u32) -> io::Result<()> {
        Ok(abi::vq_inject_irq(self.as_fd(), queue)?)
    }

    /// The next question of the kernel, or `None` if there is none at present.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read_message(&self) -> io::Result<Option<Message>> {
        let mut request = DevRequest::new_zeroed();
        match (&self.file).read(request.as_mut_bytes()) {
            Ok(length) if length == size_of::<DevRequest>() => Ok(Some(Message::decode(&request))),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Answers a question.
    ///
    /// # Errors
    /// `NotFound` if the kernel does not wait for it any more.
    pub fn respond(&self, id: MessageId, response: Response) -> io::Result<()> {
        (&self.file).write_all(message::encode(id, response).as_bytes())
    }

    /// Finds the first piece of memory with addresses from `start` to `last`, and gives all of that piece. The kernel does not say
    /// beforehand what pieces there are.
    ///
    /// # Errors
    /// `InvalidInput` if nothing is there.
    pub fn iotlb(&self, start: u64, last: u64) -> io::Result<IotlbEntry> {
        let (fd, entry) = abi::iotlb_get_fd(self.as_fd(), start, last)?;
        IotlbEntry::new(fd, &entry)
    }

    /// The same without a descriptor: where the piece begins and ends, and what can be done with it.
    ///
    /// # Errors
    /// `InvalidInput` if nothing is there; `ENOTTY` on kernels before 6.0.
    pub fn iotlb_region(&self, start: u64, last: u64) -> io::Result<IovaRegion> {
        let info = abi::iotlb_get_info(self.as_fd(), start, last)?;
        Ok(IovaRegion {
            start: info.start,
            last: info.last,
            takes_user_memory: info.capability & abi::CAP_UMEM != 0,
        })
    }

    /// Has the kernel pass the driver's data through memory of this process, in place of its own. `memory` must be as long as the region
    /// that [takes it](IovaRegion::takes_user_memory); its pages are pinned, and count against `RLIMIT_MEMLOCK`. They are returned by
    /// [`deregister_memory`](Self::deregister_memory) or when the device is closed.
    ///
    /// # Errors
    /// `AlreadyExists` if there is some; `InvalidInput` where it does not fit; `ENOTTY` on kernels before 6.0.
    pub fn register_memory(&self, iova: u64, memory: &UserMemory) -> io::Result<()> {
        let umem = IovaUmem {
            uaddr: memory.address(),
            iova,
            size: memory.len(),
            reserved: [0; 3],
        };
        Ok(abi::iotlb_reg_umem(self.as_fd(), &umem)?)
    }

    /// Has the kernel use its own memory again.
    ///
    /// # Errors
    /// `NotFound` if none is registered; `InvalidInput` where it is another region.
    pub fn deregister_memory(&self, iova: u64, size: u64) -> io::Result<()> {
        let umem = IovaUmem {
            uaddr: 0,
            iova,
            size,
            reserved: [0; 3],
        };
        Ok(abi::iotlb_dereg_umem(self.as_fd(), &umem)?)
    }

    /// Says how many seconds the kernel waits for an answer before it gives the device up; 0 is for ever.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_message_timeout(&self, seconds: u32) -> io::Result<()> {
        let path = format!("/sys/class/vduse/{}/msg_timeout", self.name);
        std::fs::write(path, seconds.to_string())
    }

    /// Whether the kernel has given the device up because a message was not answered in time. It is of no use then, and can only be
    /// taken off the vdpa bus and removed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_broken(&self) -> io::Result<bool> {
        match abi::dev_get_features(self.as_fd()) {
            Ok(_) => Ok(false),
            Err(Errno::EPERM) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}
