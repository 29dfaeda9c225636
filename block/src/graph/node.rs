//! Nodes: a driver, its children, and the state that the generic request path keeps for it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use stord_aio::sync::{Mutex, RangeLock};
use stord_qmp::schema::block::BlockdevOptions;

use super::Children;
use super::event::{Events, Reporter};
use super::threshold::WriteThreshold;
use crate::bitmap::{BitmapState, Bitmaps};
use crate::driver::{BitmapStore, Driver, Limits};

/// What becomes of discards and zeroes at a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Data is written as data.
    Off,
    /// Zeroes in written data become zero writes.
    On,
    /// They also give their space back, where the node discards.
    Unmap,
}

/// The options that every node has, with their defaults filled in.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Discards reach the driver (`discard=unmap`).
    pub discard: bool,
    /// Bypasses the host's page cache (`cache.direct`).
    pub direct: bool,
    /// Flushes do not reach the disk (`cache.no-flush`).
    pub no_flush: bool,
    /// Whether the user wants the node active (`active`), if he says.
    pub active: Option<bool>,
    /// The user asked for a read-only node.
    pub read_only: bool,
    /// Falls back to read-only where writing cannot be had.
    pub auto_read_only: bool,
    /// Tolerates everything that others do to the image.
    pub force_share: bool,
    /// What to do with zeroes in written data.
    pub detect_zeroes: DetectZeroes,
}

/// A node of the graph.
pub struct Node {
    name: String,
    driver_name: &'static str,
    driver: Driver,
    children: Children,
    options: NodeOptions,
    limits: Limits,
    size: AtomicU64,
    read_only: bool,
    /// Whether the image may be used, rather than left to another process.
    active: AtomicBool,
    /// What the node was opened with, to open it once more.
    definition: Option<Box<BlockdevOptions>>,
    /// The iothread that serves users of the node who name none.
    iothread: std::sync::Mutex<Option<String>>,
    /// Serialises read-modify-write with other writes, on nodes whose alignment makes it necessary.
    pub(crate) serialising: RangeLock,
    /// The end of the highest write, in bytes.
    highest_written: AtomicU64,
    threshold: WriteThreshold,
    bitmaps: Arc<Bitmaps>,
    /// Counts completed writes; what a flush compares with `flushed`.
    pub(crate) written: AtomicU64,
    /// The value of `written` that the last flush covered. Its lock makes one flush serve all that wait.
    pub(crate) flushed: Mutex<u64>,
}

impl Node {
    pub(crate) fn new(
        name: String,
        driver_name: &'static str,
        driver: Driver,
        children: Children,
        options: NodeOptions,
        read_only: bool,
    ) -> Self {
        let (limits, size) = match &driver {
            Driver::Protocol(leaf) => (leaf.limits(), leaf.length()),
            Driver::Format(format) => (format.limits(), format.length()),
        };
        let bitmaps = match &driver {
            Driver::Format(format) => format.bitmap_store().map(BitmapStore::bitmaps),
            Driver::Protocol(_) => None,
        };
        let bitmaps = bitmaps.unwrap_or_default();
        let active = options.active.unwrap_or(true);
        Self {
            name,
            driver_name,
            driver,
            children,
            options,
            limits,
            size: AtomicU64::new(size),
            read_only,
            active: AtomicBool::new(active),
            definition: None,
            iothread: std::sync::Mutex::default(),
            serialising: RangeLock::default(),
            highest_written: AtomicU64::new(0),
            threshold: WriteThreshold::default(),
            bitmaps,
            written: AtomicU64::new(0),
            flushed: Mutex::new(0),
        }
    }

    /// The same node, which tells of what happens to it.
    pub(super) fn with_events(mut self, events: Events) -> Self {
        if let Driver::Format(format) = &self.driver {
            format.tell(Reporter::new(&self.name, events.clone()));
        }
        self.threshold = WriteThreshold::new(events);
        self
    }

    /// The same node, which knows what it was opened with.
    pub(super) fn defined_by(mut self, definition: &BlockdevOptions) -> Self {
        self.definition = Some(Box::new(definition.clone()));
        self
    }

    /// The same node, in the place of `old`: keeps what was counted and set there.
    pub(super) fn continuing(self, old: &Self) -> Self {
        self.set_iothread(old.iothread());
        self.threshold.set(old.threshold.get());
        self.highest_written
            .store(old.highest_written(), Ordering::Relaxed);
        // The persistent ones come with the image.
        for bitmap in old.bitmaps.list().iter().rev() {
            if !bitmap.is(BitmapState::PERSISTENT) {
                self.bitmaps.add(Arc::clone(bitmap));
            }
        }
        self
    }

    /// The node name; nodes that were not named by the user have one that starts with `#block`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of the driver as in `BlockdevDriver`.
    pub fn driver_name(&self) -> &'static str {
        self.driver_name
    }

    /// The driver.
    pub fn driver(&self) -> &Driver {
        &self.driver
    }

    /// The children.
    pub fn children(&self) -> &Children {
        &self.children
    }

    /// The generic options.
    pub fn options(&self) -> &NodeOptions {
        &self.options
    }

    /// What the driver takes without help.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The length in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(crate) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
        self.bitmaps.resize(size);
    }

    /// The end of the highest write since the node opened, in bytes.
    pub(super) fn highest_written(&self) -> u64 {
        self.highest_written.load(Ordering::Relaxed)
    }

    /// The dirty bitmaps.
    pub fn bitmaps(&self) -> &Bitmaps {
        &self.bitmaps
    }

    pub(super) fn threshold(&self) -> &WriteThreshold {
        &self.threshold
    }

    /// Notes that a write is done that reached as far as `end`. Bitmaps are told apart: by writes that failed, too.
    pub(crate) fn note_write(&self, end: u64) {
        self.threshold.check(&self.name, end);
        if self.highest_written.load(Ordering::Relaxed) < end {
            self.highest_written.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// Notes that a write reached this far.
    pub(crate) fn grow_to(&self, end: u64) {
        if self.size() < end {
            self.size.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the image may be used, rather than left to another process.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    pub(super) fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Release);
    }

    /// What the node was opened with.
    pub(crate) fn definition(&self) -> Option<&BlockdevOptions> {
        self.definition.as_deref()
    }

    /// The iothread that serves users of the node who name none.
    pub(super) fn iothread(&self) -> Option<String> {
        let iothread = self.iothread.lock();
        iothread.unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_iothread(&self, iothread: Option<String>) {
        *self.iothread.lock().unwrap_or_else(PoisonError::into_inner) = iothread;
    }
}
