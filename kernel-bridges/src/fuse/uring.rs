//! The io_uring transport: the kernel puts requests into memory of ours and takes the replies from there, in one command each.
//!
//! The kernel has a queue for each processor and sends a request to the queue of the processor that it is made on. The queues are dealt
//! over the export's contexts. Each has a number of entries; an entry is a task that waits for a request, answers it, at once where
//! that needs no waiting, and gives the reply in exchange for the next request. All entries of a context that are ready together go to
//! the kernel in one system call.
//!
//! What the kernel sends past its queues, FORGET and INTERRUPT, arrives at the device, where the classic transport serves it.
//!
//! An entry cannot be taken back from the kernel. It ends when the connection does.

use std::cell::{Cell, RefCell};
use std::fs;
use std::future::{Future as _, poll_fn};
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use stord_aio::sync::oneshot;
use stord_aio::{Errno, UringCmd, join_all, spawn_local, yield_now};

use super::abi::{OutHeader, opcode};
use super::buffers::MAX_PAYLOAD;
use super::idle::IdleWatch;
use super::request::{Reply, Request};
use super::ring_entry::RingEntry;
use super::session::Session;

/// Entries of one queue, all idle ones of which take two pages of memory.
const ENTRIES: usize = 16;
/// What an idle entry's payload may take up, in bytes.
const KEPT: usize = 16 << 10;

/// The kernel's queues that one context serves.
struct Queues {
    session: Arc<Session>,
    idle: Rc<IdleWatch>,
    /// Entries whose payload takes up much memory.
    large: RefCell<Vec<Rc<Trim>>>,
    /// Why an entry could not be registered.
    refused: Cell<Option<Errno>>,
}

/// How an entry that waits for a request is told to give memory back.
///
/// Only the entry itself knows that no request has arrived in its memory, and only when it is polled: the kernel puts requests there
/// while this thread is in `io_uring_enter`, and no completion of that call is unread when tasks run.
#[derive(Default)]
struct Trim {
    wanted: Cell<bool>,
    waker: Cell<Option<Waker>>,
}

/// Entries registered on the calling context.
pub(super) struct Served {
    queues: Rc<Queues>,
    entries: Vec<oneshot::Receiver<()>>,
}

/// The number of queues that the kernel has: one for each processor that there might be.
///
/// # Errors
/// The system does not tell.
pub(super) fn queue_count() -> Result<u16, Errno> {
    let text = fs::read_to_string("/sys/devices/system/cpu/possible").map_err(|_| Errno::ENOENT)?;
    let last = text
        .trim()
        .rsplit([',', '-'])
        .next()
        .and_then(|last| last.parse::<u16>().ok());
    last.and_then(|last| last.checked_add(1))
        .ok_or(Errno::EINVAL)
}

/// Registers entries for the kernel's queues `numbers` on the calling context. The first result says whether the kernel took them;
/// those that it took are served either way.
pub(super) async fn register(
    device: OwnedFd,
    session: Arc<Session>,
    numbers: Vec<u16>,
) -> (Result<(), Errno>, Served) {
    let device = Rc::new(device);
    let queues = Rc::new(Queues {
        session,
        idle: Rc::default(),
        large: RefCell::default(),
        refused: Cell::new(None),
    });
    let mut entries = Vec::new();
    for number in numbers {
        for _ in 0..ENTRIES {
            let (ended, wait) = oneshot::channel();
            let entry = RingEntry::new(&device, number, MAX_PAYLOAD);
            let queues = Rc::clone(&queues);
            spawn_local(async move {
                queues.serve(entry).await;
                // Nobody waits where another entry was refused.
                let _ = ended.send(());
            });
            entries.push(wait);
        }
    }
    // A refused entry completes as it is submitted, which is in one of these turns of the loop.
    yield_now().await;
    yield_now().await;
    let result = queues.refused.get().map_or(Ok(()), Err);
    (result, Served { queues, entries })
}

