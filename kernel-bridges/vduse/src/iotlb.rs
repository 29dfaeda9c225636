//! The driver's memory: pieces of it as the kernel describes them, and mapped into this process.

// UNSAFETY: copies between slices and mapped memory through raw pointers, since the driver changes that memory at any time.
#![expect(
    unsafe_code,
    reason = "no references may be made to memory that others write"
)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU16, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use crate::abi;

/// What the device may do with a piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Write it.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    /// Whether it may be written.
    pub fn is_writable(self) -> bool {
        self != Self::Read
    }
}

/// A piece of the driver's memory.
#[derive(Debug)]
pub struct IotlbEntry {
    /// The file that it is part of.
    pub file: File,
    /// Where in the file.
    pub offset: u64,
    /// Its first address.
    pub start: u64,
    /// Its last address.
    pub last: u64,
    /// What the device may do.
    pub access: Access,
}

/// A piece of the driver's memory, described.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaRegion {
    /// Its first address.
    pub start: u64,
    /// Its last address.
    pub last: u64,
    /// Whether [`Device::register_memory`](crate::Device::register_memory) can replace what is behind it.
    pub takes_user_memory: bool,
}

impl IotlbEntry {
    pub(crate) fn new(file: OwnedFd, entry: &abi::IotlbEntry) -> io::Result<Self> {
        let access = match entry.perm {
            1 => Access::Read,
            2 => Access::Write,
            3 => Access::ReadWrite,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        Ok(Self {
            file: file.into(),
            offset: entry.offset,
            start: entry.start,
            last: entry.last,
            access,
        })
    }

    /// How many bytes it has; `None` if that is more than a process can address.
    pub fn len(&self) -> Option<usize> {
        let length = self.last.checked_sub(self.start)?.checked_add(1)?;
        usize::try_from(length).ok()
    }

    /// Never: a piece has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Maps all of it.
    ///
    /// # Errors
    /// `InvalidData` if it is too long; otherwise as mmap(2).
    pub fn map(&self) -> io::Result<Mapping> {
        let length = self.len().ok_or(io::ErrorKind::InvalidData)?;
        let mut options = MmapOptions::new();
        options.offset(self.offset).len(length);
        let memory = match self.access {
            Access::Read => options.map_raw_read_only(&self.file)?,
            Access::Write | Access::ReadWrite => options.map_raw(&self.file)?,
        };
        Ok(Mapping {
            memory,
            start: self.start,
            last: self.last,
            access: self.access,
        })
    }
}

/// A piece of the driver's memory, mapped into this process until dropped.
///
/// The driver may change it at any time: bytes read twice may differ. Nothing here makes references to it.
#[derive(Debug)]
pub struct Mapping {
    memory: MmapRaw,
    start: u64,
    last: u64,
    access: Access,
}

impl Mapping {
    /// Whether all `len` bytes from `address` on are in this piece.
    pub fn contains(&self, address: u64, len: usize) -> bool {
        self.offset(address, len).is_some()
    }

    /// What the device may do with it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Where in this process the `len` bytes from `address` on are, or `None` if they are not all in this piece. Whoever writes there has
    /// to ask [`access`](Self::access) first.
    pub fn pointer(&self, address: u64, len: usize) -> Option<*mut u8> {
        let offset = self.offset(address, len)?;
        Some(self.memory.as_mut_ptr().wrapping_add(offset))
    }

    fn offset(&self, address: u64, len: usize) -> Option<usize> {
        let last = address.checked_add(u64::try_from(len.max(1)).ok()? - 1)?;
        if address < self.start || last > self.last {
            return None;
        }
        usize::try_from(address - self.start).ok()
    }

    /// Copies from the memory. False if it is not all in this piece.
    #[must_use]
    pub fn read(&self, address: u64, into: &mut [u8]) -> bool {
        let Some(from) = self.pointer(address, into.len()) else {
            return false;
        };
        // SAFETY: `pointer` has checked that all of it is inside the mapping, which lives as long as `self`; the destination is not.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        true
    }

    /// Copies into the memory. False if it is not all in this piece, or may not be written.
    #[must_use]
    pub fn write(&self, address: u64, from: &[u8]) -> bool {
        let Some(into) = self.pointer(address, from.len()) else {
            return false;
        };
        if !self.access.is_writable() {
            return false;
        }
        // SAFETY: as above, and the mapping is a writable one.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
        true
    }

