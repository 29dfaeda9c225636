//! Guest addresses as memory of this process.
//!
//! Whatever a driver names is looked up here, with its length and with what is to be done to it; nothing else makes memory out of a
//! guest address. What is handed out stays mapped as long as somebody uses it, even when the guest has taken it away meanwhile.

pub(crate) mod mapping;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use stord_aio::{IoBuffer, IoVec};

use self::mapping::Mapping;

/// What is to be done to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// The device reads it.
    Read,
    /// The device writes it.
    Write,
}

/// Memory that the driver named is not there, or may not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at guest address {addr:#x} cannot be reached for a {access:?}")]
pub(crate) struct Fault {
    /// The first byte of what was asked for.
    pub(crate) addr: u64,
    /// The number of bytes that were asked for.
    pub(crate) len: u64,
    /// What was to be done.
    pub(crate) access: Access,
}

/// The memory of a guest, as one queue sees it. Lives on the queue's context.
pub(crate) trait GuestMemory: 'static {
    /// Appends the memory behind `len` bytes from `addr` on to `out`, in one piece or several.
    ///
    /// # Errors
    /// A byte is not there, or may not be written; `out` may have got a part.
    fn resolve(&self, addr: u64, len: u32, access: Access, out: &mut IoVec) -> Result<(), Fault>;

    /// The memory behind a part of a ring, in one piece.
    ///
    /// # Errors
    /// As above, or it is in pieces.
    fn contiguous(&self, addr: u64, len: usize, access: Access) -> Result<IoBuffer, Fault>;

    /// Changes whenever what [`contiguous`](Self::contiguous) gave before may not be the guest's memory any more.
    fn generation(&self) -> u64 {
        0
    }

    /// Whether somebody wants to hear of memory that was written to.
    fn tracks_writes(&self) -> bool {
        false
    }

    /// Notes that `len` bytes from `addr` on were written to, for the migration of a guest.
    fn note_write(&self, addr: u64, len: u64) {
        let _ = (addr, len);
    }
}

/// A piece of the guest's memory.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    /// The guest address of its first byte.
    pub(crate) addr: u64,
    /// The number of bytes, not zero.
    pub(crate) len: u64,
    /// Whether the device may write to it.
    pub(crate) writable: bool,
    /// Where it is, from `offset` bytes on.
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) offset: usize,
}

impl Region {
    fn last(&self) -> u64 {
        self.addr + (self.len - 1)
    }

    /// Whether the addresses do not wrap and the mapping has the bytes.
    fn is_valid(&self) -> bool {
        let bytes = usize::try_from(self.len).ok();
        let end = bytes.and_then(|bytes| self.offset.checked_add(bytes));
        self.len > 0
            && self.addr.checked_add(self.len - 1).is_some()
            && end.is_some_and(|end| end <= self.mapping.len())
    }
}

/// Why a region was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadRegion {
    /// It is empty, goes past the last address, or past the end of its mapping.
    #[error("a memory region that is no range of addresses, or longer than what is behind it")]
    Invalid,
    /// It shares addresses with another.
    #[error("a memory region that overlaps another")]
    Overlap,
}

/// The pieces of a guest's memory, in the order of their addresses, none overlapping.
#[derive(Clone, Debug, Default)]
pub(crate) struct Regions(Vec<Region>);

impl Regions {
    /// Adds a region.
    ///
    /// # Errors
    /// It makes no sense, or is there already.
    pub(crate) fn insert(&mut self, region: Region) -> Result<(), BadRegion> {
        if !region.is_valid() {
            return Err(BadRegion::Invalid);
        }
        let place = self.0.partition_point(|held| held.addr < region.addr);
        let before = place.checked_sub(1).and_then(|place| self.0.get(place));
        let overlaps = before.is_some_and(|before| before.last() >= region.addr)
            || self
                .0
                .get(place)
                .is_some_and(|after| after.addr <= region.last());
        if overlaps {
            return Err(BadRegion::Overlap);
        }
        self.0.insert(place, region);
        Ok(())
    }

    /// Takes away every region that has an address among the `len` from `addr` on. Gives their number.
    pub(crate) fn remove(&mut self, addr: u64, len: u64) -> usize {
        let Some(last) = len.checked_sub(1).map(|more| addr.saturating_add(more)) else {
            return 0;
        };
        let before = self.0.len();
        self.0
            .retain(|region| region.last() < addr || region.addr > last);
        before - self.0.len()
    }

