//! One front end, from its connection to its end: what has been agreed on with it, and its rings. On the control thread.
//!
//! A message is carried out before the next one is read, so that an answer means that it is in force. A message that cannot be
//! carried out changes nothing: the front end is told where it asked for an acknowledgement, and is let go where it did not, since it
//! would go on as if it had been. However the connection ends, every request in flight is finished before the session is.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;

use socket2::Socket;
use stord_aio::sync::watch;
use zerocopy::IntoBytes as _;

use super::channel::Channel;
use super::device::Device;
use super::in_flight::InFlightRecord;
use super::memory::{MAX_SLOTS, Memory};
use super::message::{
    ConfigRange, FilePart, Frame, Header, InFlightShape, Malformed, ProtocolFeatures, Request,
    RingAddresses, RingEvent, RingState,
};
use super::notices::Notices;
use super::ring::{Ring, Surroundings};

/// `VHOST_F_LOG_ALL`: everything that is written to the guest's memory is to be logged.
const LOG_ALL: u64 = 1 << 26;
/// `VHOST_USER_F_PROTOCOL_FEATURES`: there are protocol features.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// A kind of change to the configuration space: the driver's own, as opposed to one of a migration.
const BY_DRIVER: u32 = 0;

/// What a back end can do besides being the device.
const OFFERED: ProtocolFeatures = ProtocolFeatures::all();

/// Carried out.
const SUCCESS: u64 = 0;
/// Not carried out.
const FAILURE: u64 = 1;

/// Why a message is not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("{what}")]
    System {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("features {0:#x} are not offered")]
    Features(u64),
    #[error("there is no ring {0}")]
    NoRing(u32),
    #[error("a ring cannot have {0} entries")]
    RingSize(u32),
    #[error("a ring cannot begin at {0}")]
    RingBase(u32),
    #[error("a ring's part at {0:#x} is not in the memory")]
    RingAddress(u64),
    #[error("polling a ring instead of being told is not supported")]
    Polling,
    #[error("a descriptor is not an eventfd")]
    NoEventFd,
    #[error("memory of {size} bytes at {guest:#x} cannot be: {reason}")]
    Memory {
        guest: u64,
        size: u64,
        reason: &'static str,
    },
    #[error("the log cannot be used: {0}")]
    Log(&'static str),
    #[error("the record of requests in flight cannot be used: {0}")]
    InFlight(&'static str),
    #[error("that part of the configuration cannot be changed")]
    Config,
}

impl Refusal {
    /// For use with `map_err`.
    pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::System {
            what,
            source: error.into(),
        }
    }
}

/// What a message is answered with.
enum Answer {
    /// Nothing but an acknowledgement, if that is wanted.
    Done,
    Number(u64),
    Bytes(Vec<u8>),
    WithDescriptor(Vec<u8>, OwnedFd),
}

/// A front end and what it has set up.
pub(super) struct Session {
    device: Rc<Device>,
    features: u64,
    protocol: ProtocolFeatures,
    status: u64,
    memory: Memory,
    rings: Vec<Ring>,
    in_flight: Option<InFlightRecord>,
    notices: Option<Notices>,
    resizes: watch::Receiver<()>,
}

impl Session {
    pub(super) fn new(device: Rc<Device>) -> Self {
        let resizes = device.resizes();
        let rings = (0..device.queues()).map(Ring::new).collect();
        Self {
            device,
            features: 0,
            protocol: ProtocolFeatures::empty(),
            status: 0,
            memory: Memory::default(),
            rings,
            in_flight: None,
            notices: None,
            resizes,
        }
    }

    /// Serves the front end until it goes, or `ending` becomes true.
    pub(super) async fn serve(mut self, socket: Socket, ending: watch::Receiver<bool>) {
        if let Err(error) = self.converse(socket, ending).await {
            let export = self.device.id();
            tracing::warn!(export, error = %Chain(&*error), "a vhost-user front end is let go");
        }
        self.stop_rings().await;
    }

    async fn converse(
        &mut self,
        socket: Socket,
        mut ending: watch::Receiver<bool>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let mut channel = Channel::new(socket)?;
        loop {
            let received = tokio::select! {
                _ = ending.wait_for(|ending| *ending) => return Ok(()),
                received = channel.receive() => received?,
            };
            let Some(frame) = received else { return Ok(()) };
            let request = frame.header.request;
            // Not broken off: a ring that is being stopped has to be stopped.
            let Some((bytes, descriptor)) = self.answer(frame).await? else {
                continue;
            };
            let header = Header::reply(request, bytes.len());
            let descriptor = descriptor.as_ref().map(OwnedFd::as_fd);
            tokio::select! {
                _ = ending.wait_for(|ending| *ending) => return Ok(()),
                sent = channel.send(header, &bytes, descriptor) => sent?,
            }
        }
    }

