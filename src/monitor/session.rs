//! Serves one client of a monitor from its greeting to its end.
//!
//! Commands are executed one at a time, in the order they came, and answered in that order; as in
//! the reference's storage daemon none can be executed out of band, which is answered at once. Other
//! monitors go on meanwhile: nothing here blocks. A command that has begun runs to its end even
//! if its client is gone. What the daemon holds for a client is bounded: while [`OUTPUT_LIMIT`]
//! bytes wait to be read by it, or [`QUEUE_LIMIT`] of its commands wait to be executed, nothing
//! more is read from it.

use std::collections::VecDeque;
use std::rc::Rc;

use serde_json::Value;
use stord_qmp::Error;
use stord_qmp::command::{Execution, Registry};
use stord_qmp::schema::control::VersionInfo;
use stord_qmp::session::{Incoming, Session};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::events::{Broadcast, Dated};
use crate::chardev::Connection;
use crate::lifecycle::Shutdown;

/// Bytes of output above which nothing more is read or executed.
const OUTPUT_LIMIT: usize = 64 << 10;

/// Commands waiting above which nothing more is read.
const QUEUE_LIMIT: usize = 8;

/// Bytes read at once.
const READ_SIZE: usize = 4096;

/// What all sessions act on.
pub struct Service<S> {
    /// The commands.
    pub registry: Registry<S>,
    /// What the commands act on.
    pub state: Rc<S>,
    /// What the greeting reports.
    pub version: VersionInfo,
    /// The events.
    pub events: Broadcast,
    /// After the wish to end no further command is executed.
    pub shutdown: Shutdown,
}

/// Serves the client until it is gone, or until the events are closed and it has read everything.
pub async fn serve<S>(service: &Service<S>, connection: Connection, pretty: bool) {
    let mut client = Client {
        session: Session::new(pretty),
        queue: VecDeque::new(),
        output: Vec::new(),
        running: None,
        unflushed: false,
        input_ended: false,
        output_failed: false,
    };
    client.output = client.session.greeting(&service.version);
    client.converse(service, connection).await;
}

struct Client {
    session: Session,
    queue: VecDeque<Incoming>,
    output: Vec<u8>,
    running: Option<Running>,
    /// Whether bytes were written that the writer may still hold.
    unflushed: bool,
    input_ended: bool,
    output_failed: bool,
}

struct Running {
    id: Option<Value>,
    execution: Execution,
}

/// What happened next.
enum Next {
    Finished(Result<Value, Error>),
    Read(std::io::Result<usize>),
    Written(std::io::Result<usize>),
    Flushed(std::io::Result<()>),
    Event(Option<Dated>),
    Shutdown,
}

impl Client {
    async fn converse<S>(&mut self, service: &Service<S>, connection: Connection) {
        let Connection {
            mut reader,
            mut writer,
        } = connection;
        let mut events = service.events.subscribe();
        let mut events_ended = false;
        let mut buffer = vec![0; READ_SIZE];
        loop {
            self.start_commands(service);
            let ending = self.input_ended || events_ended;
            let stopped = service.shutdown.is_requested();
            let has_work = self.running.is_some() || (!stopped && !self.queue.is_empty());
            let has_output = !self.output.is_empty() || self.unflushed;
            if ending && !has_work && !has_output {
                return;
            }
            let may_read = !self.input_ended
                && !stopped
                && self.queue.len() < QUEUE_LIMIT
                && self.output.len() < OUTPUT_LIMIT;
            let running = &mut self.running;
            // In this order, so that an event is told before the result of the command that caused it.
            let next = tokio::select! {
                biased;
                event = events.recv(), if !events_ended && self.output.len() < OUTPUT_LIMIT => {
                    Next::Event(event)
                }
                result = execution(running), if running.is_some() => Next::Finished(result),
                read = reader.read(&mut buffer), if may_read => Next::Read(read),
                sent = send(&mut writer, &self.output), if has_output => sent,
                () = service.shutdown.requested(), if !stopped => Next::Shutdown,
            };
            events_ended |= matches!(next, Next::Event(None));
            if matches!(next, Next::Finished(_)) {
                // Those that the command caused while it ran.
                while let Ok(dated) = events.try_recv() {
                    self.take(service, Next::Event(Some(dated)), &buffer);
                }
            }
            self.take(service, next, &buffer);
        }
    }

