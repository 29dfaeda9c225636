//! A driver's memory by its addresses: pieces are looked up when they are first needed, and kept.

use std::io;

use crate::device::Device;
use crate::iotlb::Mapping;

/// The driver's memory as far as it has been looked at.
///
/// [`forget`](Self::forget) has to be called when the kernel says that addresses have become void, and at every reset.
#[derive(Debug, Default)]
pub struct Memory {
    mappings: Vec<Mapping>,
}

impl Memory {
    /// Nothing looked at yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets what is known of every address.
    pub fn forget(&mut self) {
        self.mappings.clear();
    }

    /// The piece that all `len` bytes from `address` on are in.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such piece.
    pub fn find(&mut self, device: &Device, address: u64, len: usize) -> io::Result<&Mapping> {
        let known = |mappings: &[Mapping]| {
            mappings
                .iter()
                .position(|mapping| mapping.contains(address, len))
        };
        let index = match known(&self.mappings) {
            Some(index) => index,
            None => {
                self.mappings.push(device.iotlb(address, address)?.map()?);
                known(&self.mappings).ok_or(io::ErrorKind::InvalidInput)?
            }
        };
        Ok(&self.mappings[index])
    }

    /// Copies from the memory, out of one piece.
    ///
    /// # Errors
    /// `InvalidInput` where nothing is.
    pub fn read(&mut self, device: &Device, address: u64, into: &mut [u8]) -> io::Result<()> {
        if self.find(device, address, into.len())?.read(address, into) {
            return Ok(());
        }
        Err(io::ErrorKind::InvalidInput.into())
    }

    /// Copies into the memory, into one piece.
    ///
    /// # Errors
    /// `InvalidInput` where nothing is, or where the device may not write.
    pub fn write(&mut self, device: &Device, address: u64, from: &[u8]) -> io::Result<()> {
        if self.find(device, address, from.len())?.write(address, from) {
            return Ok(());
        }
        Err(io::ErrorKind::InvalidInput.into())
    }
}
