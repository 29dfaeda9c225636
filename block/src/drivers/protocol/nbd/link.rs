//! One connection to a server, on one context: many requests at a time, answered in any order.
//!
//! Requests of one turn of the context leave together. Data of replies goes straight to where the request wants it, but for short
//! ones that came with others. Whatever a server sends that does not fit what was asked ends the connection, and with it every request
//! that waits: [`Failure::Lost`] says that the request may be made again elsewhere.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use slab::Slab;
use stord_aio::sync::Notify;
use stord_aio::{Errno, IoBuffer, IoVec, spawn_local};
use zerocopy::{FromBytes, IntoBytes as _};

use super::inbox::Inbox;
use super::negotiate::{Connected, Style, Terms};
use super::transport::Transport;
use super::wire::{
    ChunkFlags, ChunkKind, Command, CommandFlags, CompactRequest, EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC, ExtendedChunk, ExtendedRequest, Extent32, Extent64, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, SimpleReply, StructuredChunk, error_of,
};

/// Data of at least so many bytes is received where it belongs.
const LONG: u64 = 16 << 10;
/// The most bytes of a chunk that is no data.
const MAX_CHUNK: u64 = 8 << 20;
/// The most pieces that leave with one system call.
const PIECES: usize = 128;

/// Why a request has no good answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The connection has ended before the answer came.
    Lost,
    /// The server says no.
    Errno(Errno),
}

/// How a connection has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The server went, or sent nonsense.
    Lost,
    /// The context is about to stop.
    Stopping,
}

/// What is asked.
#[derive(Clone)]
pub(super) struct Ask {
    pub(super) command: Command,
    pub(super) flags: CommandFlags,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// Where the data of a read goes, or what is written.
    pub(super) data: IoVec,
}

/// What a server knows of the beginning of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FirstExtent {
    pub(super) length: u64,
    pub(super) flags: u64,
}

/// A request that waits for its answer.
struct Waiting {
    /// Tells this one from others that had its place.
    generation: u32,
    ask: Ask,
    /// Bytes of data that have come.
    received: u64,
    extent: Option<FirstExtent>,
    error: Option<Errno>,
    outcome: Option<Result<(), Failure>>,
    waker: Option<Waker>,
}

/// A connection.
pub(super) struct Link {
    transport: Transport,
    terms: Terms,
    waiting: RefCell<Slab<Waiting>>,
    generation: Cell<u32>,
    outgoing: RefCell<VecDeque<IoBuffer>>,
    /// Something goes out, or the connection has ended.
    wake_sender: Notify,
    is_lost: Cell<bool>,
    /// The context is about to stop.
    is_stopping: Cell<bool>,
}

/// What a server must not send.
struct Nonsense;

impl Link {
    /// Starts to serve requests over a connection. `ended` is called once, when it is no more.
    pub(super) fn start(
        connected: Connected,
        ended: impl FnOnce(&Rc<Self>, End) + 'static,
    ) -> std::io::Result<Rc<Self>> {
        let Connected {
            socket,
            session,
            terms,
        } = connected;
        let link = Rc::new(Self {
            transport: Transport::new(socket, session)?,
            terms,
            waiting: RefCell::default(),
            generation: Cell::new(0),
            outgoing: RefCell::default(),
            wake_sender: Notify::new(),
            is_lost: Cell::new(false),
            is_stopping: Cell::new(false),
        });
        let sender = Rc::clone(&link);
        spawn_local(async move { sender.send().await });
        let receiver = Rc::clone(&link);
        spawn_local(async move {
            receiver.receive().await;
            receiver.lose();
            let is_stopping = receiver.is_stopping.get();
            let end = if is_stopping {
                End::Stopping
            } else {
                End::Lost
            };
            ended(&receiver, end);
        });
        Ok(link)
    }

    /// Takes leave of the server. Nothing may be in flight.
    pub(super) fn disconnect(&self) {
        let header = self.header((Command::Disconnect, CommandFlags::empty(), 0, 0), 0);
        // The server finds the end of the stream anyway.
        let _ = self.transport.try_send(&header.into());
        self.is_lost.set(true);
        self.transport.shut_down();
        self.wake_sender.notify_one();
    }

