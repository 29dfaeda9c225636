//! What the queues of one export share with the control thread: the file system, and what they are told.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use stord_aio::sync::Notify;
use stord_block::BackendListener;

use super::file_system::FileSystem;

/// Shared by the queues of an export and the control thread.
///
/// A flag is set first and the queues concerned are notified then; a queue looks at every flag after each notification.
pub(super) struct Session {
    pub(super) file_system: FileSystem,
    stopping: AtomicBool,
    /// The connection has ended.
    closed: AtomicBool,
    /// Drained sections that are on.
    held: AtomicUsize,
    /// The kernel has attributes of some file that are out of date.
    stale: AtomicBool,
    /// One for each queue.
    notices: Box<[Notice]>,
}

/// Where one queue waits.
#[derive(Default)]
struct Notice {
    notify: Notify,
    /// The queue does not look for requests until notified.
    resting: AtomicBool,
}

impl Session {
    /// A session of `queues` queues.
    pub(super) fn new(file_system: FileSystem, queues: usize) -> Arc<Self> {
        let session = Arc::new(Self {
            file_system,
            stopping: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            held: AtomicUsize::new(0),
            stale: AtomicBool::new(false),
            notices: (0..queues).map(|_| Notice::default()).collect(),
        });
        for file in session.file_system.files() {
            let listener = Listener {
                session: Arc::downgrade(&session),
                node: file.node,
            };
            file.backend.set_listener(Arc::new(listener));
        }
        session
    }

    /// Tells the queues to end: to fetch no more, to finish what they have fetched, and to close the device.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.notify_all();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Notes that the kernel has ended the connection.
    pub(super) fn note_closed(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Whether a drained section is on.
    pub(super) fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire) > 0
    }

    /// The files of which the kernel's attributes are out of date, each once.
    pub(super) fn take_stale(&self) -> Vec<u64> {
        if !(self.stale.load(Ordering::Relaxed) && self.stale.swap(false, Ordering::AcqRel)) {
            return Vec::new();
        }
        let files = self.file_system.files().iter();
        files
            .filter(|file| file.take_stale())
            .map(|file| file.node)
            .collect()
    }

    /// Where queue `index` hears of changes here.
    pub(super) fn notice(&self, index: usize) -> &Notify {
        &self.notices[index].notify
    }

    /// Says that queue `index` does not look for requests from now on.
    pub(super) fn rest(&self, index: usize) {
        self.notices[index].resting.store(true, Ordering::Release);
    }

    /// Gets a resting queue to work, if there is one.
    pub(super) fn call_help(&self) {
        for notice in &self.notices {
            if notice.resting.load(Ordering::Relaxed)
                && notice.resting.swap(false, Ordering::AcqRel)
            {
                notice.notify.notify_one();
                return;
            }
        }
    }

    /// Whether queue `index` rests still.
    pub(super) fn is_resting(&self, index: usize) -> bool {
        self.notices[index].resting.load(Ordering::Acquire)
    }

    fn notify_all(&self) {
        for notice in &self.notices {
            notice.notify.notify_one();
        }
    }
}

/// Hears of the block layer, for one file. The backend owns it, and the session owns the backend: hence no ownership in this
/// direction.
struct Listener {
    session: Weak<Session>,
    node: u64,
}

impl BackendListener for Listener {
    fn drained_begin(&self) {
        if let Some(session) = self.session.upgrade() {
            session.held.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn drained_end(&self) {
        if let Some(session) = self.session.upgrade() {
            session.held.fetch_sub(1, Ordering::AcqRel);
            session.notify_all();
        }
    }

    fn resized(&self, _size: u64) {
        if let Some(session) = self.session.upgrade() {
            if let Some(file) = session.file_system.file(self.node) {
                file.note_stale();
            }
            session.stale.store(true, Ordering::Release);
            if let Some(first) = session.notices.first() {
                first.notify.notify_one();
            }
        }
    }
}
