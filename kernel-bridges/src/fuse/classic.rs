//! The classic transport: requests are read from `/dev/fuse`, replies are written to it.
//!
//! Each queue is a descriptor of the same connection on a context of its own. A request is fetched when the descriptor is ready and
//! answered at once by the thread that fetched it, if that needs no waiting; otherwise it becomes a task. The reply goes to the
//! descriptor that the request came from.
//!
//! Every descriptor that waits for requests is woken by every request. So, while there is little to do, only the first queue waits.
//! When it finds a request waiting behind the one it has, it calls another queue, which goes back to rest when it finds none. (That the
//! next request is there as soon as the last is answered says nothing: so it is too with a single client on the same processor.)
//!
//! With requests waiting behind, a queue also changes its pace: it fetches several before it answers, and sends the replies together
//! through the context's ring. That spares system calls, and a client on the same processor is not switched to after each reply.
//!
//! A queue ends when it is told to, or when the connection does: on unmount. It finishes the requests it has fetched, and closes its
//! descriptor on its own context, so that no other thread can see the descriptor's number used again.

use std::cell::Cell;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use stord_aio::sync::Notify;
use stord_aio::{Context, Errno, IoVec, PolledFd, join_all, spawn_local, yield_now};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::abi::{InHeader, MAX_ARGUMENTS, NOTIFY_INVAL_INODE, NotifyInvalInodeOut, OutHeader};
use super::buffers::{BEFORE_PAYLOAD, Buffers, RequestBuffer};
use super::follow;
use super::idle::IdleWatch;
use super::request::{Reply, Request};
use super::session::Session;
use super::waiting::{Clocks, Waiting};

/// A queue with so many bytes of memory in use by tasks fetches no more.
const MAX_BYTES_IN_FLIGHT: usize = 8 << 20;
/// Memory that a request uses besides its payload, in bytes.
const REQUEST_OVERHEAD: usize = 4096;
/// So many requests are answered before the other tasks of the context get their turn.
const BURST: u32 = 64;
/// The most requests fetched before the first of them is answered, and the most bytes of payload among them.
const BATCH: usize = 16;
const BATCH_BYTES: usize = 256 << 10;
/// Every so many requests without a pause a queue looks whether others wait behind the one it has.
const LOOK_BEHIND: u32 = 8;
/// A called queue that found nothing to help with so often goes back to rest.
const USELESS_WAKES: u32 = 2;
/// A client that sends nothing for so long pauses.
const PAUSE: Duration = Duration::from_millis(1);

/// One descriptor on one context.
struct Queue {
    device: PolledFd,
    session: Arc<Session>,
    index: usize,
    buffers: Buffers,
    /// Requests that are tasks.
    tasks: Cell<usize>,
    /// Memory they use, in bytes.
    bytes: Cell<usize>,
    /// A task has ended.
    ended: Notify,
    idle: Rc<IdleWatch>,
    uses_ring: bool,
}

/// A request as it was read.
struct Incoming {
    buffer: RequestBuffer,
    unique: u64,
    node: u64,
    /// The thread that it was made by.
    thread: u32,
    request: Request,
}

/// What one attempt to fetch a request gave.
enum Fetched {
    Request(Incoming),
    /// One that was taken back while it was being read.
    TakenBack,
    /// Nothing yet.
    Empty,
    /// The connection has ended.
    Closed,
}

/// A reply in the memory of its request.
struct Answer {
    buffer: RequestBuffer,
    message: IoVec,
}

/// What a queue waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    Readable,
    Notice,
}

/// Serves requests from `device` on the calling context until the session or the connection ends.
pub(super) async fn serve(device: OwnedFd, session: Arc<Session>, index: usize) {
    let device = match PolledFd::new(device) {
        Ok(device) => device,
        Err(error) => {
            tracing::error!(%error, "a FUSE queue cannot start");
            return;
        }
    };
    let queue = Rc::new(Queue {
        device,
        session,
        index,
        buffers: Buffers::default(),
        tasks: Cell::new(0),
        bytes: Cell::new(0),
        ended: Notify::new(),
        idle: Rc::default(),
        uses_ring: Context::current().is_some_and(|context| context.uses_ring()),
    });
    queue.run().await;
    // When the connection has ended, the queues at rest do not see it by themselves.
    queue.session.stop();
    queue.idle.finish();
    while queue.tasks.get() > 0 {
        queue.ended.notified().await;
    }
}

