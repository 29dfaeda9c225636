//! The io_uring transport: the kernel puts requests into memory of ours and takes the replies from there, in one command each.
//!
//! The kernel has a queue for each processor and sends a request to the queue of the processor that it is made on. The queues are dealt
//! over the export's contexts. Each has a number of entries; an entry is a task that waits for a request, answers it, at once where
//! that needs no waiting, and gives the reply in exchange for the next request. All entries of a context that are ready together go to
//! the kernel in one system call. The kernel prefers the entry that waits for the shortest time, so that little memory is in use.
//!
//! When all entries of a queue have requests that wait for the storage, the queue gets more of them, as far as their payloads are small.
//!
//! Moving a large payload is work for a processor. Where large requests wait for others on one context, another one that has less to
//! do takes the entry over; the entry stays there until a small request comes in it.
//!
//! What the kernel sends past its queues, FORGET and INTERRUPT, arrives at the device, where the classic transport serves it.
//!
//! An entry cannot be taken back from the kernel. It ends when the connection does, or when it has a request in it and goes to
//! another process with that (`held`).

use std::cell::{Cell, RefCell};
use std::fs;
use std::future::{Future as _, poll_fn};
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use stord_aio::sync::{mpsc, oneshot};
use stord_aio::{Errno, UringCmd, is_quiet, spawn_local, submit_now, turns, yield_now};

use super::abi::{InHeader, OutHeader, opcode};
use super::buffers::MAX_PAYLOAD;
use super::entries::{Common, ENTRIES, Message, Then};
use super::follow;
use super::held::Held;
use super::idle::IdleWatch;
use super::request::{Reply, Request};
use super::ring_entry::{EntryParts, RingEntry};

/// Entries that a queue gets at a time, and that it has at most.
const MORE_ENTRIES: usize = 8;
const MOST_ENTRIES: usize = 64;
/// A queue with so many bytes of payload under way gets no more entries.
const ENOUGH_BYTES: usize = 2 << 20;
/// Payloads of so many bytes are worth another context's while.
const LARGE: u32 = 64 << 10;
/// What an idle entry's payload may take up, in bytes.
const KEPT: usize = 16 << 10;

/// One context's part of an export.
struct Share {
    common: Arc<Common>,
    /// Which of the places this is.
    place: usize,
    device: Rc<OwnedFd>,
    /// The queues whose home is here.
    queues: Vec<Rc<Queue>>,
    idle: Rc<IdleWatch>,
    /// The turn of the loop in which the last request arrived.
    turn: Cell<u64>,
    /// Entries whose payload takes up much memory.
    swollen: RefCell<Vec<Rc<Trim>>>,
    /// Why an entry could not be registered.
    refused: Cell<Option<Errno>>,
}

/// One of the kernel's queues.
struct Queue {
    number: u16,
    /// Entries there are, and those whose requests wait for the storage.
    entries: Cell<usize>,
    waiting: Cell<usize>,
    /// The bytes of payload of the latter.
    bytes: Cell<usize>,
}

/// How an entry that waits for a request is told to give memory back.
#[derive(Default)]
struct Trim {
    wanted: Cell<bool>,
    waker: Cell<Option<Waker>>,
}

/// A request in an entry.
struct Incoming {
    header: InHeader,
    request: Request,
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

/// Registers entries for the kernel's queues `numbers` on the calling context, which is the one at `place`, and serves them until none
/// is left. Where a queue has entries already, so many as stand beside its number, these come by themselves. `registered` is told whether
/// the kernel took the others; those that it took are served either way.
pub(super) async fn serve(
    common: Arc<Common>,
    place: usize,
    device: OwnedFd,
    numbers: Vec<(u16, usize)>,
    mut inbox: mpsc::UnboundedReceiver<Message>,
    registered: oneshot::Sender<Result<(), Errno>>,
) {
    let queues = numbers.into_iter().map(Queue::new).map(Rc::new).collect();
    let share = Rc::new(Share {
        common,
        place,
        device: Rc::new(device),
        queues,
        idle: Rc::default(),
        turn: Cell::new(0),
        swollen: RefCell::default(),
        refused: Cell::new(None),
    });
    for queue in &share.queues {
        if queue.entries.get() == 0 {
            share.add_entries(queue, ENTRIES);
        }
    }
    // A refused entry completes as it is submitted, which is in one of these turns of the loop.
    yield_now().await;
    yield_now().await;
    // The one who asked waits for it.
    let _ = registered.send(share.refused.get().map_or(Ok(()), Err));
    while let Some(Message::Entry(Held { parts, then })) = inbox.recv().await {
        let share = Rc::clone(&share);
        spawn_local(async move {
            let entry = RingEntry::new(parts, &share.device);
            share.serve(entry, Some(then)).await;
        });
    }
    share.idle.finish();
}

impl Queue {
    fn new((number, entries): (u16, usize)) -> Self {
        Self {
            number,
            entries: Cell::new(entries),
            waiting: Cell::new(0),
            bytes: Cell::new(0),
        }
    }

