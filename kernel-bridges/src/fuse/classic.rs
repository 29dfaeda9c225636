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
//! A queue ends when it is told to, or when the connection does: on unmount. It finishes the requests it has fetched, and closes its
//! descriptor on its own context, so that no other thread can see the descriptor's number used again.

use std::cell::Cell;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use stord_aio::sync::Notify;
use stord_aio::{Errno, PolledFd, spawn_local, time, yield_now};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::abi::{
    InHeader, MAX_ARGUMENTS, NOTIFY_INVAL_INODE, NotifyInvalInodeOut, OutHeader, ROOT_ID,
};
use super::buffers::{BEFORE_PAYLOAD, Buffers, RequestBuffer};
use super::request::{Reply, Request};
use super::session::Session;

/// A queue with so many bytes of memory in use by tasks fetches no more.
const MAX_BYTES_IN_FLIGHT: usize = 8 << 20;
/// Memory that a request uses besides its payload, in bytes.
const REQUEST_OVERHEAD: usize = 4096;
/// So many requests are answered before the other tasks of the context get their turn.
const BURST: u32 = 64;
/// Every so many requests without a pause a queue looks whether others wait behind the one it has.
const LOOK_BEHIND: u32 = 8;
/// A called queue that found nothing to help with so often goes back to rest.
const USELESS_WAKES: u32 = 2;
/// A queue without requests for so long gives memory back.
const IDLE: Duration = Duration::from_secs(1);

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
    /// A task waits to give memory back.
    trimming: Cell<bool>,
    /// No more is fetched.
    closed: Cell<bool>,
}

/// What one attempt to fetch a request gave.
enum Fetched {
    /// A request, in so many bytes.
    Request(RequestBuffer, usize),
    /// One that was taken back while it was being read.
    TakenBack,
    /// Nothing yet.
    Empty,
    /// The connection has ended.
    Closed,
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
        trimming: Cell::new(false),
        closed: Cell::new(false),
    });
    queue.run().await;
    // When the connection has ended, the queues at rest do not see it by themselves.
    queue.session.stop();
    queue.closed.set(true);
    while queue.tasks.get() > 0 {
        queue.ended.notified().await;
    }
}

impl Queue {
    async fn run(self: &Rc<Self>) {
        let is_helper = self.index > 0;
        let mut streak = 0;
        let mut useless = 0;
        if is_helper {
            self.session.rest(self.index);
        }
        loop {
            if self.session.is_stopping() {
                return;
            }
            if !is_helper && self.session.take_stale() {
                self.invalidate_attributes();
            }
            if self.session.is_held() || self.session.is_resting(self.index) {
                self.session.notice(self.index).notified().await;
                continue;
            }
            if self.bytes.get() >= MAX_BYTES_IN_FLIGHT {
                self.ended.notified().await;
                continue;
            }
            let fetched = self.fetch();
            if let Fetched::Request(buffer, length) = fetched {
                streak += 1;
                if streak % LOOK_BEHIND == 0 {
                    let behind = self.fetch();
                    self.dispatch(buffer, length);
                    match behind {
                        Fetched::Request(buffer, length) => {
                            self.dispatch(buffer, length);
                            useless = 0;
                            self.session.call_help();
                        }
                        Fetched::Closed => return,
                        Fetched::Empty | Fetched::TakenBack => useless += 1,
                    }
                } else {
                    self.dispatch(buffer, length);
                }
                if streak % BURST == 0 {
                    yield_now().await;
                }
            } else {
                match fetched {
                    Fetched::Closed => return,
                    Fetched::Empty => {}
                    Fetched::Request(..) | Fetched::TakenBack => continue,
                }
                if streak < 2 {
                    useless += 1;
                }
                streak = 0;
                if !(is_helper && useless > USELESS_WAKES) {
                    self.trim_when_idle();
                    if self.event().await.is_err() {
                        return;
                    }
                }
            }
            if is_helper && useless > USELESS_WAKES {
                useless = 0;
                self.session.rest(self.index);
            }
        }
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
            Ok(length) => Fetched::Request(buffer, length),
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

    /// Answers a request, or makes a task of it.
    fn dispatch(self: &Rc<Self>, mut buffer: RequestBuffer, length: usize) {
        let mut bytes = [0u8; size_of::<InHeader>() + MAX_ARGUMENTS];
        let known = length.min(bytes.len());
        buffer.read_request(0, &mut bytes[..known]);
        let Ok((header, arguments)) = InHeader::read_from_prefix(&bytes) else {
            unreachable!("the array is longer than the header");
        };
        let Ok(arguments) = arguments.try_into() else {
            unreachable!("the array has so many bytes after the header");
        };
        let request = Request::parse(header.opcode, arguments);
        let payload = request.payload() as usize;
        let is_complete =
            !matches!(request, Request::Write { .. }) || BEFORE_PAYLOAD + payload <= length;
        if !is_complete {
            self.answer(&buffer, header.unique, &Reply::Failed(Errno::EINVAL));
            self.buffers.put(buffer);
            return;
        }
        buffer.touch(payload.max(length.saturating_sub(BEFORE_PAYLOAD)));
        let file_system = &self.session.file_system;
        if let Some(reply) = file_system.try_handle(&request, buffer.payload()) {
            self.answer(&buffer, header.unique, &reply);
            self.buffers.put(buffer);
            return;
        }
        let memory = payload + REQUEST_OVERHEAD;
        self.tasks.set(self.tasks.get() + 1);
        self.bytes.set(self.bytes.get() + memory);
        let queue = Rc::clone(self);
        spawn_local(async move {
            let payload = buffer.payload().clone();
            let reply = queue.session.file_system.handle(request, payload).await;
            queue.answer(&buffer, header.unique, &reply);
            queue.buffers.put(buffer);
            queue.tasks.set(queue.tasks.get() - 1);
            queue.bytes.set(queue.bytes.get() - memory);
            queue.ended.notify_one();
        });
    }

    fn answer(&self, buffer: &RequestBuffer, unique: u64, reply: &Reply) {
        let (error, length) = match reply {
            Reply::Silence => return,
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
        let Ok(header) = header.as_bytes().try_into() else {
            unreachable!("a header is as long as a header");
        };
        match self.device.try_write(&buffer.reply(header, length)) {
            // The one who asked may have gone, and the file system may be unmounted.
            Ok(_) | Err(Errno::ENOENT | Errno::ENODEV | Errno::EPERM) => {}
            Err(errno) => tracing::error!(%errno, error, length, "a FUSE reply was refused"),
        }
    }

    /// Tells the kernel to ask for the attributes when it needs them next.
    fn invalidate_attributes(&self) {
        let notice = NotifyInvalInodeOut {
            ino: ROOT_ID,
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
        if let Ok(header) = header.as_bytes().try_into() {
            // ENOENT: the kernel knows nothing of the file yet, or no more.
            let _ = self.device.try_write(&buffer.reply(header, length));
        }
        self.buffers.put(buffer);
    }

    /// Sees to it that memory is given back when there are no requests for a while.
    fn trim_when_idle(self: &Rc<Self>) {
        if self.trimming.get() || !self.buffers.is_excessive() {
            return;
        }
        self.trimming.set(true);
        let queue = Rc::downgrade(self);
        spawn_local(async move {
            loop {
                let Some(activity) = queue.upgrade().map(|queue| queue.buffers.activity()) else {
                    return;
                };
                time::sleep(IDLE).await;
                let Some(queue) = queue.upgrade() else { return };
                if queue.closed.get() || queue.buffers.activity() == activity {
                    queue.buffers.trim();
                    queue.trimming.set(false);
                    return;
                }
            }
        });
    }
}