    /// The region that an address is in.
    pub(crate) fn find(&self, addr: u64) -> Option<&Region> {
        let place = self.0.partition_point(|region| region.last() < addr);
        self.0.get(place).filter(|region| region.addr <= addr)
    }

    /// The regions, in the order of their addresses.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Region> {
        self.0.iter()
    }
}

/// A guest's memory as the transport knows it: it makes changes, and the queues on their contexts see them before their next request.
#[derive(Debug, Default)]
pub(crate) struct GuestMap {
    regions: Mutex<Regions>,
    generation: AtomicU64,
}

impl GuestMap {
    /// A map without memory.
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Changes the regions.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Regions) -> T) -> T {
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut regions);
        // Under the lock, so that who sees a generation sees its regions.
        self.generation.fetch_add(1, Ordering::Release);
        result
    }

    /// The regions as they are now.
    pub(crate) fn regions(&self) -> Regions {
        let regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        regions.clone()
    }

    /// A view for the calling thread, which follows changes.
    pub(crate) fn local(self: &Arc<Self>) -> LocalMap {
        let map = LocalMap {
            map: Arc::clone(self),
            view: RefCell::default(),
            generation: Cell::new(0),
            latest: Cell::new(0),
        };
        map.load();
        map
    }
}

/// A guest's memory as one thread uses it.
pub(crate) struct LocalMap {
    map: Arc<GuestMap>,
    view: RefCell<Vec<LocalRegion>>,
    generation: Cell<u64>,
    /// Where the last address was found.
    latest: Cell<usize>,
}

/// A region with its memory ready to be handed out.
struct LocalRegion {
    addr: u64,
    writable: bool,
    memory: IoBuffer,
}

impl LocalRegion {
    /// How far into the region an address is.
    fn offset(&self, addr: u64) -> Option<usize> {
        let offset = usize::try_from(addr.checked_sub(self.addr)?).ok()?;
        (offset < self.memory.len()).then_some(offset)
    }
}

impl LocalMap {
    /// Follows changes of the map.
    #[inline]
    fn refresh(&self) {
        if self.map.generation.load(Ordering::Acquire) != self.generation.get() {
            self.load();
        }
    }

    fn load(&self) {
        let (regions, generation) = {
            let regions = self
                .map
                .regions
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            (regions.clone(), self.map.generation.load(Ordering::Relaxed))
        };
        let local = |region: &Region| {
            let len = usize::try_from(region.len).expect("a region is inside its mapping");
            LocalRegion {
                addr: region.addr,
                writable: region.writable,
                memory: region
                    .mapping
                    .buffer()
                    .slice(region.offset..region.offset + len),
            }
        };
        let view = regions.iter().map(local).collect();
        drop(self.view.replace(view));
        self.generation.set(generation);
        self.latest.set(0);
    }

    /// The memory from an address on to the end of its region, at most `most` bytes, which are not zero.
    fn piece(&self, addr: u64, most: usize, access: Access) -> Option<IoBuffer> {
        let view = self.view.borrow();
        let latest = view.get(self.latest.get());
        let region = match latest.filter(|region| region.offset(addr).is_some()) {
            Some(region) => region,
            None => {
                let after = view.partition_point(|region| region.addr <= addr);
                let place = after.checked_sub(1)?;
                self.latest.set(place);
                view.get(place)?
            }
        };
        if access == Access::Write && !region.writable {
            return None;
        }
        let offset = region.offset(addr)?;
        let len = most.min(region.memory.len() - offset);
        Some(region.memory.slice(offset..offset + len))
    }
}

impl GuestMemory for LocalMap {
    fn resolve(&self, addr: u64, len: u32, access: Access, out: &mut IoVec) -> Result<(), Fault> {
        self.refresh();
        let fault = Fault {
            addr,
            len: len.into(),
            access,
        };
        let mut left = len as usize;
        let mut addr = addr;
        while left > 0 {
            let piece = self.piece(addr, left, access).ok_or(fault)?;
            left -= piece.len();
            let next = addr.checked_add(piece.len() as u64);
            out.push(piece);
            match next {
                Some(next) => addr = next,
                None if left == 0 => {}
                None => return Err(fault),
            }
        }
        Ok(())
    }

    fn contiguous(&self, addr: u64, len: usize, access: Access) -> Result<IoBuffer, Fault> {
        self.refresh();
        self.piece(addr, len, access)
            .filter(|piece| piece.len() == len)
            .ok_or(Fault {
                addr,
                len: len as u64,
                access,
            })
    }

    fn generation(&self) -> u64 {
        self.map.generation.load(Ordering::Acquire)
    }
}
