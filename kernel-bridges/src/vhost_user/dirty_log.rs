//! The log of what is written to a guest's memory, by which a migration finds the pages that it has to send again.
//!
//! It is one bit for each page of 4096 bytes, in a file that the front end reads and clears meanwhile. A page is noted after it was
//! written to: the other way round, the front end might send it in between and miss the write.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;

use crate::virtio::memory::mapping::{Mapping, Words};

/// `VHOST_LOG_PAGE`, in bytes.
const PAGE: u64 = 4096;
/// A byte of the log says of so many pages.
const BITS: u64 = 8;

/// The log, shared by all queues of a front end.
#[derive(Default)]
pub(super) struct DirtyLog {
    mapping: ArcSwapOption<Mapping>,
    /// Rises with every log.
    generation: AtomicU64,
    is_on: AtomicBool,
}

impl DirtyLog {
    /// Notes everything here from now on.
    pub(super) fn set(&self, mapping: Arc<Mapping>) {
        self.mapping.store(Some(mapping));
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Begins or ends noting.
    pub(super) fn switch(&self, is_on: bool) {
        self.is_on.store(is_on, Ordering::SeqCst);
    }

    /// The log for the calling thread.
    pub(super) fn local(self: &Arc<Self>) -> LocalLog {
        LocalLog {
            log: Arc::clone(self),
            generation: Cell::new(0),
            bits: RefCell::new(None),
        }
    }
}

/// The log as one thread uses it.
pub(super) struct LocalLog {
    log: Arc<DirtyLog>,
    generation: Cell<u64>,
    bits: RefCell<Option<Words>>,
}

impl LocalLog {
    /// Whether there is anything to note.
    #[inline]
    pub(super) fn is_on(&self) -> bool {
        self.log.is_on.load(Ordering::SeqCst)
    }

    /// Notes that `len` bytes from `addr` on were written to. What is beyond the log is nobody's.
    pub(super) fn note(&self, addr: u64, len: u64) {
        let generation = self.log.generation.load(Ordering::Acquire);
        if self.generation.replace(generation) != generation {
            let mapping = self.log.mapping.load_full();
            let bits = mapping.and_then(|mapping| Words::new(mapping.buffer(), 1));
            *self.bits.borrow_mut() = bits;
        }
        let bits = self.bits.borrow();
        let (Some(bits), Some(more)) = (&*bits, len.checked_sub(1)) else {
            return;
        };
        for page in addr / PAGE..=addr.saturating_add(more) / PAGE {
            let Ok(at) = usize::try_from(page / BITS) else {
                return;
            };
            if at >= bits.len() {
                return;
            }
            bits.set_bits_u8(at, 1 << (page % BITS));
        }
    }
}
