//! One client in its transmission phase, on one context.
//!
//! Requests that are there together are served together: what needs no waiting is answered at once, into one outgoing message, and
//! the rest become tasks that answer in whatever order they end. The loop that fetches never waits for a request, only for bytes, and
//! for room where a client asks for more than it takes.
//!
//! An error of a request is its answer; bytes that are no request, and payloads that are too long, end the connection. So does the
//! export, from another thread, by shutting the socket down. However it ends, the requests in flight are finished first.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use stord_aio::sync::Notify;
use stord_aio::{Errno, IoBuffer, IoVec, spawn_local, yield_now};
use stord_block::Backend;
use stord_block::bitmap::DirtyBitmap;
use stord_block::drivers::protocol::nbd::inbox::Inbox;
use stord_block::drivers::protocol::nbd::transport::Transport;
use stord_block::drivers::protocol::nbd::wire::{Command, CommandFlags, MAX_PAYLOAD};
use stord_credentials::tls::TlsSession;

use super::handshake::Manner;
use super::outbox::Outbox;
use super::payloads::{FRONT, Payloads};
use super::reply::Style;
use super::request::{MAX_HEADER, NoRequest, Request};

/// A client with so many bytes of memory in use by its requests and replies is not listened to.
const MAX_BYTES: usize = 32 << 20;
/// With so many bytes ready that the client has not taken yet, no more are got ready: what was just read is sent while the processor
/// has it in its cache.
const AHEAD: usize = 1 << 20;
/// A client with so many requests in flight is not listened to.
const MAX_REQUESTS: usize = 1024;
/// Memory that a request uses besides its payload, in bytes.
const OVERHEAD: usize = 1024;
/// Reads up to this length are answered from the arena of the outbox, in bytes.
pub(super) const SHORT: u32 = 32 << 10;
/// So many requests are served before replies leave and other tasks of the context get their turn.
const BURST: u32 = 64;
/// After no request for a while, free memory is given back.
const IDLE: std::time::Duration = std::time::Duration::from_secs(1);

/// What a client is served with.
pub(super) struct Service {
    pub(super) backend: Backend,
    pub(super) writable: bool,
    pub(super) writethrough: bool,
    /// Those of the export, in its order.
    pub(super) bitmaps: Vec<Arc<DirtyBitmap>>,
    pub(super) manner: Manner,
}

pub(super) struct Connection {
    stream: Transport,
    pub(super) service: Service,
    pub(super) outbox: RefCell<Outbox>,
    pub(super) payloads: Payloads,
    /// A task sends what the client did not take at once.
    sending: Cell<bool>,
    /// The client takes nothing any more.
    broken: Cell<bool>,
    /// Requests that are tasks.
    requests: Cell<usize>,
    /// Memory that they use, in bytes.
    bytes: Cell<usize>,
    /// A task has ended.
    ended: Notify,
    /// Rises with every request.
    activity: Cell<u64>,
    trimming: Cell<bool>,
}

/// Why the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The client is done, or has gone.
    Left,
    /// The context stops, or the stream broke.
    Failed(Errno),
    /// The client does not speak NBD.
    Garbage,
}

impl From<NoRequest> for End {
    fn from(_: NoRequest) -> Self {
        Self::Garbage
    }
}

/// What a request gives.
enum Outcome {
    /// All of the reply.
    Result(Result<(), Errno>),
    /// It needs waiting.
    Later,
    /// The reply is on its way.
    Done,
}

/// Serves a client until it goes, with everything that it has asked for finished.
pub(super) async fn serve(fd: OwnedFd, tls: Option<TlsSession>, service: Service) {
    let stream = match Transport::new(fd, tls) {
        Ok(stream) => stream,
        Err(error) => {
            tracing::error!(%error, "an NBD client cannot be served");
            return;
        }
    };
    let connection = Rc::new(Connection {
        stream,
        service,
        outbox: RefCell::new(Outbox::new()),
        payloads: Payloads::default(),
        sending: Cell::new(false),
        broken: Cell::new(false),
        requests: Cell::new(0),
        bytes: Cell::new(0),
        ended: Notify::new(),
        activity: Cell::new(0),
        trimming: Cell::new(false),
    });
    let end = connection.run().await;
    tracing::debug!(?end, "an NBD client has gone");
    while connection.requests.get() > 0 {
        connection.ended.notified().await;
    }
    // What came before the end is answered.
    connection.flush();
    while connection.sending.get() {
        connection.ended.notified().await;
    }
}