    /// A number that the driver stores, read before everything that is read after it. `None` if it is not in this piece or not
    /// aligned.
    pub fn load_u16(&self, address: u64) -> Option<u16> {
        let word = self.atomic(address)?;
        Some(u16::from_le(word.load(Ordering::Acquire)))
    }

    /// Stores a number for the driver, after everything that was written before. False if it is not in this piece, may not be written or
    /// is not aligned.
    #[must_use]
    pub fn store_u16(&self, address: u64, value: u16) -> bool {
        match self.atomic(address) {
            Some(word) if self.access.is_writable() => {
                word.store(value.to_le(), Ordering::Release);
                true
            }
            _ => false,
        }
    }

    fn atomic(&self, address: u64) -> Option<&AtomicU16> {
        let pointer = self.pointer(address, 2)?.cast::<u16>();
        if !pointer.is_aligned() {
            return None;
        }
        // SAFETY: it is aligned and inside the mapping, which lives as long as the result; others access it as whole words, too.
        Some(unsafe { AtomicU16::from_ptr(pointer) })
    }
}

/// Memory of this process that the kernel may pass a driver's data through
/// ([`Device::register_memory`](crate::Device::register_memory)).
#[derive(Debug)]
pub struct UserMemory(MmapRaw);

impl UserMemory {
    /// Makes `len` bytes, zeroes at first.
    ///
    /// # Errors
    /// There is not so much.
    pub fn new(len: usize) -> io::Result<Self> {
        let memory = MmapOptions::new().len(len).map_anon()?;
        Ok(Self(memory.into()))
    }

    /// How many bytes it has.
    pub fn len(&self) -> u64 {
        u64::try_from(self.0.len()).unwrap_or(u64::MAX)
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.0.len() == 0
    }

    /// Its first byte. The kernel writes to it while it is registered.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    pub(crate) fn address(&self) -> u64 {
        u64::try_from(self.0.as_ptr().addr()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    /// A piece of memory at `start` that a file in memory stands for.
    pub(crate) fn mapping(start: u64, bytes: &[u8], access: Access) -> Mapping {
        let file = memfd_create(c"driver", MFdFlags::MFD_CLOEXEC).expect("memory");
        let mut file = File::from(file);
        file.write_all(bytes).expect("memory");
        let entry = IotlbEntry {
            file,
            offset: 0,
            start,
            last: start + u64::try_from(bytes.len()).expect("small") - 1,
            access,
        };
        entry.map().expect("memory")
    }

    #[test]
    fn only_what_is_inside_is_touched() {
        let memory = mapping(0x1000, &[1, 2, 3, 4], Access::ReadWrite);
        let mut two = [0; 2];
        assert!(memory.read(0x1002, &mut two));
        assert_eq!(two, [3, 4]);
        for address in [0, 0xfff, 0x1003, 0x1004, u64::MAX] {
            assert!(!memory.read(address, &mut two), "{address:#x}");
            assert!(!memory.write(address, &two), "{address:#x}");
        }
        assert!(memory.write(0x1000, &[9, 9]));
        let mut all = [0; 4];
        assert!(memory.read(0x1000, &mut all));
        assert_eq!(all, [9, 9, 3, 4]);
    }

    #[test]
    fn memory_to_read_cannot_be_written() {
        let memory = mapping(0, &[0; 8], Access::Read);
        assert!(!memory.write(0, &[1]));
        assert!(!memory.store_u16(0, 1));
        assert_eq!(memory.load_u16(0), Some(0));
    }

    #[test]
    fn words_are_little_endian_and_aligned() {
        let memory = mapping(0, &[0; 8], Access::ReadWrite);
        assert!(memory.store_u16(2, 0x1234));
        let mut bytes = [0; 2];
        assert!(memory.read(2, &mut bytes));
        assert_eq!(bytes, [0x34, 0x12]);
        assert_eq!(memory.load_u16(2), Some(0x1234));
        assert_eq!(memory.load_u16(1), None);
    }

    #[test]
    fn the_whole_address_space_is_no_piece() {
        let file = memfd_create(c"driver", MFdFlags::MFD_CLOEXEC).expect("memory");
        let entry = IotlbEntry {
            file: file.into(),
            offset: 0,
            start: 0,
            last: u64::MAX,
            access: Access::Read,
        };
        assert_eq!(entry.len(), None);
        assert!(entry.map().is_err());
    }
}