    /// Carries a message out; gives what is to be answered, if anything.
    ///
    /// # Errors
    /// The front end cannot be told that the message was not carried out.
    async fn answer(
        &mut self,
        frame: Frame,
    ) -> Result<Option<(Vec<u8>, Option<OwnedFd>)>, Refusal> {
        let (request, has_reply) = (frame.header.request, frame.has_reply());
        let is_acked = self.protocol.contains(ProtocolFeatures::REPLY_ACK);
        let wants_ack = frame.header.wants_ack() && is_acked && !has_reply;
        let number = |number: u64| Ok(Some((number.as_bytes().to_vec(), None)));
        match self.carry_out(frame).await {
            Ok(Answer::Done) if wants_ack => number(SUCCESS),
            Ok(Answer::Done) => Ok(None),
            Ok(Answer::Number(value)) => number(value),
            Ok(Answer::Bytes(bytes)) => Ok(Some((bytes, None))),
            Ok(Answer::WithDescriptor(bytes, descriptor)) => Ok(Some((bytes, Some(descriptor)))),
            Err(refusal) if wants_ack => {
                let export = self.device.id();
                tracing::warn!(export, request, reason = %Chain(&refusal), "refused");
                number(FAILURE)
            }
            Err(refusal) => Err(refusal),
        }
    }

    async fn carry_out(&mut self, frame: Frame) -> Result<Answer, Refusal> {
        let request = frame.parse()?;
        tracing::trace!(?request, "vhost-user");
        match request {
            Request::GetFeatures => Ok(Answer::Number(self.offered())),
            Request::SetFeatures(features) => self.set_features(features).await,
            Request::GetProtocolFeatures => Ok(Answer::Number(OFFERED.bits())),
            Request::SetProtocolFeatures(features) => {
                let agreed = ProtocolFeatures::from_bits(features);
                self.protocol = agreed.ok_or(Refusal::Features(features & !OFFERED.bits()))?;
                Ok(Answer::Done)
            }
            Request::Owner | Request::SetLogFd => Ok(Answer::Done),
            Request::GetQueueNumber => Ok(Answer::Number(self.device.queues().into())),
            Request::SetMemoryTable(regions) => {
                self.memory.set_table(regions)?;
                Ok(Answer::Done)
            }
            Request::GetMemorySlots => Ok(Answer::Number(MAX_SLOTS)),
            Request::AddMemory(region, file) => {
                self.memory.add(region, file)?;
                // With postcopy only, this would be answered otherwise.
                Ok(Answer::Done)
            }
            Request::RemoveMemory(region) => {
                self.memory.remove(region)?;
                Ok(Answer::Done)
            }
            Request::SetLogBase(part, file) => self.set_log(part, file),
            Request::GetInFlight(shape) => self.get_in_flight(shape),
            Request::SetInFlight(shape, file) => {
                self.in_flight = Some(InFlightRecord::open(shape, &file)?);
                Ok(Answer::Done)
            }
            Request::SetBackendChannel(descriptor) => {
                let started = Notices::start(descriptor, self.resizes.clone());
                let failed = Refusal::system("the channel for notices cannot be used");
                self.notices = Some(started.map_err(failed)?);
                Ok(Answer::Done)
            }
            Request::GetConfig(range) => Ok(Answer::Bytes(self.config(range))),
            Request::SetConfig(range, bytes) => self.set_config(range, &bytes),
            Request::ResetDevice => {
                self.reset().await;
                Ok(Answer::Done)
            }
            Request::GetStatus => Ok(Answer::Number(self.status)),
            Request::SetStatus(status) => {
                if status == 0 {
                    self.reset().await;
                }
                self.status = status;
                Ok(Answer::Done)
            }
            Request::SetRingSize(RingState { ring, number }) => {
                self.ring(ring)?.set_size(number)?;
                Ok(Answer::Done)
            }
            Request::SetRingBase(RingState { ring, number }) => {
                self.ring(ring)?.set_base(number)?;
                Ok(Answer::Done)
            }
            Request::GetRingBase(state) => self.stop_ring(state).await,
            Request::SetRingAddresses(addresses) => self.set_addresses(addresses).await,
            Request::SetRingEvent(event, ring, descriptor) => {
                self.set_event(event, ring, descriptor).await
            }
            Request::EnableRing(RingState { ring, number }) => {
                self.ring(ring)?.enable(number != 0).await;
                self.start_ring(ring)
            }
        }
    }

    fn offered(&self) -> u64 {
        self.device.disk().features() | LOG_ALL | PROTOCOL_FEATURES
    }