impl Connection {
    async fn run(self: &Rc<Self>) -> End {
        let mut inbox = Inbox::new();
        let mut streak = 0;
        loop {
            let served = match self.serve_received(&mut inbox).await {
                Ok(served) => served,
                Err(end) => return end,
            };
            self.flush();
            if self.broken.get() {
                return End::Left;
            }
            if self.is_full() {
                self.ended.notified().await;
                continue;
            }
            if served == BURST {
                // There may be more.
                yield_now().await;
                continue;
            }
            let wanted = self.wanted(&inbox);
            let room = inbox.room(wanted);
            // Where several requests came together, more may be there; a lone one comes from a client that waits for its reply.
            if served > 1 {
                streak += served;
                if streak >= BURST {
                    streak = 0;
                    yield_now().await;
                }
                match self.stream.try_receive(&room) {
                    Ok(0) => return End::Left,
                    Ok(count) => {
                        inbox.received(count);
                        continue;
                    }
                    Err(Errno::EAGAIN) => {}
                    Err(errno) => return End::Failed(errno),
                }
            }
            self.trim_when_idle();
            match self.stream.receive(room).await {
                Ok(0) => return End::Left,
                Ok(count) => inbox.received(count),
                Err(errno) => return End::Failed(errno),
            }
        }
    }

    fn is_full(&self) -> bool {
        let ready = self.outbox.borrow().bytes();
        self.requests.get() >= MAX_REQUESTS
            || ready >= AHEAD
            || self.bytes.get() + ready >= MAX_BYTES
    }

    /// Bytes that have to be there before anything can be done.
    fn wanted(&self, inbox: &Inbox) -> usize {
        let header = Request::header_size(self.service.manner.style);
        let mut bytes = [0; MAX_HEADER];
        if inbox.len() < header {
            return header;
        }
        inbox.peek(&mut bytes[..header]);
        match Request::parse(self.service.manner.style, &bytes) {
            Ok(request) => {
                let payload = request.payload(self.service.manner.style);
                usize::try_from(payload).map_or(header, |payload| header + payload)
            }
            Err(NoRequest) => header,
        }
    }

    /// Serves the requests that have come, and gives their number; [`BURST`] when there may be more.
    async fn serve_received(self: &Rc<Self>, inbox: &mut Inbox) -> Result<u32, End> {
        let style = self.service.manner.style;
        let header = Request::header_size(style);
        let mut served = 0;
        let mut begun = 0;
        while inbox.len() >= header && served < BURST && begun < AHEAD && !self.is_full() {
            let before = self.bytes.get();
            let mut bytes = [0; MAX_HEADER];
            inbox.peek(&mut bytes[..header]);
            let request = Request::parse(style, &bytes)?;
            let payload = request.payload(style);
            if payload > u64::from(MAX_PAYLOAD) {
                tracing::debug!(payload, "an NBD client sends too long a payload");
                return Err(End::Garbage);
            }
            let payload = usize::try_from(payload).map_err(|_| End::Garbage)?;
            if request.command() == Some(Command::Disconnect) {
                return Err(End::Left);
            }
            self.activity.set(self.activity.get().wrapping_add(1));
            if payload == 0 {
                inbox.consume(header);
                self.begin(request, None);
            } else if inbox.len() >= header + payload {
                inbox.consume(header);
                let received = inbox.front(payload);
                self.begin(request, Some(received));
                inbox.consume(payload);
            } else if Inbox::holds(header + payload) && request.length < SHORT.into() {
                // The rest comes with the next bytes.
                break;
            } else {
                inbox.consume(header);
                // Replies do not wait for it.
                self.flush();
                let whole = self.receive_payload(inbox, payload).await?;
                self.begin_owned(request, whole, payload);
            }
            served += 1;
            begun += self.bytes.get().saturating_sub(before);
        }
        Ok(if begun >= AHEAD { BURST } else { served })
    }

    /// Receives a payload into memory of its own, from [`FRONT`] on.
    async fn receive_payload(&self, inbox: &mut Inbox, length: usize) -> Result<IoBuffer, End> {
        let whole = self.payloads.take(length);
        let payload = whole.slice(FRONT..FRONT + length);
        let there = inbox.len().min(length);
        let front: IoVec = inbox.front(there).into();
        front.copy_to(&payload.slice(0..there).into());
        inbox.consume(there);
        let mut done = there;
        while done < length {
            let rest: IoVec = payload.slice(done..length).into();
            let count = match self.stream.try_receive(&rest) {
                Err(Errno::EAGAIN) => self.stream.receive(rest).await,
                result => result,
            };
            match count {
                Ok(0) => return Err(End::Left),
                Ok(count) => done += count,
                Err(errno) => return Err(End::Failed(errno)),
            }
        }
        Ok(whole)
    }

