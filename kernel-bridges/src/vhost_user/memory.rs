//! The guest's memory as the front end shares it: files mapped here, found by guest addresses for requests and by the front end's
//! own addresses for the parts of rings.
//!
//! The front end may add and take away pieces while rings run. Queues see that before their next request; a request in flight
//! holds what it was given, so that nothing is unmapped under it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use stord_aio::{IoBuffer, IoVec};

use super::dirty_log::{DirtyLog, LocalLog};
use super::message::{FilePart, MemoryRegion, RingAddresses};
use super::ring::RingParts;
use super::session::Refusal;
use crate::virtio::memory::mapping::Mapping;
use crate::virtio::memory::{
    Access, BadRegion, Fault, GuestMap, GuestMemory, LocalMap, Region, Regions,
};

/// A front end may share so many pieces: as many as KVM has slots.
pub(super) const MAX_SLOTS: u64 = 509;

/// What a front end has shared. On the control thread.
#[derive(Default)]
pub(super) struct Memory {
    /// As the front end said it.
    slots: Vec<MemoryRegion>,
    shared: SharedMemory,
}

/// What the queues use of it.
#[derive(Clone, Default)]
pub(super) struct SharedMemory {
    map: Arc<GuestMap>,
    log: Arc<DirtyLog>,
}

impl Memory {
    /// Takes these regions in place of all others.
    ///
    /// # Errors
    /// They overlap, or one of them cannot be mapped. Nothing has changed then.
    pub(super) fn set_table(
        &mut self,
        regions: Vec<(MemoryRegion, OwnedFd)>,
    ) -> Result<(), Refusal> {
        let mut table = Regions::default();
        let mut slots = Vec::new();
        for (region, file) in regions {
            insert(&mut table, &region, &file)?;
            slots.push(region);
        }
        self.slots = slots;
        self.shared.map.change(|regions| *regions = table);
        Ok(())
    }

    /// Adds a region.
    ///
    /// # Errors
    /// As above, or there are too many.
    pub(super) fn add(&mut self, region: MemoryRegion, file: OwnedFd) -> Result<(), Refusal> {
        if self.slots.len() as u64 >= MAX_SLOTS {
            return Err(refused(&region, "there are too many regions"));
        }
        let mut table = self.shared.map.regions();
        insert(&mut table, &region, &file)?;
        self.slots.push(region);
        self.shared.map.change(|regions| *regions = table);
        Ok(())
    }

    /// Takes a region away.
    ///
    /// # Errors
    /// There is none like it.
    pub(super) fn remove(&mut self, region: MemoryRegion) -> Result<(), Refusal> {
        // Where in its file it is, front ends need not say.
        let is_meant = |slot: &MemoryRegion| {
            (slot.guest, slot.size, slot.user) == (region.guest, region.size, region.user)
        };
        let place = self.slots.iter().position(is_meant);
        let place = place.ok_or_else(|| refused(&region, "there is none like it"))?;
        self.slots.swap_remove(place);
        self.shared
            .map
            .change(|regions| regions.remove(region.guest, region.size));
        Ok(())
    }

    /// Takes a file as the log of what is written to the guest's memory.
    ///
    /// # Errors
    /// It cannot be mapped.
    pub(super) fn set_log(&self, part: FilePart, file: OwnedFd) -> Result<(), Refusal> {
        let len = usize::try_from(part.size).map_err(|_| Refusal::Log("it is too long"))?;
        let mapping = Mapping::new(file.as_fd(), part.offset, len, Access::Write);
        let mapping = mapping.map_err(Refusal::system("the log cannot be mapped"))?;
        self.shared.log.set(mapping);
        Ok(())
    }

    /// Whether what is written is logged, if there is a log.
    pub(super) fn log_writes(&self, is_wanted: bool) {
        self.shared.log.switch(is_wanted);
    }

    /// What queues need.
    pub(super) fn shared(&self) -> SharedMemory {
        self.shared.clone()
    }

    /// The parts of a ring by their guest addresses.
    ///
    /// # Errors
    /// One of them is not in the memory.
    pub(super) fn ring_parts(&self, addresses: &RingAddresses) -> Result<RingParts, Refusal> {
        Ok(RingParts {
            descriptors: self.guest_address(addresses.descriptors)?,
            available: self.guest_address(addresses.available)?,
            used: self.guest_address(addresses.used)?,
        })
    }

    fn guest_address(&self, user: u64) -> Result<u64, Refusal> {
        let inside = |slot: &MemoryRegion| {
            let offset = user.checked_sub(slot.user)?;
            (offset < slot.size).then(|| slot.guest + offset)
        };
        let found = self.slots.iter().find_map(inside);
        found.ok_or(Refusal::RingAddress(user))
    }
}

fn refused(region: &MemoryRegion, reason: &'static str) -> Refusal {
    Refusal::Memory {
        guest: region.guest,
        size: region.size,
        reason,
    }
}

fn insert(table: &mut Regions, region: &MemoryRegion, file: &OwnedFd) -> Result<(), Refusal> {
    let too_long = || refused(region, "it is longer than the address space");
    let len = usize::try_from(region.size).map_err(|_| too_long())?;
    for start in [region.guest, region.user] {
        start.checked_add(region.size).ok_or_else(too_long)?;
    }
    let mapping = Mapping::new(file.as_fd(), region.offset, len, Access::Write);
    let mapping = mapping.map_err(Refusal::system("the guest's memory cannot be mapped"))?;
    let inserted = table.insert(Region {
        addr: region.guest,
        len: region.size,
        writable: true,
        mapping,
        offset: 0,
    });
    inserted.map_err(|error| match error {
        BadRegion::Invalid => refused(region, "it is empty, or longer than its file"),
        BadRegion::Overlap => refused(region, "it overlaps another"),
    })
}

impl SharedMemory {
    /// The memory for a queue on the calling thread.
    pub(super) fn local(&self) -> LocalMemory {
        LocalMemory {
            map: self.map.local(),
            log: self.log.local(),
        }
    }
}

/// The guest's memory as one queue sees it, with the log of what is written.
pub(super) struct LocalMemory {
    map: LocalMap,
    log: LocalLog,
}

impl GuestMemory for LocalMemory {
    fn resolve(&self, addr: u64, len: u32, access: Access, out: &mut IoVec) -> Result<(), Fault> {
        self.map.resolve(addr, len, access, out)
    }

    fn contiguous(&self, addr: u64, len: usize, access: Access) -> Result<IoBuffer, Fault> {
        self.map.contiguous(addr, len, access)
    }

    fn generation(&self) -> u64 {
        self.map.generation()
    }

    fn tracks_writes(&self) -> bool {
        self.log.is_on()
    }

    fn note_write(&self, addr: u64, len: u64) {
        self.log.note(addr, len);
    }
}
