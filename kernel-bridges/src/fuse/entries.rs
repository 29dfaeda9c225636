//! The entries of an export over io_uring: which context has them, and how they go from one to another, or out of this process.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stord_aio::sync::{Notify, mpsc};

use super::file_system::FileSystem;
use super::held::Held;
use super::session::Session;

/// Entries that a queue begins with.
pub(super) const ENTRIES: usize = 8;

/// What the contexts of an export have in common.
pub(super) struct Common {
    session: Arc<Session>,
    places: Vec<Place>,
    /// Entries with requests in them stay as they are.
    holding: AtomicBool,
    entries: Mutex<Entries>,
    /// The last entry has ended.
    ended: Notify,
}

/// The entries of an export.
struct Entries {
    /// How many of each queue are here.
    here: Vec<usize>,
    held: Vec<Held>,
}

/// One context, as the others see it.
struct Place {
    inbox: mpsc::UnboundedSender<Message>,
    /// Large requests in its hands.
    large: AtomicUsize,
}

/// What a context is told.
pub(super) enum Message {
    /// Take an entry over.
    Entry(Held),
    /// No entry is left.
    End,
}

/// What is to be done with an entry that is taken over.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// There is a request in it.
    Receive,
    /// The request in it is large, and to be answered.
    Answer,
    /// The reply in it is to be sent.
    Commit,
}

impl Common {
    /// For so many contexts and so many queues, some of whose entries may be there already. The second result is for the contexts, in
    /// their order.
    pub(super) fn new(
        session: &Arc<Session>,
        contexts: usize,
        queues: u16,
        held: Vec<Held>,
    ) -> (Arc<Self>, Vec<mpsc::UnboundedReceiver<Message>>) {
        let (places, inboxes): (Vec<_>, _) = (0..contexts)
            .map(|_| {
                let (inbox, messages) = mpsc::unbounded_channel();
                let large = AtomicUsize::new(0);
                (Place { inbox, large }, messages)
            })
            .unzip();
        let mut here = vec![0; queues.into()];
        for entry in &held {
            here[usize::from(entry.parts.queue)] += 1;
        }
        for count in here.iter_mut().filter(|count| **count == 0) {
            *count = ENTRIES;
        }
        let common = Arc::new(Self {
            session: Arc::clone(session),
            places,
            holding: AtomicBool::new(false),
            entries: Mutex::new(Entries {
                here,
                held: Vec::new(),
            }),
            ended: Notify::new(),
        });
        common.send_home(held);
        (common, inboxes)
    }

    /// Notes that the entries of these queues will not be.
    pub(super) fn give_up(&self, queues: impl Iterator<Item = u16>) {
        for queue in queues {
            for _ in 0..self.count(queue) {
                self.entry_ended(queue);
            }
        }
    }

    /// The number of queues.
    pub(super) fn queues(&self) -> u16 {
        u16::try_from(self.lock().here.len()).expect("made from such a number")
    }

    /// How many entries of a queue are here.
    pub(super) fn count(&self, queue: u16) -> usize {
        let entries = self.lock();
        entries.here.get(usize::from(queue)).copied().unwrap_or(0)
    }

    /// Sees to it that entries stay as they are as soon as a request is in them, and that there will be no more of them.
    pub(super) fn hold(&self) {
        self.holding.store(true, Ordering::Release);
        // Whoever adds entries has added them, or sees it.
        drop(self.lock());
    }

    /// Waits until no entry is left here.
    pub(super) async fn ended(&self) {
        self.ended.notified().await;
    }

    /// The entries that were held, if they are all. Otherwise they are served again, as the others are.
    pub(super) fn take_held(&self) -> Option<Vec<Held>> {
        let mut entries = self.lock();
        let held = std::mem::take(&mut entries.held);
        if entries.here.iter().all(|count| *count == 0) {
            return Some(held);
        }
        for entry in &held {
            entries.here[usize::from(entry.parts.queue)] += 1;
        }
        self.holding.store(false, Ordering::Release);
        drop(entries);
        self.send_home(held);
        None
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts entries that are about to be; false when there are to be none.
    pub(super) fn expect(&self, queue: u16, count: usize) -> bool {
        let mut entries = self.lock();
        let is_free = !self.is_holding();
        if is_free {
            entries.here[usize::from(queue)] += count;
        }
        is_free
    }

    /// Notes that an entry is no more.
    pub(super) fn entry_ended(&self, queue: u16) {
        let mut entries = self.lock();
        entries.here[usize::from(queue)] -= 1;
        self.end_if_last(&entries);
    }

    /// Whether entries are to be held.
    pub(super) fn is_holding(&self) -> bool {
        self.holding.load(Ordering::Acquire)
    }

    /// Holds an entry, or gives it back when it is too late for that.
    pub(super) fn keep(&self, held: Held) -> Result<(), Held> {
        let mut entries = self.lock();
        if !self.is_holding() {
            return Err(held);
        }
        entries.here[usize::from(held.parts.queue)] -= 1;
        entries.held.push(held);
        self.end_if_last(&entries);
        Ok(())
    }

    fn end_if_last(&self, entries: &Entries) {
        if entries.here.iter().any(|count| *count > 0) {
            return;
        }
        if entries.held.is_empty() {
            self.session.note_closed();
        }
        for place in &self.places {
            // Nobody listens where the context was not to be had.
            let _ = place.inbox.send(Message::End);
        }
        self.ended.notify_one();
    }

    /// Gives entries to the contexts that their queues belong to.
    pub(super) fn send_home(&self, entries: Vec<Held>) {
        for entry in entries {
            let place = usize::from(entry.parts.queue) % self.places.len();
            self.tell(place, entry);
        }
    }

    /// Gives an entry to the context at `place`.
    pub(super) fn tell(&self, place: usize, entry: Held) {
        // Nobody listens where the last entry has ended, or the context was not to be had.
        if let Err(mpsc::error::SendError(Message::Entry(entry))) =
            self.places[place].inbox.send(Message::Entry(entry))
        {
            self.entry_ended(entry.parts.queue);
        }
    }

    /// The file system that is served.
    pub(super) fn file_system(&self) -> &FileSystem {
        &self.session.file_system
    }

    /// Notes a large request in the hands of the context at `place`.
    pub(super) fn begin_large(&self, place: usize) {
        self.places[place].large.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end_large(&self, place: usize) {
        self.places[place].large.fetch_sub(1, Ordering::Relaxed);
    }

    /// Passes a large request from the context at `place` to one with less to do, if there is one.
    pub(super) fn relieve(&self, place: usize) -> Option<usize> {
        let load = |place: &Place| place.large.load(Ordering::Relaxed);
        let (other, least) = (self.places.iter().enumerate())
            .filter(|(other, _)| *other != place)
            .map(|(other, place)| (other, load(place)))
            .min_by_key(|(_, load)| *load)?;
        if least + 1 >= load(&self.places[place]) {
            return None;
        }
        self.begin_large(other);
        self.end_large(place);
        Some(other)
    }
}