    /// Serves a request whose payload, if it has any, is in memory that it must leave at once.
    fn begin(self: &Rc<Self>, request: Request, payload: Option<IoBuffer>) {
        if let Err(errno) = self.check(&request) {
            self.reply(&request, Err(errno));
            return;
        }
        let outcome = match (request.command(), &payload) {
            (Some(Command::Read), _) => self.try_read(&request),
            (Some(Command::Write), Some(payload)) => self.try_write(&request, payload),
            _ => Outcome::Later,
        };
        match outcome {
            Outcome::Done => {}
            Outcome::Result(result) => self.reply(&request, result),
            Outcome::Later => {
                let kept = payload.map(|payload| {
                    let length = payload.len();
                    let whole = self.payloads.take(length);
                    let to = whole.slice(FRONT..FRONT + length).into();
                    IoVec::from(payload).copy_to(&to);
                    (whole, length)
                });
                self.spawn(request, kept);
            }
        }
    }

    /// Serves a request whose payload is in memory of its own.
    fn begin_owned(self: &Rc<Self>, request: Request, whole: IoBuffer, length: usize) {
        let outcome = match self.check(&request) {
            Err(errno) => Outcome::Result(Err(errno)),
            Ok(()) if request.command() == Some(Command::Write) => {
                self.try_write(&request, &whole.slice(FRONT..FRONT + length))
            }
            Ok(()) => Outcome::Later,
        };
        match outcome {
            Outcome::Later => self.spawn(request, Some((whole, length))),
            Outcome::Result(result) => {
                self.payloads.put(whole);
                self.reply(&request, result);
            }
            Outcome::Done => self.payloads.put(whole),
        }
    }