/// How a queue works through its requests.
#[derive(Default)]
struct Pace {
    /// Requests since the queue last waited.
    streak: u32,
    /// Requests are fetched several at a time.
    deep: bool,
    /// How often in a row the queue found too little to be of use.
    useless: u32,
    /// Who made the last request that was answered by itself.
    thread: u32,
    waiting: Waiting,
}

impl Pace {
    /// Draws near to a client that has sent one request and waits for the reply.
    fn follow(&self) {
        if self.streak == 1 && self.thread != 0 {
            let thread = self.thread;
            follow::alone(thread.into(), || follow::processor_of(thread));
        }
    }
}

/// What one step of a queue gave.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Worked,
    Empty,
    Closed,
}

impl Incoming {
    /// Looks at `length` bytes that were read from the device.
    fn read(mut buffer: RequestBuffer, length: usize) -> Self {
        let mut bytes = [0u8; size_of::<InHeader>() + MAX_ARGUMENTS];
        let known = length.min(bytes.len());
        buffer.read_request(0, &mut bytes[..known]);
        let Ok((header, arguments)) = InHeader::read_from_prefix(&bytes) else {
            unreachable!("the array is longer than the header");
        };
        let Ok(arguments) = arguments.try_into() else {
            unreachable!("the array has so many bytes after the header");
        };
        let mut request = Request::parse(header.opcode, arguments);
        let payload = request.payload() as usize;
        let is_write = matches!(request, Request::Write { .. });
        if is_write && BEFORE_PAYLOAD + payload > length {
            request = Request::Malformed;
        }
        buffer.touch(payload.max(length.saturating_sub(BEFORE_PAYLOAD)));
        Self {
            buffer,
            unique: header.unique,
            node: header.nodeid,
            thread: header.pid,
            request,
        }
    }
}

impl Queue {
    async fn run(self: &Rc<Self>) {
        let is_helper = self.index > 0;
        let mut pace = Pace::default();
        if is_helper {
            self.session.rest(self.index);
        }
        loop {
            if self.session.is_stopping() {
                return;
            }
            if !is_helper {
                for node in self.session.take_stale() {
                    self.invalidate_attributes(node);
                }
            }
            if self.session.is_held() || self.session.is_resting(self.index) {
                self.session.notice(self.index).notified().await;
                continue;
            }
            if self.bytes.get() >= MAX_BYTES_IN_FLIGHT {
                self.ended.notified().await;
                continue;
            }
            let step = if pace.deep {
                self.serve_batch(&mut pace).await
            } else {
                self.serve_one(&mut pace)
            };
            if step == Step::Closed {
                return;
            }
            if is_helper && pace.useless > USELESS_WAKES {
                pace.useless = 0;
                pace.deep = false;
                pace.streak = 0;
                self.session.rest(self.index);
                continue;
            }
            if step == Step::Empty {
                pace.follow();
                pace.streak = 0;
                self.trim_when_idle();
                if !is_helper && self.look(&mut pace.waiting).await {
                    continue;
                }
                let began = Instant::now();
                if self.event().await.is_err() {
                    return;
                }
                if began.elapsed() > PAUSE {
                    pace.waiting.disturbed();
                }
            } else if pace.streak >= BURST {
                pace.streak = 0;
                yield_now().await;
            }
        }
    }

    /// Answers one request, or from time to time two, to see whether one waits behind another.
    fn serve_one(self: &Rc<Self>, pace: &mut Pace) -> Step {
        let incoming = match self.fetch() {
            Fetched::Request(incoming) => incoming,
            Fetched::TakenBack => return Step::Worked,
            Fetched::Closed => return Step::Closed,
            Fetched::Empty => {
                if pace.streak < 2 {
                    pace.useless += 1;
                }
                return Step::Empty;
            }
        };
        pace.streak += 1;
        pace.thread = incoming.thread;
        pace.waiting.answered(clocks);
        let behind = if pace.streak.is_multiple_of(LOOK_BEHIND) {
            self.fetch()
        } else {
            Fetched::TakenBack
        };
        if let Some(answer) = self.handle(incoming) {
            self.send(answer);
        }
        match behind {
            Fetched::Request(incoming) => {
                pace.deep = true;
                pace.useless = 0;
                pace.waiting.disturbed();
                self.session.call_help();
                if let Some(answer) = self.handle(incoming) {
                    self.send(answer);
                }
            }
            Fetched::Empty => pace.useless += 1,
            Fetched::TakenBack => {}
            Fetched::Closed => return Step::Closed,
        }
        Step::Worked
    }

