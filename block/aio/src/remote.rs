//! How other threads reach a context: a queue of messages and, only while the context sleeps, a
//! write to its eventfd.
//!
//! There is one mailbox per context index, and it is never freed, so a waker may refer to a
//! context by number, long after it ended. A message carries the generation of the context it is
//! meant for; the mailbox refuses it when that one is gone.
//!
//! No wake-up is lost: the receiver announces its sleep before it looks into the queue for the
//! last time, a sender fills the queue before it looks at the announcement, and both are
//! sequentially consistent.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::context::MAX_CONTEXTS;
use crate::task::{ExecutorId, TaskKey};

/// What another thread may tell a context.
pub(crate) enum Message {
    /// A task of this context can go on.
    Wake(TaskKey),
    /// Run this on the context.
    Run(Box<dyn FnOnce() + Send>),
    /// A blocking thread finished the operation in this slot.
    Complete { slot: u32, result: i32 },
    /// Finish all tasks, then end.
    Stop,
}

const AWAKE: u32 = 0;
const ASLEEP: u32 = 1;

/// One context's mailbox.
pub(crate) struct Mailbox {
    state: AtomicU32,
    filled: AtomicBool,
    queue: Mutex<Queue>,
    eventfd: OnceLock<EventFd>,
}

struct Queue {
    /// The context that receives here, or the next one when `open` is false.
    generation: u8,
    /// Whether a context receives here.
    open: bool,
    messages: Vec<Message>,
}

static MAILBOXES: [Mailbox; MAX_CONTEXTS] = [const {
    Mailbox {
        state: AtomicU32::new(AWAKE),
        filled: AtomicBool::new(false),
        queue: Mutex::new(Queue {
            generation: 0,
            open: false,
            messages: Vec::new(),
        }),
        eventfd: OnceLock::new(),
    }
}; MAX_CONTEXTS];

/// Takes the lowest free context index. `None` when all are in use.
///
/// # Errors
///
/// When the eventfd cannot be made.
pub(crate) fn open() -> Result<Option<ExecutorId>, Errno> {
    for (index, mailbox) in (0u8..).zip(&MAILBOXES) {
        let mut queue = mailbox.lock();
        if queue.open {
            continue;
        }
        if mailbox.eventfd.get().is_none() {
            // Blocking, because a ring answers a read of a nonblocking one at once with EAGAIN.
            let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
            assert!(
                mailbox.eventfd.set(eventfd).is_ok(),
                "only set under the queue's lock"
            );
        }
        queue.open = true;
        mailbox.state.store(AWAKE, Ordering::SeqCst);
        mailbox.filled.store(false, Ordering::SeqCst);
        return Ok(Some(ExecutorId {
            index,
            generation: queue.generation,
        }));
    }
    Ok(None)
}

/// Sends a message to a context, or gives it back when that context has ended.
pub(crate) fn send(to: ExecutorId, message: Message) -> Result<(), Message> {
    let Some(mailbox) = MAILBOXES.get(usize::from(to.index)) else {
        return Err(message);
    };
    {
        let mut queue = mailbox.lock();
        if !queue.open || queue.generation != to.generation {
            return Err(message);
        }
        queue.messages.push(message);
        mailbox.filled.store(true, Ordering::SeqCst);
    }
    if mailbox.state.load(Ordering::SeqCst) == ASLEEP
        && mailbox.state.swap(AWAKE, Ordering::SeqCst) == ASLEEP
    {
        mailbox.ring();
    }
    Ok(())
}

/// The mailbox of an open context.
pub(crate) fn mailbox(of: ExecutorId) -> &'static Mailbox {
    &MAILBOXES[usize::from(of.index)]
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        if let Some(eventfd) = self.eventfd.get() {
            // Nothing to do about an error, and none is known but a counter at its maximum, when
            // the receiver is woken already.
            let _ = eventfd.write(1);
        }
    }

    /// The descriptor that becomes readable when the sleeping context must wake up.
    pub(crate) fn eventfd(&self) -> BorrowedFd<'_> {
        self.eventfd
            .get()
            .expect("made when the mailbox was opened")
            .as_fd()
    }

    /// Resets the eventfd, which is readable.
    pub(crate) fn silence(&self) {
        if let Some(eventfd) = self.eventfd.get() {
            // Nothing to do about an error, and none is known for a readable eventfd.
            let _ = eventfd.read();
        }
    }

    /// Whether there may be messages.
    pub(crate) fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// Moves all messages to `into`, which is empty.
    pub(crate) fn take(&self, into: &mut Vec<Message>) {
        let mut queue = self.lock();
        self.filled.store(false, Ordering::SeqCst);
        std::mem::swap(&mut queue.messages, into);
    }

    /// Announces that the context will sleep. False, and no announcement, when there are messages.
    pub(crate) fn prepare_sleep(&self) -> bool {
        self.state.store(ASLEEP, Ordering::SeqCst);
        if self.filled.load(Ordering::SeqCst) {
            self.state.store(AWAKE, Ordering::SeqCst);
            return false;
        }
        true
    }

    /// Ends the announced sleep, so that senders need not ring.
    pub(crate) fn wake_up(&self) {
        self.state.store(AWAKE, Ordering::Release);
    }

    /// Closes the mailbox and frees the index, unless there are messages.
    pub(crate) fn close_if_empty(&self) -> bool {
        let mut queue = self.lock();
        if !queue.messages.is_empty() {
            return false;
        }
        queue.open = false;
        queue.generation = queue.generation.wrapping_add(1);
        queue.messages = Vec::new();
        true
    }
}
