//! What all queues of a block device share: where requests go, what the driver is told of the disk, and drained sections.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use stord_block::{Backend, BackendListener};
use zerocopy::IntoBytes as _;

use super::super::ring::Broken;
use super::config::{
    CONFIG_SIZE, Config, F_CONFIG_WCE, F_FLUSH, F_MQ, F_RO, FEATURES, MAX_DISCARD_SECTORS,
    MAX_WRITE_ZEROES_SECTORS, SECTOR, WRITEBACK,
};
use super::queue::Signals;
use super::request::{ID_LEN, Limits};

/// How a disk is shown.
#[derive(Clone, Debug)]
pub(crate) struct DiskOptions {
    pub(crate) writable: bool,
    /// Whether every write is durable when it completes, until the driver says otherwise.
    pub(crate) writethrough: bool,
    /// In bytes: a power of two, 512 at least.
    pub(crate) logical_block_size: u32,
    /// What `GET_ID` gives: at most 20 bytes of it.
    pub(crate) serial: String,
    pub(crate) queues: u16,
    /// The most segments of data of one request.
    pub(crate) seg_max: u32,
}

/// One block device.
pub(crate) struct Disk {
    backend: Backend,
    options: DiskOptions,
    serial: [u8; ID_LEN],
    write_cache: AtomicBool,
    /// Drained sections that are on.
    held: AtomicUsize,
    /// Changes that would not outlive this process yet.
    unsettled: AtomicUsize,
    queues: Mutex<Vec<Weak<Signals>>>,
    resized: Mutex<Option<Resized>>,
    complaints: Mutex<Complaints>,
}

/// A change that would not outlive this process yet.
pub(super) struct Change<'a>(&'a AtomicUsize);

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// When it was last said that a driver broke a rule, and how often it happened since.
#[derive(Default)]
struct Complaints {
    last: Option<Instant>,
    unsaid: u64,
}

/// So long nothing more is said of it.
const SILENCE: Duration = Duration::from_secs(1);

/// Called on the control thread with the new length in bytes.
type Resized = Box<dyn Fn(u64) + Send>;

impl Disk {
    /// A disk over a backend, whose listener it becomes.
    pub(crate) fn new(backend: Backend, options: DiskOptions) -> Arc<Self> {
        let mut serial = [0; ID_LEN];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let disk = Arc::new(Self {
            backend,
            serial,
            write_cache: AtomicBool::new(!options.writethrough),
            options,
            held: AtomicUsize::new(0),
            unsettled: AtomicUsize::new(0),
            queues: Mutex::default(),
            resized: Mutex::default(),
            complaints: Mutex::default(),
        });
        let listener = Listener(Arc::downgrade(&disk));
        disk.backend.set_listener(Arc::new(listener));
        disk
    }

    /// Calls `notify` whenever the configuration space has changed because the disk has another length.
    pub(crate) fn on_resize(&self, notify: impl Fn(u64) + Send + 'static) {
        let mut resized = self.resized.lock().unwrap_or_else(PoisonError::into_inner);
        *resized = Some(Box::new(notify));
    }

    /// Where its requests go.
    pub(crate) fn backend(&self) -> &Backend {
        &self.backend
    }

    /// The features to offer, without those of the transport.
    pub(crate) fn features(&self) -> u64 {
        let mut features = FEATURES;
        if self.options.queues > 1 {
            features |= F_MQ;
        }
        if !self.options.writable {
            features |= F_RO;
        }
        features
    }