    /// Answers the requests that are there, up to a limit.
    async fn serve_batch(self: &Rc<Self>, pace: &mut Pace) -> Step {
        let mut requests = Vec::with_capacity(BATCH);
        let mut bytes = 0;
        let mut end = None;
        while requests.len() < BATCH && bytes < BATCH_BYTES {
            match self.fetch() {
                Fetched::Request(incoming) => {
                    bytes += incoming.request.payload() as usize;
                    requests.push(incoming);
                }
                Fetched::TakenBack => {}
                Fetched::Empty => {
                    end = Some(Step::Empty);
                    break;
                }
                Fetched::Closed => {
                    end = Some(Step::Closed);
                    break;
                }
            }
        }
        let count = requests.len();
        let answers = requests
            .into_iter()
            .filter_map(|incoming| self.handle(incoming))
            .collect();
        pace.streak += u32::try_from(count).expect("a batch is small");
        if count < 2 {
            pace.deep = false;
            pace.useless += 1;
        } else {
            pace.useless = 0;
            follow::together();
            self.session.call_help();
        }
        self.send_all(answers).await;
        match end {
            Some(Step::Empty) if count > 0 => Step::Worked,
            Some(end) => end,
            None => Step::Worked,
        }
    }

    /// Looks for the next request for a moment, where that is better than sleeping. True when there is something to do.
    async fn look(self: &Rc<Self>, waiting: &mut Waiting) -> bool {
        let Some(time) = waiting.look() else {
            return false;
        };
        let began = Instant::now();
        while began.elapsed() < time {
            match self.fetch() {
                Fetched::Request(incoming) => {
                    waiting.answered(clocks);
                    let thread = incoming.thread;
                    if thread != 0 {
                        follow::alone(thread.into(), || follow::processor_of(thread));
                    }
                    if let Some(answer) = self.handle(incoming) {
                        self.send(answer);
                    }
                    return true;
                }
                // It is found again by who asks for it.
                Fetched::Closed => return true,
                Fetched::Empty | Fetched::TakenBack => {}
            }
            if self.session.is_stopping() || self.session.is_held() {
                return true;
            }
            // The other tasks of the context, and its events.
            yield_now().await;
        }
        waiting.looked_in_vain();
        false
    }

    /// Waits for a request or a notice.
    async fn event(&self) -> Result<Event, Errno> {
        let mut readable = pin!(self.device.readable());
        let mut notice = pin!(self.session.notice(self.index).notified());
        poll_fn(|cx| {
            if let Poll::Ready(result) = readable.as_mut().poll(cx) {
                return Poll::Ready(result.map(|()| Event::Readable));
            }
            notice.as_mut().poll(cx).map(|()| Ok(Event::Notice))
        })
        .await
    }

    /// Reads one request.
    fn fetch(&self) -> Fetched {
        let buffer = self.buffers.take();
        match self.device.try_read(buffer.request()) {
            Ok(length) => {
                self.idle.note();
                Fetched::Request(Incoming::read(buffer, length))
            }
            Err(errno) => {
                self.buffers.put(buffer);
                match errno {
                    Errno::EAGAIN => Fetched::Empty,
                    Errno::ENOENT | Errno::EINTR => Fetched::TakenBack,
                    // Unmounted or aborted.
                    Errno::ENODEV | Errno::ECONNABORTED => Fetched::Closed,
                    _ => {
                        tracing::error!(%errno, "reading from /dev/fuse failed");
                        Fetched::Closed
                    }
                }
            }
        }
    }