    fn ring(&mut self, ring: u32) -> Result<&mut Ring, Refusal> {
        let index = usize::try_from(ring).ok();
        let found = index.and_then(|index| self.rings.get_mut(index));
        found.ok_or(Refusal::NoRing(ring))
    }

    async fn set_features(&mut self, features: u64) -> Result<Answer, Refusal> {
        let surplus = features & !self.offered();
        if surplus != 0 {
            return Err(Refusal::Features(surplus));
        }
        if self.features == features {
            return Ok(Answer::Done);
        }
        // Logging is switched while rings run. What is in flight then is waited for: it would not be logged.
        let mut paused = Vec::new();
        for (number, ring) in (0_u32..).zip(&mut self.rings) {
            if ring.pause().await {
                paused.push(number);
            }
        }
        self.features = features;
        self.memory.log_writes(features & LOG_ALL != 0);
        for number in paused {
            self.start_ring(number)?;
        }
        Ok(Answer::Done)
    }

    fn set_log(&mut self, part: FilePart, file: OwnedFd) -> Result<Answer, Refusal> {
        self.memory.set_log(part, file)?;
        // Front ends wait for this although it says nothing.
        let answers = self.protocol.contains(ProtocolFeatures::LOG_SHMFD);
        Ok(if answers {
            Answer::Number(SUCCESS)
        } else {
            Answer::Done
        })
    }

    fn get_in_flight(&mut self, asked: InFlightShape) -> Result<Answer, Refusal> {
        let (record, file) = InFlightRecord::create(asked.rings, asked.ring_size)?;
        let shape = record.shape();
        self.in_flight = Some(record);
        Ok(Answer::WithDescriptor(shape.as_bytes().to_vec(), file))
    }

    /// The part of the configuration space, in the message that says which part.
    fn config(&self, range: ConfigRange) -> Vec<u8> {
        let mut bytes = range.as_bytes().to_vec();
        bytes.extend(self.device.config(range.offset, range.size));
        bytes
    }

    fn set_config(&mut self, range: ConfigRange, bytes: &[u8]) -> Result<Answer, Refusal> {
        // What a migration brings along is set here already.
        if range.flags == BY_DRIVER {
            let is_set = self.device.disk().set_config(range.offset, bytes);
            is_set.then_some(()).ok_or(Refusal::Config)?;
        }
        Ok(Answer::Done)
    }

    async fn set_addresses(&mut self, addresses: RingAddresses) -> Result<Answer, Refusal> {
        let parts = self.memory.ring_parts(&addresses)?;
        // Where only what is logged has changed, the ring runs on: everything is logged.
        self.ring(addresses.ring)?.set_parts(parts).await;
        self.start_ring(addresses.ring)
    }

    async fn set_event(
        &mut self,
        event: RingEvent,
        number: u32,
        descriptor: Option<OwnedFd>,
    ) -> Result<Answer, Refusal> {
        let ring = self.ring(number)?;
        match (event, descriptor) {
            (RingEvent::Kick, None) => return Err(Refusal::Polling),
            (RingEvent::Kick, Some(kick)) => {
                ring.set_kick(kick).await?;
                return self.start_ring(number);
            }
            (RingEvent::Call, call) => ring.set_call(call)?,
            (RingEvent::Error, error) => ring.set_error(error)?,
        }
        Ok(Answer::Done)
    }

    /// Starts a ring if everything for that is there.
    fn start_ring(&mut self, number: u32) -> Result<Answer, Refusal> {
        let surroundings = Surroundings {
            device: Rc::clone(&self.device),
            features: self.features & !(LOG_ALL | PROTOCOL_FEATURES),
            memory: self.memory.shared(),
            in_flight: self.in_flight.clone(),
            all_enabled: self.features & PROTOCOL_FEATURES == 0,
        };
        self.ring(number)?.start(&surroundings)?;
        Ok(Answer::Done)
    }

    async fn stop_ring(&mut self, state: RingState) -> Result<Answer, Refusal> {
        let base = self.ring(state.ring)?.stop().await;
        let state = RingState {
            number: base.into(),
            ..state
        };
        Ok(Answer::Bytes(state.as_bytes().to_vec()))
    }

    async fn stop_rings(&mut self) {
        // Together: each has to wait for its own requests.
        for ring in &mut self.rings {
            ring.begin_pause();
        }
        for ring in &mut self.rings {
            ring.stop().await;
        }
    }

    async fn reset(&mut self) {
        self.stop_rings().await;
        for ring in &mut self.rings {
            ring.reset();
        }
        self.device.disk().reset();
        self.status = 0;
    }
}

/// An error with its sources.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