    /// Whether a request may be done at all.
    fn check(&self, request: &Request) -> Result<(), Errno> {
        let command = request.command().ok_or(Errno::EINVAL)?;
        let style = self.service.manner.style;
        let allowed = CommandFlags::FUA
            | match command {
                Command::Read if style != Style::Simple => CommandFlags::DF,
                Command::Write if style == Style::Extended => CommandFlags::PAYLOAD_LEN,
                Command::WriteZeroes => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
                Command::BlockStatus if style == Style::Extended => {
                    CommandFlags::REQ_ONE | CommandFlags::PAYLOAD_LEN
                }
                Command::BlockStatus => CommandFlags::REQ_ONE,
                _ => CommandFlags::empty(),
            };
        if !allowed.contains(request.flags) {
            return Err(Errno::EINVAL);
        }
        let is_change = matches!(
            command,
            Command::Write | Command::WriteZeroes | Command::Trim
        );
        if is_change && !self.service.writable {
            return Err(Errno::EPERM);
        }
        if command == Command::Resize {
            return Err(Errno::EINVAL);
        }
        if command == Command::Read && request.length > u64::from(MAX_PAYLOAD) {
            return Err(Errno::EOVERFLOW);
        }
        let has_effect_payload =
            command == Command::BlockStatus && request.flags.contains(CommandFlags::PAYLOAD_LEN);
        let size = self.service.backend.size();
        let is_inside = request
            .offset
            .checked_add(request.length)
            .is_some_and(|end| end <= size);
        if !is_inside && !has_effect_payload && command != Command::Flush {
            return Err(match command {
                Command::Write | Command::WriteZeroes => Errno::ENOSPC,
                _ => Errno::EINVAL,
            });
        }
        if command == Command::BlockStatus
            && (self.service.manner.contexts.is_empty() || request.length == 0)
        {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// Reads at once into the outgoing message, if nothing has to be waited for.
    fn try_read(&self, request: &Request) -> Outcome {
        if request.length == 0 || request.length > SHORT.into() {
            return Outcome::Later;
        }
        let style = self.service.manner.style;
        let front = style.read_header_size();
        let Ok(length) = u32::try_from(request.length) else {
            return Outcome::Later;
        };
        let total = front + length as usize;
        let reserved = self.outbox.borrow().reserve(total);
        let Some(memory) = reserved else {
            return Outcome::Later;
        };
        let data = memory.slice(front..total).into();
        match self.service.backend.try_read(request.offset, &data) {
            Some(Ok(())) => {
                let head = style.read_header(request, request.offset, length, true);
                memory.write_at(0, head.as_bytes());
                self.outbox.borrow_mut().commit(total);
                Outcome::Done
            }
            Some(Err(errno)) => Outcome::Result(Err(errno)),
            None => Outcome::Later,
        }
    }

    /// Writes at once, if nothing has to be waited for.
    fn try_write(&self, request: &Request, payload: &IoBuffer) -> Outcome {
        if self.is_durable(request) {
            return Outcome::Later;
        }
        let data = payload.clone().into();
        match self.service.backend.try_write(request.offset, &data) {
            Some(result) => Outcome::Result(result),
            None => Outcome::Later,
        }
    }

    pub(super) fn is_durable(&self, request: &Request) -> bool {
        self.service.writethrough || request.flags.contains(CommandFlags::FUA)
    }

    /// Makes a request a task. Its payload is a buffer from [`FRONT`] on, and its length.
    fn spawn(self: &Rc<Self>, request: Request, payload: Option<(IoBuffer, usize)>) {
        let data = if request.command() == Some(Command::Read) {
            request.length
        } else {
            0
        };
        let held = payload.as_ref().map_or(0, |(_, length)| *length);
        let memory = OVERHEAD + held + usize::try_from(data).unwrap_or(0);
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + memory);
        let connection = Rc::clone(self);
        spawn_local(async move {
            connection.serve_later(&request, payload).await;
            connection.requests.set(connection.requests.get() - 1);
            connection.bytes.set(connection.bytes.get() - memory);
            connection.flush();
            connection.ended.notify_one();
        });
    }

    async fn serve_later(self: &Rc<Self>, request: &Request, payload: Option<(IoBuffer, usize)>) {
        match request.command() {
            Some(Command::Read) => self.read(request).await,
            Some(Command::BlockStatus) => self.status(request, payload.as_ref()).await,
            command => {
                let result = self.execute(command, request, payload.as_ref()).await;
                self.reply(request, result);
            }
        }
        if let Some((whole, _)) = payload {
            self.payloads.put(whole);
        }
    }

    /// Puts a reply without data on its way.
    pub(super) fn reply(&self, request: &Request, result: Result<(), Errno>) {
        let bytes = self.service.manner.style.result(request, result);
        self.outbox.borrow_mut().push(bytes);
    }

    /// Sends what waits; what the client does not take at once is left to a task.
    fn flush(self: &Rc<Self>) {
        if self.broken.get() {
            return self.break_off();
        }
        if self.sending.get() {
            return;
        }
        loop {
            let front = self.outbox.borrow().front();
            if front.is_empty() && self.stream.is_clear() {
                return;
            }
            match self.stream.try_send(&front) {
                Ok(count) => self.note_sent(count),
                Err(Errno::EAGAIN) => break,
                Err(_) => return self.break_off(),
            }
        }
        self.sending.set(true);
        let connection = Rc::clone(self);
        spawn_local(async move {
            loop {
                let front = connection.outbox.borrow().front();
                if front.is_empty() && connection.stream.is_clear() {
                    break;
                }
                match connection.stream.send(front).await {
                    Ok(count) => connection.note_sent(count),
                    Err(_) => {
                        connection.break_off();
                        break;
                    }
                }
                connection.ended.notify_one();
            }
            connection.sending.set(false);
            connection.ended.notify_one();
        });
    }

    fn note_sent(&self, count: usize) {
        let mut outbox = self.outbox.borrow_mut();
        outbox.sent(count, |memory| self.payloads.put(memory));
    }

    /// Nothing more can be sent: what waits is dropped, so that nobody waits for room.
    fn break_off(&self) {
        self.broken.set(true);
        let waiting = self.outbox.borrow().bytes();
        self.note_sent(waiting);
    }

    /// Gives memory back when no request has come for a while.
    fn trim_when_idle(self: &Rc<Self>) {
        if self.trimming.replace(true) {
            return;
        }
        let connection = Rc::downgrade(self);
        spawn_local(async move {
            loop {
                let Some(before) = connection.upgrade().map(|held| held.activity.get()) else {
                    return;
                };
                stord_aio::time::sleep(IDLE).await;
                let Some(connection) = connection.upgrade() else {
                    return;
                };
                if connection.activity.get() == before {
                    connection.payloads.trim();
                    connection.trimming.set(false);
                    return;
                }
            }
        });
    }
}