    /// Gives the answer to a request, if there is one already and one is wanted; otherwise a task sees to it.
    fn handle(self: &Rc<Self>, incoming: Incoming) -> Option<Answer> {
        let Incoming {
            buffer,
            unique,
            node,
            request,
            ..
        } = incoming;
        let file_system = &self.session.file_system;
        if let Some(reply) = file_system.try_handle(node, &request, buffer.payload()) {
            return self.prepare(buffer, unique, &reply);
        }
        let memory = request.payload() as usize + REQUEST_OVERHEAD;
        self.tasks.set(self.tasks.get() + 1);
        self.bytes.set(self.bytes.get() + memory);
        let queue = Rc::clone(self);
        spawn_local(async move {
            let payload = buffer.payload().clone();
            let file_system = &queue.session.file_system;
            let reply = file_system.handle(node, request, payload).await;
            if let Some(answer) = queue.prepare(buffer, unique, &reply) {
                queue.send(answer);
            }
            queue.tasks.set(queue.tasks.get() - 1);
            queue.bytes.set(queue.bytes.get() - memory);
            queue.ended.notify_one();
        });
        None
    }

    /// Writes a reply into the request's memory, unless nobody waits for it.
    fn prepare(&self, buffer: RequestBuffer, unique: u64, reply: &Reply) -> Option<Answer> {
        let (error, length) = match reply {
            Reply::Silence => {
                self.buffers.put(buffer);
                return None;
            }
            Reply::Done => (0, 0),
            Reply::Payload(length) => (0, *length as usize),
            Reply::Bytes(bytes) => {
                buffer.payload().write_at(0, bytes.as_slice());
                (0, bytes.as_slice().len())
            }
            Reply::Failed(errno) => (-(*errno as i32), 0),
        };
        let header = OutHeader {
            len: u32::try_from(size_of::<OutHeader>() + length)
                .expect("payloads are at most 1 MiB"),
            error,
            unique,
        };
        let message = buffer.reply(&header, length);
        Some(Answer { buffer, message })
    }

    /// Sends one answer at once.
    fn send(&self, answer: Answer) {
        note_refusal(self.device.try_write(&answer.message));
        self.buffers.put(answer.buffer);
    }

    /// Sends several answers together.
    async fn send_all(&self, answers: Vec<Answer>) {
        if answers.len() < 2 || !self.uses_ring {
            for answer in answers {
                self.send(answer);
            }
            return;
        }
        let writes = answers
            .iter()
            .map(|answer| self.device.write(answer.message.clone()))
            .collect();
        for written in join_all(writes).await {
            note_refusal(written);
        }
        for answer in answers {
            self.buffers.put(answer.buffer);
        }
    }

    /// Tells the kernel to ask for the attributes when it needs them next.
    fn invalidate_attributes(&self, node: u64) {
        let notice = NotifyInvalInodeOut {
            ino: node,
            off: -1,
            len: 0,
        };
        let buffer = self.buffers.take();
        buffer.payload().write_at(0, notice.as_bytes());
        let length = size_of::<NotifyInvalInodeOut>();
        let header = OutHeader {
            len: u32::try_from(size_of::<OutHeader>() + length).expect("a few bytes"),
            error: NOTIFY_INVAL_INODE,
            unique: 0,
        };
        // ENOENT: the kernel knows nothing of the file yet, or no more.
        let _ = self.device.try_write(&buffer.reply(&header, length));
        self.buffers.put(buffer);
    }

    /// Sees to it that memory is given back when there are no requests for a while.
    fn trim_when_idle(self: &Rc<Self>) {
        if self.buffers.is_excessive() {
            let queue = Rc::downgrade(self);
            self.idle.watch(move || {
                if let Some(queue) = queue.upgrade() {
                    queue.buffers.trim();
                }
            });
        }
    }
}

/// Says so when the kernel refused a reply for another reason than that nobody waits for it any more.
fn note_refusal(written: Result<usize, Errno>) {
    match written {
        // The one who asked has gone, or the file system is unmounted.
        Ok(_) | Err(Errno::ENOENT | Errno::ENODEV | Errno::EPERM | Errno::ECONNABORTED) => {}
        Err(errno) => tracing::error!(%errno, "a FUSE reply was refused"),
    }
}

fn clocks() -> Clocks {
    let read = |clock| clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
    Clocks {
        wall: read(ClockId::CLOCK_MONOTONIC),
        cpu: read(ClockId::CLOCK_THREAD_CPUTIME_ID),
    }
}
