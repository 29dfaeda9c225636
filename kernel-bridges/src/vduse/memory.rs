//! The driver's memory. The kernel does not say what there is of it: addresses are looked up when they are first used.
//!
//! What was looked up before the kernel said that addresses are void is never taken for what is there afterwards, even where the two
//! cross.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use std::os::fd::AsFd;

use stord_aio::{Errno, IoBuffer, IoVec};
use vduse::{Device, IotlbEntry};

use crate::virtio::memory::mapping::Mapping;
use crate::virtio::memory::{Access, Fault, GuestMap, GuestMemory, LocalMap, Region};

/// What is known of the driver's memory, by all queues together.
pub(super) struct DriverMemory {
    device: Arc<Device>,
    map: Arc<GuestMap>,
    /// Changes when addresses become void.
    epoch: AtomicU64,
}

impl DriverMemory {
    pub(super) fn new(device: Arc<Device>) -> Arc<Self> {
        Arc::new(Self {
            device,
            map: GuestMap::new(),
            epoch: AtomicU64::new(0),
        })
    }

    /// Forgets everything. Memory that is in use stays mapped until it is not.
    pub(super) fn forget(&self) {
        self.map.change(|regions| {
            self.epoch.fetch_add(1, Ordering::AcqRel);
            regions.remove(0, u64::MAX);
            // The last address of all is not among so many.
            regions.remove(u64::MAX, 1);
        });
    }

    /// A view for the calling thread.
    pub(super) fn local(self: &Arc<Self>) -> LocalMemory {
        LocalMemory {
            map: self.map.local(),
            memory: Arc::clone(self),
        }
    }

    /// Looks up what is not known of `len` bytes from `addr` on. False if something is not there.
    fn look_up(&self, addr: u64, len: u64) -> bool {
        let Some(last) = len.checked_sub(1).and_then(|more| addr.checked_add(more)) else {
            return false;
        };
        let mut next = addr;
        loop {
            let epoch = self.epoch.load(Ordering::Acquire);
            let known = self
                .map
                .regions()
                .find(next)
                .map(|region| region.addr + (region.len - 1));
            let end = match known {
                Some(end) => end,
                None => match self.device.iotlb(next, last) {
                    Ok(entry) if entry.start <= next => {
                        let end = entry.last;
                        let Ok(region) = region(&entry) else {
                            return false;
                        };
                        let is_current = self.map.change(|regions| {
                            // Another queue may have been faster.
                            self.epoch.load(Ordering::Acquire) == epoch
                                && (regions.insert(region).is_ok() || regions.find(next).is_some())
                        });
                        if !is_current {
                            if self.epoch.load(Ordering::Acquire) == epoch {
                                return false;
                            }
                            continue;
                        }
                        end
                    }
                    _ => return false,
                },
            };
            if end >= last {
                return true;
            }
            next = end + 1;
        }
    }
}

fn region(entry: &IotlbEntry) -> Result<Region, Errno> {
    let len = entry.len().ok_or(Errno::EFBIG)?;
    let writable = entry.access.is_writable();
    let access = if writable {
        Access::Write
    } else {
        Access::Read
    };
    Ok(Region {
        addr: entry.start,
        len: u64::try_from(len).map_err(|_| Errno::EFBIG)?,
        writable,
        mapping: Mapping::new(entry.file.as_fd(), entry.offset, len, access)?,
        offset: 0,
    })
}

/// The driver's memory as one queue sees it.
pub(super) struct LocalMemory {
    memory: Arc<DriverMemory>,
    map: LocalMap,
}

impl GuestMemory for LocalMemory {
    fn resolve(&self, addr: u64, len: u32, access: Access, out: &mut IoVec) -> Result<(), Fault> {
        let before = out.len();
        let Err(fault) = self.map.resolve(addr, len, access, out) else {
            return Ok(());
        };
        if !self.memory.look_up(addr, len.into()) {
            return Err(fault);
        }
        // A part may have been found.
        *out = out.slice(0..before);
        self.map.resolve(addr, len, access, out)
    }

    fn contiguous(&self, addr: u64, len: usize, access: Access) -> Result<IoBuffer, Fault> {
        let found = self.map.contiguous(addr, len, access);
        match found {
            Err(fault) if self.memory.look_up(addr, fault.len) => {
                self.map.contiguous(addr, len, access)
            }
            found => found,
        }
    }

    fn generation(&self) -> u64 {
        self.map.generation()
    }
}
