//! The image's file, read and written in the units of the check: numbers, tables, clusters. Past the file's end there are zeroes.

use stord_aio::{Errno, IoBuffer};

use super::report::CheckError;
use crate::driver::FILE;
use crate::drivers::format::qcow2::header::Header;
use crate::graph::Children;

/// Long tables are read in pieces of this many bytes.
const PIECE: u64 = 64 << 10;

/// The file.
pub(super) struct ImageFile {
    children: Children,
}

impl ImageFile {
    pub(super) fn new(children: Children) -> Self {
        Self { children }
    }

    /// The length in bytes.
    pub(super) fn size(&self) -> u64 {
        self.children.size(FILE)
    }

    /// Reads `len` bytes.
    pub(super) async fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Errno> {
        let len = usize::try_from(len).map_err(|_| Errno::ENOMEM)?;
        let in_file = self.size().saturating_sub(offset).min(len as u64);
        // Not more than there is, whatever the image says.
        let mut bytes = if in_file == 0 {
            Vec::new()
        } else {
            let buffer = IoBuffer::zeroed(usize::try_from(in_file).map_err(|_| Errno::ENOMEM)?);
            self.children
                .read(FILE, offset, buffer.clone().into())
                .await?;
            buffer.to_vec()
        };
        bytes.resize(len, 0);
        Ok(bytes)
    }

    /// Reads a table of numbers; its end is missing where the file ends before.
    pub(super) async fn read_table(&self, offset: u64, entries: u64) -> Result<Vec<u64>, Errno> {
        let in_file = self.size().saturating_sub(offset).div_ceil(8).min(entries);
        let mut table = Vec::with_capacity(usize::try_from(in_file).map_err(|_| Errno::ENOMEM)?);
        let mut at = 0;
        while at < in_file {
            let count = (in_file - at).min(PIECE / 8);
            let bytes = self.read(offset + at * 8, count * 8).await?;
            table.extend(numbers(&bytes));
            at += count;
        }
        Ok(table)
    }

    pub(super) async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.children
            .write(FILE, offset, IoBuffer::copy_of(bytes).into(), false)
            .await
    }

    pub(super) async fn flush(&self) -> Result<(), Errno> {
        self.children.flush(FILE).await
    }

    /// Writes the header and waits until it is on disk, as is everything written before.
    pub(super) async fn write_header(&self, header: &Header) -> Result<(), CheckError> {
        self.flush().await.map_err(CheckError::Flush)?;
        self.children
            .write(FILE, 0, header.to_head().into(), false)
            .await
            .map_err(|errno| CheckError::write("the header", 0, errno))?;
        self.flush().await.map_err(CheckError::Flush)
    }

    /// Gives a range back, if the file takes that.
    pub(super) async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.children.discard(FILE, offset, len).await
    }
}

/// Big-endian 64-bit numbers.
pub(super) fn numbers(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes
        .chunks_exact(8)
        .map(|bytes| bytes.try_into().map_or(0, u64::from_be_bytes))
}