    /// Makes a request and waits for its answer.
    pub(super) async fn request(&self, ask: Ask) -> Result<Option<FirstExtent>, Failure> {
        if self.is_lost.get() {
            return Err(Failure::Lost);
        }
        let generation = self.generation.get().wrapping_add(1);
        self.generation.set(generation);
        let header_source = (ask.command, ask.flags, ask.offset, ask.length);
        let payload = (ask.command == Command::Write).then(|| ask.data.clone());
        let key = self.waiting.borrow_mut().insert(Waiting {
            generation,
            ask,
            received: 0,
            extent: None,
            error: None,
            outcome: None,
            waker: None,
        });
        let header = self.header(header_source, cookie(key, generation));
        {
            let mut outgoing = self.outgoing.borrow_mut();
            outgoing.push_back(header);
            if let Some(payload) = payload {
                outgoing.extend(payload.buffers().iter().cloned());
            }
        }
        self.wake_sender.notify_one();
        let outcome = poll_fn(|cx| {
            let mut waiting = self.waiting.borrow_mut();
            let slot = waiting.get_mut(key).expect("removed only below");
            match slot.outcome.take() {
                Some(outcome) => Poll::Ready(outcome),
                None => {
                    slot.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
        let answered = self.waiting.borrow_mut().remove(key);
        if outcome == Err(Failure::Errno(Errno::ESHUTDOWN)) {
            // A server that goes down has not done it; the next one may.
            self.lose();
            return Err(Failure::Lost);
        }
        outcome.map(|()| answered.extent)
    }

    fn header(
        &self,
        (command, flags, offset, length): (Command, CommandFlags, u64, u64),
        cookie: u64,
    ) -> IoBuffer {
        if self.terms.style == Style::Extended {
            let mut flags = flags;
            flags.set(CommandFlags::PAYLOAD_LEN, command == Command::Write);
            let header = ExtendedRequest {
                magic: EXTENDED_REQUEST_MAGIC.into(),
                flags: flags.bits().into(),
                kind: command.number().into(),
                cookie: cookie.into(),
                offset: offset.into(),
                length: length.into(),
            };
            return IoBuffer::from_vec(header.as_bytes().to_vec());
        }
        let header = CompactRequest {
            magic: REQUEST_MAGIC.into(),
            flags: flags.bits().into(),
            kind: command.number().into(),
            cookie: cookie.into(),
            offset: offset.into(),
            length: u32::try_from(length)
                .expect("requests are cut to what the terms allow")
                .into(),
        };
        IoBuffer::from_vec(header.as_bytes().to_vec())
    }

    /// Sends what goes out, until the connection ends.
    async fn send(&self) {
        loop {
            let front: IoVec = {
                let outgoing = self.outgoing.borrow();
                outgoing.iter().take(PIECES).cloned().collect()
            };
            if self.is_lost.get() {
                return;
            }
            if front.is_empty() && self.transport.is_clear() {
                self.wake_sender.notified().await;
                continue;
            }
            let sent = match self.transport.try_send(&front) {
                Err(Errno::EAGAIN) => self.transport.send(front).await,
                sent => sent,
            };
            match sent {
                Ok(count) => self.note_sent(count),
                Err(_) => {
                    // So the receiver finds the end of the stream.
                    self.transport.shut_down();
                    return;
                }
            }
        }
    }

    fn note_sent(&self, mut count: usize) {
        let mut outgoing = self.outgoing.borrow_mut();
        while let Some(first) = outgoing.front_mut() {
            if count < first.len() {
                if count > 0 {
                    *first = first.slice(count..first.len());
                }
                return;
            }
            count -= first.len();
            outgoing.pop_front();
        }
    }

    /// Receives replies until the connection ends, or the server sends nonsense.
    async fn receive(&self) {
        let mut inbox = Inbox::new();
        loop {
            match self.take_reply(&mut inbox).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(Nonsense) => {
                    tracing::warn!(
                        "an NBD server sent what was not asked for: the connection is closed"
                    );
                    return;
                }
            }
        }
    }

    /// Receives something; 0 when nothing more will come.
    async fn receive_some(&self, room: IoVec) -> usize {
        match self.transport.receive(room).await {
            Ok(count) => count,
            Err(errno) => {
                self.is_stopping.set(errno == Errno::ECANCELED);
                0
            }
        }
    }

    /// Sees to it that so many bytes are there; false at the end of the stream.
    async fn fetch(&self, inbox: &mut Inbox, count: usize) -> bool {
        while inbox.len() < count {
            let room = inbox.room(count);
            match self.receive_some(room).await {
                0 => return false,
                count => inbox.received(count),
            }
        }
        true
    }

    async fn fetch_as<T: FromBytes>(&self, inbox: &mut Inbox) -> Option<T> {
        if !self.fetch(inbox, size_of::<T>()).await {
            return None;
        }
        let mut bytes = [0; 64];
        let bytes = &mut bytes[..size_of::<T>()];
        inbox.peek(bytes);
        inbox.consume(bytes.len());
        T::read_from_bytes(bytes).ok()
    }

    /// Takes one reply, or a chunk of one; false at the end of the stream.
    async fn take_reply(&self, inbox: &mut Inbox) -> Result<bool, Nonsense> {
        if !self.fetch(inbox, 4).await {
            return Ok(false);
        }
        let mut magic = [0; 4];
        inbox.peek(&mut magic);
        match (u32::from_be_bytes(magic), self.terms.style) {
            (SIMPLE_REPLY_MAGIC, Style::Simple | Style::Structured) => {
                let Some(reply) = self.fetch_as::<SimpleReply>(inbox).await else {
                    return Ok(false);
                };
                self.take_simple(inbox, &reply).await
            }
            (STRUCTURED_REPLY_MAGIC, Style::Structured) => {
                let Some(chunk) = self.fetch_as::<StructuredChunk>(inbox).await else {
                    return Ok(false);
                };
                let chunk = Chunk {
                    flags: ChunkFlags::from_bits_retain(chunk.flags.get()),
                    kind: chunk.kind.get(),
                    cookie: chunk.cookie.get(),
                    length: chunk.length.get().into(),
                };
                self.take_chunk(inbox, &chunk).await
            }
            (EXTENDED_REPLY_MAGIC, Style::Extended) => {
                let Some(chunk) = self.fetch_as::<ExtendedChunk>(inbox).await else {
                    return Ok(false);
                };
                let chunk = Chunk {
                    flags: ChunkFlags::from_bits_retain(chunk.flags.get()),
                    kind: chunk.kind.get(),
                    cookie: chunk.cookie.get(),
                    length: chunk.length.get(),
                };
                self.take_chunk(inbox, &chunk).await
            }
            _ => Err(Nonsense),
        }
    }

    async fn take_simple(&self, inbox: &mut Inbox, reply: &SimpleReply) -> Result<bool, Nonsense> {
        let (key, _) = self.find(reply.cookie.get())?;
        let (is_read, length) = {
            let waiting = self.waiting.borrow();
            let ask = &waiting[key].ask;
            (ask.command == Command::Read, ask.length)
        };
        if is_read && self.terms.style != Style::Simple {
            return Err(Nonsense);
        }
        let error = reply.error.get();
        if error != 0 {
            self.waiting.borrow_mut()[key].error = Some(error_of(error));
        } else if is_read && !self.take_data(inbox, key, 0, length).await {
            return Ok(false);
        }
        self.finish(key)?;
        Ok(true)
    }

    async fn take_chunk(&self, inbox: &mut Inbox, chunk: &Chunk) -> Result<bool, Nonsense> {
        let (key, ask) = self.find(chunk.cookie)?;
        let Chunk { kind, length, .. } = *chunk;
        if kind == ChunkKind::OffsetData.number() {
            let data = length.checked_sub(8).ok_or(Nonsense)?;
            let Some(offset) = self.fetch_as::<[u8; 8]>(inbox).await else {
                return Ok(false);
            };
            let at = place(&ask, u64::from_be_bytes(offset), data)?;
            if !self.take_data(inbox, key, at, data).await {
                return Ok(false);
            }
        } else if kind == ChunkKind::OffsetHole.number() {
            if length != 12 {
                return Err(Nonsense);
            }
            let Some(body) = self.fetch_as::<[u8; 12]>(inbox).await else {
                return Ok(false);
            };
            let (offset, size) = body.split_at(8);
            let offset = u64::from_be_bytes(offset.try_into().map_err(|_| Nonsense)?);
            let size = u64::from(u32::from_be_bytes(size.try_into().map_err(|_| Nonsense)?));
            let at = place(&ask, offset, size)?;
            ask.data.slice(at..at + size).fill(0);
            self.waiting.borrow_mut()[key].received += size;
        } else {
            if length > MAX_CHUNK {
                return Err(Nonsense);
            }
            let Some(body) = self.take_body(inbox, length).await else {
                return Ok(false);
            };
            self.take_small(key, &ask, kind, &body)?;
        }
        if chunk.flags.contains(ChunkFlags::DONE) {
            self.finish(key)?;
        }
        Ok(true)
    }

    /// A chunk that is no data.
    fn take_small(&self, key: usize, ask: &Ask, kind: u16, body: &[u8]) -> Result<(), Nonsense> {
        let mut waiting = self.waiting.borrow_mut();
        let slot = &mut waiting[key];
        if ChunkKind::is_error(kind) {
            let (number, _) = body.split_first_chunk().ok_or(Nonsense)?;
            slot.error
                .get_or_insert(error_of(u32::from_be_bytes(*number)));
            return Ok(());
        }
        let is_status = ask.command == Command::BlockStatus;
        if kind == ChunkKind::None.number() {
            return Ok(());
        }
        let (id, rest) = body.split_first_chunk().ok_or(Nonsense)?;
        if !is_status || Some(u32::from_be_bytes(*id)) != self.terms.context {
            return Err(Nonsense);
        }
        slot.extent =
            if kind == ChunkKind::BlockStatus.number() && self.terms.style == Style::Structured {
                Extent32::read_from_prefix(rest)
                    .ok()
                    .map(|(extent, _)| FirstExtent {
                        length: extent.length.get().into(),
                        flags: extent.flags.get().into(),
                    })
            } else if kind == ChunkKind::BlockStatusExtended.number()
                && self.terms.style == Style::Extended
            {
                let extents = rest.get(4..).ok_or(Nonsense)?;
                Extent64::read_from_prefix(extents)
                    .ok()
                    .map(|(extent, _)| FirstExtent {
                        length: extent.length.get(),
                        flags: extent.flags.get(),
                    })
            } else {
                return Err(Nonsense);
            };
        Ok(())
    }

    async fn take_body(&self, inbox: &mut Inbox, length: u64) -> Option<Vec<u8>> {
        let length = usize::try_from(length).ok()?;
        let memory = IoBuffer::zeroed(length);
        let whole: IoVec = memory.clone().into();
        self.take_into(inbox, &whole).await.then(|| memory.to_vec())
    }

    /// Receives data of a read to its place; false at the end of the stream.
    async fn take_data(&self, inbox: &mut Inbox, key: usize, at: u64, length: u64) -> bool {
        let to = {
            let waiting = self.waiting.borrow();
            waiting[key].ask.data.slice(at..at + length)
        };
        if !self.take_into(inbox, &to).await {
            return false;
        }
        self.waiting.borrow_mut()[key].received += length;
        true
    }

    /// Fills `to` with the next bytes; false at the end of the stream.
    async fn take_into(&self, inbox: &mut Inbox, to: &IoVec) -> bool {
        let total = to.len();
        let mut done = 0;
        while done < total {
            let left = total - done;
            if inbox.len() == 0 {
                if left >= LONG {
                    let rest = to.slice(done..total);
                    match self.receive_some(rest).await {
                        0 => return false,
                        count => done += count as u64,
                    }
                    continue;
                }
                if !self.fetch(inbox, 1).await {
                    return false;
                }
            }
            let part = usize::try_from(left).map_or(inbox.len(), |left| left.min(inbox.len()));
            let from: IoVec = inbox.front(part).into();
            from.copy_to(&to.slice(done..done + part as u64));
            inbox.consume(part);
            done += part as u64;
        }
        true
    }

    /// The request of a mark.
    fn find(&self, cookie: u64) -> Result<(usize, Ask), Nonsense> {
        let [a, b, c, d, e, f, g, h] = cookie.to_be_bytes();
        let generation = u32::from_be_bytes([a, b, c, d]);
        let key = usize::try_from(u32::from_be_bytes([e, f, g, h])).map_err(|_| Nonsense)?;
        let waiting = self.waiting.borrow();
        let slot = waiting.get(key).ok_or(Nonsense)?;
        if slot.generation != generation || slot.outcome.is_some() {
            return Err(Nonsense);
        }
        Ok((key, slot.ask.clone()))
    }

    /// The last word on a request has come.
    fn finish(&self, key: usize) -> Result<(), Nonsense> {
        let mut waiting = self.waiting.borrow_mut();
        let slot = &mut waiting[key];
        let outcome = match slot.error {
            Some(errno) => Err(Failure::Errno(errno)),
            // Less than all, or some of it twice.
            None if slot.ask.command == Command::Read && slot.received != slot.ask.length => {
                return Err(Nonsense);
            }
            None => Ok(()),
        };
        slot.outcome = Some(outcome);
        if let Some(waker) = slot.waker.take() {
            waker.wake();
        }
        Ok(())
    }

    /// Ends the connection: whoever waits hears of it.
    fn lose(&self) {
        self.is_lost.set(true);
        self.transport.shut_down();
        for (_, slot) in self.waiting.borrow_mut().iter_mut() {
            if slot.outcome.is_none() {
                slot.outcome = Some(Err(Failure::Lost));
                if let Some(waker) = slot.waker.take() {
                    waker.wake();
                }
            }
        }
        self.outgoing.borrow_mut().clear();
        self.wake_sender.notify_one();
    }
}

/// A chunk of a structured or extended reply, without its body.
struct Chunk {
    flags: ChunkFlags,
    kind: u16,
    cookie: u64,
    length: u64,
}

/// Where in a read's memory `length` bytes from `offset` on belong.
fn place(ask: &Ask, offset: u64, length: u64) -> Result<u64, Nonsense> {
    let at = offset.checked_sub(ask.offset).ok_or(Nonsense)?;
    let end = at.checked_add(length).ok_or(Nonsense)?;
    if ask.command != Command::Read || end > ask.length {
        return Err(Nonsense);
    }
    Ok(at)
}

fn cookie(key: usize, generation: u32) -> u64 {
    let key = u32::try_from(key).expect("fewer requests than that are in flight");
    u64::from(generation) << 32 | u64::from(key)
}
