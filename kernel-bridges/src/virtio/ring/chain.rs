//! One chain of descriptors as the memory it describes, checked against every rule before anything is done with it.

use smallvec::SmallVec;
use stord_aio::IoVec;

use super::super::memory::{Access, GuestMemory};
use super::Broken;
use super::split::{DESCRIPTOR, Descriptor, SplitRing};

/// The longest chain, tables included, where the queue is shorter. Drivers make chains as long as `seg_max` lets them, however short
/// the queue is (2.7.5.3.1 forbids it).
const LONGEST: u16 = 1024;

/// The memory of a request.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    /// What the device reads.
    pub(crate) readable: IoVec,
    /// What it writes.
    pub(crate) writable: IoVec,
    /// The same in guest addresses, where somebody wants to hear of writes.
    pub(crate) written: SmallVec<[(u64, u32); 2]>,
}

/// A chain that is being read.
struct Walk<'a, M> {
    memory: &'a M,
    chain: Chain,
    /// Descriptors that may follow.
    left: u16,
    /// Bytes that may follow.
    room: u32,
    writing: bool,
}

impl<M: GuestMemory> Walk<'_, M> {
    /// Takes a descriptor of memory.
    #[inline]
    fn add(&mut self, descriptor: Descriptor) -> Result<(), Broken> {
        let Descriptor { addr, len, .. } = descriptor;
        self.count()?;
        if len == 0 {
            return Err(Broken::Empty);
        }
        self.room = self.room.checked_sub(len).ok_or(Broken::Length)?;
        if descriptor.has(Descriptor::WRITE) {
            self.writing = true;
            if self.memory.tracks_writes() {
                self.chain.written.push((addr, len));
            }
            let to = &mut self.chain.writable;
            self.memory.resolve(addr, len, Access::Write, to)?;
        } else if self.writing {
            return Err(Broken::Order);
        } else {
            let to = &mut self.chain.readable;
            self.memory.resolve(addr, len, Access::Read, to)?;
        }
        Ok(())
    }

    fn count(&mut self) -> Result<(), Broken> {
        self.left = self.left.checked_sub(1).ok_or(Broken::Endless)?;
        Ok(())
    }

    /// Takes a table of descriptors. It is copied first, so that it cannot change while it is followed.
    fn add_table(&mut self, descriptor: Descriptor) -> Result<(), Broken> {
        let Descriptor { addr, len, .. } = descriptor;
        let bytes = len as usize;
        let count = bytes / DESCRIPTOR;
        if count == 0 || !bytes.is_multiple_of(DESCRIPTOR) || count > usize::from(self.left) {
            return Err(Broken::Table(len));
        }
        let mut memory = IoVec::new();
        self.memory.resolve(addr, len, Access::Read, &mut memory)?;
        let mut table: SmallVec<[u8; 16 * DESCRIPTOR]> = SmallVec::from_elem(0, bytes);
        memory.read_at(0, &mut table);
        let mut index = 0;
        loop {
            let at = DESCRIPTOR * usize::from(index);
            let descriptor = table
                .get(at..at + DESCRIPTOR)
                .and_then(|bytes| bytes.split_first_chunk::<8>())
                .and_then(|(addr, rest)| Some((addr, rest.first_chunk::<8>()?)))
                .map(|(addr, rest)| {
                    Descriptor::parse(u64::from_le_bytes(*addr), u64::from_le_bytes(*rest))
                })
                .ok_or(Broken::Descriptor(index))?;
            if descriptor.has(Descriptor::INDIRECT) {
                return Err(Broken::Indirect);
            }
            self.add(descriptor)?;
            if !descriptor.has(Descriptor::NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
    }
}

impl SplitRing {
    /// Reads the chain that begins with a descriptor.
    ///
    /// # Errors
    /// It breaks a rule.
    pub(crate) fn chain(&self, head: u16, memory: &impl GuestMemory) -> Result<Chain, Broken> {
        let mut walk = Walk {
            memory,
            chain: Chain::default(),
            left: self.size().max(LONGEST),
            room: u32::MAX,
            writing: false,
        };
        // Of descriptors outside of tables, there are no more than the queue has.
        let mut direct = self.size();
        let mut index = head;
        loop {
            direct = direct.checked_sub(1).ok_or(Broken::Endless)?;
            let descriptor = self.descriptor(index)?;
            if descriptor.has(Descriptor::INDIRECT) {
                // 2.7.5.3.2: after others, but as the last.
                if !self.has_indirect() || descriptor.has(Descriptor::NEXT) {
                    return Err(Broken::Indirect);
                }
                walk.add_table(descriptor)?;
                return Ok(walk.chain);
            }
            walk.add(descriptor)?;
            if !descriptor.has(Descriptor::NEXT) {
                return Ok(walk.chain);
            }
            index = descriptor.next;
        }
    }
}