    /// Whether more entries would be of use.
    fn is_short(&self) -> bool {
        self.waiting.get() >= self.entries.get()
            && self.entries.get() < MOST_ENTRIES
            && self.bytes.get() < ENOUGH_BYTES
    }
}

impl Share {
    /// Registers entries that the common count has.
    fn add_entries(self: &Rc<Self>, queue: &Rc<Queue>, count: usize) {
        queue.entries.set(queue.entries.get() + count);
        for _ in 0..count {
            let Some(parts) = EntryParts::new(queue.number) else {
                self.refused.set(Some(Errno::ENOMEM));
                self.common.entry_ended(queue.number);
                continue;
            };
            let share = Rc::clone(self);
            spawn_local(async move {
                let entry = RingEntry::new(parts, &share.device);
                share.serve(entry, None).await;
            });
        }
    }

    /// Serves an entry until it ends or another context takes it over. A new one is registered first.
    async fn serve(self: &Rc<Self>, mut entry: RingEntry, then: Option<Then>) {
        let home = self.queues.iter().find(|q| q.number == entry.queue());
        let mut touched = 0;
        match then {
            None => {
                let Some(registered) = entry.register() else {
                    self.refused.set(Some(Errno::ENOTSUP));
                    return self.common.entry_ended(entry.queue());
                };
                if let Some(errno) = failure(registered.await) {
                    if errno != Errno::ENOTCONN {
                        self.refused.set(Some(errno));
                    }
                    return self.common.entry_ended(entry.queue());
                }
            }
            Some(Then::Receive) => {}
            Some(Then::Answer) => {
                let incoming = Incoming::read(&mut entry);
                touched = self.answer_large(&entry, incoming).await;
            }
            // It comes back from where it was used for large requests.
            Some(Then::Commit) => touched = MAX_PAYLOAD,
        }
        let mut has_request = matches!(then, None | Some(Then::Receive));
        let mut trim = None;
        loop {
            if has_request {
                entry = match self.keep(entry, Then::Receive) {
                    Some(entry) => entry,
                    None => return,
                };
                self.note_arrival(&entry);
                let incoming = Incoming::read(&mut entry);
                if incoming.request.payload() < LARGE {
                    touched = self.answer(&entry, incoming, home).await;
                    if home.is_none() {
                        return self.common.send_home(vec![entry.held(Then::Commit)]);
                    }
                } else if let Some(other) = self.queue_large().await {
                    return self.common.tell(other, entry.held(Then::Answer));
                } else {
                    touched = self.answer_large(&entry, incoming).await;
                }
            }
            has_request = true;
            entry = match self.keep(entry, Then::Commit) {
                Some(entry) => entry,
                None => return,
            };
            let Some(committed) = entry.commit() else {
                unreachable!("an entry is on a context with a ring");
            };
            if touched >= LARGE as usize {
                // While the payload is in the processor's cache.
                submit_now();
            }
            if touched > KEPT && trim.is_none() {
                trim = Some(self.note_swollen());
            }
            let result = match &trim {
                None => committed.await,
                Some(wanted) => {
                    let (result, is_trimmed) = wait_or_trim(committed, wanted, &entry).await;
                    if is_trimmed {
                        trim = None;
                    }
                    result
                }
            };
            if failure(result).is_some() {
                return self.common.entry_ended(entry.queue());
            }
        }
    }

    /// Holds an entry where that is wanted; otherwise gives it back.
    fn keep(&self, entry: RingEntry, then: Then) -> Option<RingEntry> {
        if !self.common.is_holding() {
            return Some(entry);
        }
        match self.common.keep(entry.held(then)) {
            Ok(()) => None,
            Err(Held { parts, .. }) => Some(RingEntry::new(parts, &self.device)),
        }
    }