impl Served {
    /// Returns when the connection has ended and no request is under way.
    pub(super) async fn ended(self) {
        for entry in join_all(self.entries).await {
            // Sent or dropped: the entry has ended.
            let _ = entry;
        }
        self.queues.idle.finish();
    }
}

impl Queues {
    async fn serve(self: &Rc<Self>, mut entry: RingEntry) {
        let Some(registered) = entry.register() else {
            self.refused.set(Some(Errno::ENOTSUP));
            return;
        };
        let mut result = registered.await;
        if let Some(errno) = failure(result) {
            if errno != Errno::ENOTCONN {
                self.refused.set(Some(errno));
            }
            return;
        }
        let mut trim = None;
        while failure(result).is_none() {
            let touched = self.answer(&mut entry).await;
            let Some(committed) = entry.commit() else {
                return;
            };
            if touched > KEPT && trim.is_none() {
                trim = Some(self.note_large());
            }
            result = match &trim {
                None => committed.await,
                Some(wanted) => {
                    let (result, trimmed) = wait_or_trim(committed, wanted, &entry).await;
                    if trimmed {
                        trim = None;
                    }
                    result
                }
            };
        }
    }

    /// Notes an entry that takes up much memory.
    fn note_large(self: &Rc<Self>) -> Rc<Trim> {
        let trim = Rc::new(Trim::default());
        self.large.borrow_mut().push(Rc::clone(&trim));
        let queues = Rc::downgrade(self);
        self.idle.watch(move || {
            let large = queues.upgrade().map(|queues| queues.large.take());
            for trim in large.into_iter().flatten() {
                trim.wanted.set(true);
                if let Some(waker) = trim.waker.take() {
                    waker.wake();
                }
            }
        });
        trim
    }

    /// Answers the request in the entry. Gives the bytes of payload that were used.
    async fn answer(self: &Rc<Self>, entry: &mut RingEntry) -> usize {
        self.idle.note();
        let (header, mut arguments, payload) = entry.request();
        if header.opcode == opcode::LOOKUP && payload > 0 {
            // Its name comes as payload.
            let len = arguments.len().min(payload as usize);
            arguments.fill(0);
            entry.payload().read_at(0, &mut arguments[..len]);
        }
        let mut request = Request::parse(header.opcode, &arguments);
        if matches!(request, Request::Write { .. }) && request.payload() > payload {
            request = Request::Malformed;
        }
        let file_system = &self.session.file_system;
        let reply = match file_system.try_handle(header.nodeid, &request, entry.payload()) {
            Some(reply) => reply,
            None => {
                let payload = entry.payload().clone();
                file_system.handle(header.nodeid, request, payload).await
            }
        };
        let (error, length) = match &reply {
            Reply::Done | Reply::Silence => (0, 0),
            Reply::Payload(length) => (0, *length),
            Reply::Bytes(bytes) => {
                entry.payload().write_at(0, bytes.as_slice());
                let length = u32::try_from(bytes.as_slice().len());
                (0, length.expect("a structure of the wire format"))
            }
            Reply::Failed(errno) => (-(*errno as i32), 0),
        };
        let out = OutHeader {
            len: u32::try_from(size_of::<OutHeader>()).expect("16") + length,
            error,
            unique: header.unique,
        };
        entry.reply(&out, length);
        request.payload() as usize
    }
}

/// Waits for the next request, and gives memory back while there is none. The second result tells whether that was done.
async fn wait_or_trim(committed: UringCmd, trim: &Trim, entry: &RingEntry) -> (i32, bool) {
    let mut committed = pin!(committed);
    let mut trimmed = false;
    poll_fn(|cx| {
        if let Poll::Ready(result) = committed.as_mut().poll(cx) {
            return Poll::Ready((result, trimmed));
        }
        if trim.wanted.replace(false) {
            entry.payload().release(KEPT..entry.payload().len());
            trimmed = true;
        }
        trim.waker.set(Some(cx.waker().clone()));
        Poll::Pending
    })
    .await
}

fn failure(result: i32) -> Option<Errno> {
    (result < 0).then(|| Errno::from_raw(result.wrapping_neg()))
}
