//! Decompresses one cluster, or the front of it. Takes no memory for what the compressed data claims.
//!
//! Each thread keeps its decompressors: setting one up costs as much as a small cluster. Whole clusters go through the faster one for
//! deflate, which cannot stop half-way.

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use stord_aio::Errno;

thread_local! {
    static DEFLATE: RefCell<libdeflater::Decompressor> = RefCell::new(libdeflater::Decompressor::new());
    static DEFLATE_FRONT: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static ZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// How a cluster is compressed, and how much of it is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packing {
    /// zstd rather than deflate.
    pub(super) zstd: bool,
    /// Bytes of the cluster.
    pub(super) size: usize,
    /// Bytes of it that are needed, from its start on.
    pub(super) needed: usize,
}

/// Decompresses at least what is needed of a cluster; what follows it in `packed` does not matter.
///
/// # Errors
/// `EIO` for data that is not one compressed cluster.
pub(super) fn unpack(packed: &[u8], packing: Packing) -> Result<Vec<u8>, Errno> {
    let Packing { zstd, size, needed } = packing;
    if zstd {
        let mut content = vec![0; size];
        unzstd(packed, &mut content)?;
        return Ok(content);
    }
    // Up to there the slower one is done sooner.
    if needed <= size / 4 * 3 {
        let mut content = vec![0; needed];
        inflate_front(packed, &mut content)?;
        return Ok(content);
    }
    let mut content = vec![0; size];
    let whole = DEFLATE.with_borrow_mut(|deflate| deflate.deflate_decompress(packed, &mut content));
    if whole != Ok(size) {
        // A stream without an end, or with more than a cluster in it, which the reference reads all the same.
        inflate_front(packed, &mut content)?;
    }
    Ok(content)
}

/// Fills `content` from the start of a deflate stream.
fn inflate_front(packed: &[u8], content: &mut [u8]) -> Result<(), Errno> {
    DEFLATE_FRONT.with_borrow_mut(|stream| {
        stream.reset(false);
        let status = stream
            .decompress(packed, content, FlushDecompress::None)
            .map_err(|_| Errno::EIO)?;
        let is_full = stream.total_out() == content.len() as u64;
        match status {
            Status::Ok | Status::StreamEnd | Status::BufError if is_full => Ok(()),
            _ => Err(Errno::EIO),
        }
    })
}

/// Decompresses frame by frame straight into place, so that a frame's window costs no memory.
fn unzstd(packed: &[u8], content: &mut [u8]) -> Result<(), Errno> {
    ZSTD.with_borrow_mut(|kept| {
        let decompressor = match kept {
            Some(decompressor) => decompressor,
            None => kept.insert(zstd::bulk::Decompressor::new().map_err(|_| Errno::ENOMEM)?),
        };
        let (mut from, mut to) = (0, 0);
        while to < content.len() {
            let rest = packed.get(from..).ok_or(Errno::EIO)?;
            let frame =
                zstd::zstd_safe::find_frame_compressed_size(rest).map_err(|_| Errno::EIO)?;
            let frame = rest.get(..frame).ok_or(Errno::EIO)?;
            let written = decompressor
                .decompress_to_buffer(frame, &mut content[to..])
                .map_err(|_| Errno::EIO)?;
            if frame.is_empty() || written == 0 {
                return Err(Errno::EIO);
            }
            from += frame.len();
            to += written;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;

    fn text(len: usize) -> Vec<u8> {
        (0..len)
            .map(|n| u8::try_from(n * n / 7 % 251).unwrap_or(0))
            .collect()
    }

    fn deflated(content: &[u8], flush: FlushCompress) -> Vec<u8> {
        let mut stream = Compress::new(Compression::default(), false);
        let mut packed = Vec::with_capacity(2 * content.len() + 100);
        let status = stream.compress_vec(content, &mut packed, flush);
        assert!(status.is_ok());
        packed
    }

    fn front(packed: &[u8], size: usize, needed: usize, zstd: bool) -> Result<Vec<u8>, Errno> {
        unpack(packed, Packing { zstd, size, needed })
    }

    fn all(packed: &[u8], size: usize, zstd: bool) -> Result<Vec<u8>, Errno> {
        front(packed, size, size, zstd)
    }

    #[test]
    fn streams_with_and_without_an_end_are_read() {
        let content = text(65536);
        let mut whole = deflated(&content, FlushCompress::Finish);
        // A cluster ends somewhere in a sector.
        whole.extend([0xa5; 300]);
        let endless = deflated(&content, FlushCompress::Sync);
        for packed in [whole, endless] {
            assert!(all(&packed, content.len(), false).as_ref() == Ok(&content));
        }
    }

    #[test]
    fn more_than_a_cluster_is_read_up_to_its_end_and_less_is_an_error() {
        let content = text(65536);
        let packed = deflated(&content, FlushCompress::Finish);
        assert!(all(&packed, 4096, false).as_deref() == Ok(&content[..4096]));
        assert!(all(&packed, 65537, false) == Err(Errno::EIO));
        assert!(all(&packed[..1000], 65536, false) == Err(Errno::EIO));
    }

    #[test]
    fn the_front_of_a_cluster_is_what_the_whole_begins_with() {
        let content = text(65536);
        let packed = deflated(&content, FlushCompress::Finish);
        for needed in [1, 512, 4096, 30_000, 49_152, 49_153, 65536] {
            let front = front(&packed, 65536, needed, false).expect("it is whole");
            assert!(front.len() >= needed && content.starts_with(&front));
        }
        // As much as is there can be had of a stream that breaks off.
        assert!(front(&packed[..packed.len() - 8], 65536, 4096, false).is_ok());
        assert!(front(&packed[..10], 65536, 4096, false) == Err(Errno::EIO));
    }

    #[test]
    fn a_decompressor_is_none_the_worse_for_bad_data() {
        let content = text(4096);
        let packed = zstd::bulk::compress(&content, 3).expect("it compresses");
        let deflate = deflated(&content, FlushCompress::Finish);
        for _ in 0..3 {
            for needed in [512, 4096] {
                assert!(front(&[0xff; 64], 4096, needed, true) == Err(Errno::EIO));
                assert!(front(&[0xff; 64], 4096, needed, false) == Err(Errno::EIO));
                let front = front(&deflate, 4096, needed, false).expect("it is whole");
                assert!(content.starts_with(&front));
            }
            assert!(all(&packed, 4096, true).as_ref() == Ok(&content));
        }
    }
}