    /// Takes notice of a request that has arrived.
    fn note_arrival(&self, entry: &RingEntry) {
        self.idle.note();
        if self.turn.replace(turns()) == turns() {
            follow::together();
        } else {
            let queue = entry.queue();
            follow::alone(queue.into(), || Some(queue.into()));
        }
    }

    /// Puts a large request in line. Gives the context that is to answer it, if that is another one.
    async fn queue_large(&self) -> Option<usize> {
        self.common.begin_large(self.place);
        // So that those which have arrived together are all in line.
        yield_now().await;
        self.common.relieve(self.place)
    }

    /// Answers a large request that is in line here. Gives the bytes of payload that were used.
    async fn answer_large(self: &Rc<Self>, entry: &RingEntry, incoming: Incoming) -> usize {
        let touched = self.answer(entry, incoming, None).await;
        self.common.end_large(self.place);
        touched
    }

    /// Answers the request in an entry. Gives the bytes of payload that were used.
    async fn answer(
        self: &Rc<Self>,
        entry: &RingEntry,
        incoming: Incoming,
        home: Option<&Rc<Queue>>,
    ) -> usize {
        let Incoming { header, request } = incoming;
        let touched = request.payload() as usize;
        let file_system = self.common.file_system();
        let reply = match file_system.try_handle(header.nodeid, &request, entry.payload()) {
            Some(reply) => reply,
            None => {
                if let Some(queue) = home {
                    self.note_waiting(queue, touched);
                }
                let handled = file_system.handle(header.nodeid, request, entry.payload().clone());
                // An entry is small while it waits for a request.
                let reply = Box::pin(handled).await;
                if let Some(queue) = home {
                    queue.waiting.set(queue.waiting.get() - 1);
                    queue.bytes.set(queue.bytes.get() - touched);
                }
                reply
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
        touched
    }

    /// Notes a request that waits for the storage; gets the queue more entries when it has none left.
    fn note_waiting(self: &Rc<Self>, queue: &Rc<Queue>, bytes: usize) {
        queue.waiting.set(queue.waiting.get() + 1);
        queue.bytes.set(queue.bytes.get() + bytes);
        if queue.is_short() && self.common.expect(queue.number, MORE_ENTRIES) {
            self.add_entries(queue, MORE_ENTRIES);
        }
    }

    /// Notes an entry that takes up much memory.
    fn note_swollen(self: &Rc<Self>) -> Rc<Trim> {
        let trim = Rc::new(Trim::default());
        self.swollen.borrow_mut().push(Rc::clone(&trim));
        let share = Rc::downgrade(self);
        self.idle.watch(move || {
            let swollen = share.upgrade().map(|share| share.swollen.take());
            for trim in swollen.into_iter().flatten() {
                trim.wanted.set(true);
                if let Some(waker) = trim.waker.take() {
                    waker.wake();
                }
            }
        });
        trim
    }
}

impl Incoming {
    fn read(entry: &mut RingEntry) -> Self {
        let (header, mut arguments, payload) = entry.request();
        if header.opcode == opcode::LOOKUP {
            // A name without a structure before it comes as payload.
            let length = arguments.len().min(payload as usize);
            arguments.fill(0);
            entry.payload().read_at(0, &mut arguments[..length]);
        }
        let mut request = Request::parse(header.opcode, &arguments);
        if matches!(request, Request::Write { .. }) && request.payload() > payload {
            request = Request::Malformed;
        }
        Self { header, request }
    }
}

/// Waits for the next request, and gives memory back while there is none. The second result tells whether that was done.
async fn wait_or_trim(committed: UringCmd, trim: &Trim, entry: &RingEntry) -> (i32, bool) {
    let mut committed = pin!(committed);
    let mut is_trimmed = false;
    poll_fn(|cx| {
        if let Poll::Ready(result) = committed.as_mut().poll(cx) {
            return Poll::Ready((result, is_trimmed));
        }
        if trim.wanted.get() {
            // Else the reply might not have gone yet, or a request have come.
            if is_quiet() {
                entry.payload().release(KEPT..entry.payload().len());
                trim.wanted.set(false);
                is_trimmed = true;
            } else {
                cx.waker().wake_by_ref();
            }
        }
        trim.waker.set(Some(cx.waker().clone()));
        Poll::Pending
    })
    .await
}

fn failure(result: i32) -> Option<Errno> {
    (result < 0).then(|| Errno::from_raw(result.wrapping_neg()))
}