    /// Does what has to be done about what happened; `buffer` is what was read into.
    fn take<S>(&mut self, service: &Service<S>, next: Next, buffer: &[u8]) {
        match next {
            Next::Finished(result) => {
                let id = self.running.take().and_then(|running| running.id);
                self.reply(id, result);
            }
            Next::Read(Ok(0)) => self.input_ended = true,
            Next::Read(Ok(count)) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                self.receive(service, bytes);
            }
            Next::Written(Ok(count)) if count > 0 => {
                self.output.drain(..count);
                self.unflushed = true;
            }
            Next::Flushed(Ok(())) => self.unflushed = false,
            Next::Read(Err(_)) | Next::Written(_) | Next::Flushed(Err(_)) => self.lose(),
            Next::Event(Some(dated)) => {
                let bytes = self.session.event(&dated.0, dated.1);
                self.say(bytes);
            }
            Next::Event(None) if !service.shutdown.is_requested() => {
                tracing::warn!("monitor client disconnected: it does not read its events");
                self.lose();
            }
            Next::Event(None) | Next::Shutdown => {}
        }
    }

    /// Queues what the bytes complete. What is out of band overtakes the queue, unless that is full.
    fn receive<S>(&mut self, service: &Service<S>, bytes: &[u8]) {
        for incoming in self.session.feed(bytes) {
            let overtakes = incoming.is_out_of_band() && self.queue.len() < QUEUE_LIMIT;
            match incoming {
                Incoming::Answer { id, result, .. } if overtakes => self.reply(id, result),
                Incoming::Execute(request) if overtakes => {
                    let error = service.registry.refuse_out_of_band(&request);
                    self.reply(request.id, Err(error));
                }
                waiting => {
                    self.queue.push_back(waiting);
                    self.start_commands(service);
                }
            }
        }
    }

    /// Begins the next command, if none runs and its answer has room.
    fn start_commands<S>(&mut self, service: &Service<S>) {
        while self.running.is_none()
            && self.output.len() < OUTPUT_LIMIT
            && !service.shutdown.is_requested()
        {
            match self.queue.pop_front() {
                None => return,
                Some(Incoming::Answer { id, result, .. }) => self.reply(id, result),
                Some(Incoming::Execute(request)) => {
                    tracing::debug!(command = request.command, "execute");
                    self.running = Some(Running {
                        id: request.id.clone(),
                        execution: service.registry.execute(Rc::clone(&service.state), request),
                    });
                }
            }
        }
    }

    fn reply(&mut self, id: Option<Value>, result: Result<Value, Error>) {
        let bytes = self.session.reply(id, result);
        self.say(bytes);
    }

    fn say(&mut self, bytes: Vec<u8>) {
        if !self.output_failed {
            self.output.extend(bytes);
        }
    }

    /// The client is gone: what it has not been told and what has not begun is dropped.
    fn lose(&mut self) {
        self.input_ended = true;
        self.output_failed = true;
        self.unflushed = false;
        self.output.clear();
        self.queue.clear();
    }
}

/// Writes some of the output, or flushes if there is none.
async fn send(writer: &mut (dyn AsyncWrite + Unpin), output: &[u8]) -> Next {
    if output.is_empty() {
        return Next::Flushed(writer.flush().await);
    }
    Next::Written(writer.write(output).await)
}

async fn execution(running: &mut Option<Running>) -> Result<Value, Error> {
    match running {
        Some(running) => running.execution.as_mut().await,
        None => std::future::pending().await,
    }
}