    /// The configuration space as it is now.
    pub(crate) fn config(&self) -> [u8; CONFIG_SIZE] {
        let block_size = self.options.logical_block_size;
        let config = Config {
            capacity: self.backend.size() / SECTOR,
            seg_max: self.options.seg_max,
            blk_size: block_size,
            min_io_size: 1,
            opt_io_size: 1,
            writeback: self.write_cache.load(Ordering::Acquire).into(),
            num_queues: self.options.queues,
            max_discard_sectors: MAX_DISCARD_SECTORS,
            max_discard_seg: 1,
            discard_sector_alignment: block_size >> SECTOR.ilog2(),
            max_write_zeroes_sectors: MAX_WRITE_ZEROES_SECTORS,
            max_write_zeroes_seg: 1,
            write_zeroes_may_unmap: self.backend.passes_discard().into(),
            ..Config::default()
        };
        let mut bytes = [0; CONFIG_SIZE];
        bytes.copy_from_slice(config.as_bytes());
        bytes
    }

    /// Writes to the configuration space. Of it, the driver may turn the write cache on and off (5.2.5.2); false when it wrote something
    /// else, which changes nothing.
    pub(crate) fn set_config(&self, offset: u32, bytes: &[u8]) -> bool {
        let (WRITEBACK, &[value]) = (offset, bytes) else {
            return false;
        };
        self.write_cache.store(value != 0, Ordering::Release);
        true
    }

    /// Puts back what the driver has changed, when it resets the device.
    pub(crate) fn reset(&self) {
        self.write_cache
            .store(!self.options.writethrough, Ordering::Release);
    }

    /// Whether a write has to be durable when it completes. A driver that can neither flush nor know of the write cache has to find none
    /// (5.2.6.2).
    pub(crate) fn is_writethrough(&self, features: u64) -> bool {
        features & (F_FLUSH | F_CONFIG_WCE) == 0 || !self.write_cache.load(Ordering::Acquire)
    }

    /// Whether a change is under way that would not outlive this process.
    #[inline]
    pub(super) fn is_unsettled(&self) -> bool {
        self.unsettled.load(Ordering::Acquire) > 0
    }

    /// To be called before anything but the content of allocated space changes, and to be dropped when that has been settled.
    pub(super) fn begin_change(&self) -> Change<'_> {
        self.unsettled.fetch_add(1, Ordering::AcqRel);
        Change(&self.unsettled)
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            size: self.backend.size(),
            logical_block_size: self.options.logical_block_size,
            writable: self.options.writable,
        }
    }

    pub(super) fn serial(&self) -> &[u8; ID_LEN] {
        &self.serial
    }

    /// Whether a drained section is on.
    #[inline]
    pub(super) fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire) > 0
    }

    /// Says that a queue has stopped because its driver broke a rule; a driver that does it often is not answered each time.
    pub(super) fn report_broken(&self, queue: u16, broken: Broken) {
        let mut complaints = self
            .complaints
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if complaints.last.is_some_and(|last| now - last < SILENCE) {
            complaints.unsaid += 1;
            return;
        }
        complaints.last = Some(now);
        let unsaid = std::mem::take(&mut complaints.unsaid);
        drop(complaints);
        tracing::error!(
            queue,
            unsaid,
            "{}: a queue has stopped: {broken}",
            self.backend.name()
        );
    }

    /// Tells a queue of drained sections from now on.
    pub(super) fn enroll(&self, signals: &Arc<Signals>) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(signals));
    }
}

/// Hears of the block layer. The backend owns it, and the disk owns the backend: hence no ownership in this direction.
struct Listener(Weak<Disk>);

impl BackendListener for Listener {
    fn drained_begin(&self) {
        if let Some(disk) = self.0.upgrade() {
            disk.held.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn drained_end(&self) {
        let Some(disk) = self.0.upgrade() else { return };
        disk.held.fetch_sub(1, Ordering::AcqRel);
        let queues = disk.queues.lock().unwrap_or_else(PoisonError::into_inner);
        for queue in queues.iter().filter_map(Weak::upgrade) {
            queue.notify();
        }
    }

    fn resized(&self, size: u64) {
        let Some(disk) = self.0.upgrade() else { return };
        let resized = disk.resized.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(resized) = &*resized {
            resized(size);
        }
    }
}
