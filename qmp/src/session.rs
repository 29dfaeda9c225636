//! One client's conversation: bytes in, commands out; results and events in, bytes out. No I/O.
//!
//! A session begins by negotiating capabilities. Until `qmp_capabilities` has succeeded no other
//! command is executed and no event is sent. Commands are handed out in the order they came, and
//! each must be answered by one [`Session::reply`], in that order; the answers that the session can
//! give itself, to what is no command and to the negotiation, are handed out in their place. What
//! [`Incoming::is_out_of_band`] is answered at once.
//!
//! Whatever bytes a client sends, the session stays in step: see [`crate::json`].

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::error::{Error, ErrorClass};
use crate::event::Event;
use crate::json::{self, Reader};
use crate::order;
use crate::schema::control::{QmpCapabilities, QmpCapability, VersionInfo};
use crate::{from_json, to_json};

/// The command that ends the negotiation.
pub const NEGOTIATION: &str = "qmp_capabilities";

/// A conversation with a client.
pub struct Session {
    reader: Reader,
    pretty: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Negotiating,
    Ready { oob: bool },
}

/// What a client asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Incoming {
    /// A command to execute, its result to be passed to [`Session::reply`].
    Execute(Request),
    /// Something that is settled already, to be passed to [`Session::reply`] in its turn.
    Answer {
        /// The id of the command, if it has one.
        id: Option<Value>,
        /// The result.
        result: Result<Value, Error>,
        /// Whether it was asked for out of band.
        oob: bool,
    },
}

impl Incoming {
    /// Whether it is to overtake what came before it and is not settled yet.
    pub fn is_out_of_band(&self) -> bool {
        match self {
            Self::Execute(request) => request.oob,
            Self::Answer { oob, .. } => *oob,
        }
    }
}

/// A command to execute.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What the client marks the command and its reply with; any value.
    pub id: Option<Value>,
    /// The command's name.
    pub command: String,
    /// The command's arguments.
    pub arguments: Map<String, Value>,
    /// Whether it is to be executed out of band, overtaking commands in progress.
    pub oob: bool,
}

impl Session {
    /// A session that lays out its output for people if `pretty`.
    pub fn new(pretty: bool) -> Self {
        Self {
            reader: Reader::default(),
            pretty,
            state: State::Negotiating,
        }
    }

    /// The bytes that open the conversation.
    pub fn greeting(&self, version: &VersionInfo) -> Vec<u8> {
        let capabilities: Vec<_> = QmpCapability::ALL.iter().map(QmpCapability::name).collect();
        let version = to_json(version);
        self.line(&json!({"QMP": {"version": version, "capabilities": capabilities}}))
    }

    /// Takes bytes from the client and returns what they complete.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Incoming> {
        let mut incoming = Vec::new();
        let Self { reader, state, .. } = self;
        reader.feed(bytes, |value| incoming.push(state.receive(value)));
        incoming
    }

    /// Whether the negotiation is over, so that commands are executed and events sent.
    pub fn is_ready(&self) -> bool {
        self.state != State::Negotiating
    }

    /// The bytes that answer the command with that id.
    pub fn reply(&self, id: Option<Value>, result: Result<Value, Error>) -> Vec<u8> {
        let id = id.map(|id| ("id".to_owned(), id));
        let members: Map<_, _> = match result {
            Ok(value) => [("return".to_owned(), value)]
                .into_iter()
                .chain(id)
                .collect(),
            Err(error) => {
                let error = ("error".to_owned(), error.to_json());
                id.into_iter().chain([error]).collect()
            }
        };
        self.line(&Value::Object(members))
    }

    /// The bytes that report an event which happened at that time; none while negotiating.
    pub fn event(&self, event: &Event, at: SystemTime) -> Vec<u8> {
        if !self.is_ready() {
            return Vec::new();
        }
        let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut members = json!({
            "timestamp": {"seconds": since.as_secs(), "microseconds": since.subsec_micros()},
            "event": event.name,
        });
        if event.data != json!({}) {
            members["data"] = event.data.clone();
        }
        self.line(&members)
    }

    fn line(&self, value: &Value) -> Vec<u8> {
        let mut text = if self.pretty {
            json::to_pretty(value).replace('\n', "\r\n")
        } else {
            json::to_compact(value)
        };
        text.push_str("\r\n");
        text.into_bytes()
    }
}

impl State {
    /// Decides what to do about a value from the client.
    fn receive(&mut self, value: Result<Value, Error>) -> Incoming {
        let mut oob = false;
        let (id, request) = match value {
            Ok(Value::Object(mut members)) => {
                oob = *self == (Self::Ready { oob: true })
                    && members.contains_key("exec-oob")
                    && !members.contains_key("execute");
                (members.shift_remove("id"), self.request(members))
            }
            Ok(_) => {
                let message = "QMP input must be a JSON object";
                (None, Err(Error::generic(message)))
            }
            Err(error) => (None, Err(error)),
        };
        let result = match request {
            Ok(request) if request.command == NEGOTIATION => self.negotiate(request),
            Ok(request) => return Incoming::Execute(Request { id, ..request }),
            Err(error) => Err(error),
        };
        Incoming::Answer { id, result, oob }
    }

    /// Reads a command, all of whose members must be known.
    fn request(self, mut members: Map<String, Value>) -> Result<Request, Error> {
        let in_band = command_name(&mut members, "execute")?;
        let out_of_band = match self {
            Self::Ready { oob: true } => command_name(&mut members, "exec-oob")?,
            _ => None,
        };
        let arguments = match members.shift_remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => {
                let message = "QMP input member 'arguments' must be an object";
                return Err(Error::generic(message));
            }
        };
        if let Some(name) = members.keys().min_by_key(|name| order::rank(name)) {
            let message = format!("QMP input member '{name}' is unexpected");
            return Err(Error::generic(message));
        }
        let (command, oob) = match (in_band, out_of_band) {
            (Some(command), None) => (command, false),
            (None, Some(command)) => (command, true),
            (None, None) => return Err(Error::generic("QMP input lacks member 'execute'")),
            (Some(_), Some(_)) => {
                let message = "QMP input member 'execute' clashes with 'exec-oob'";
                return Err(Error::generic(message));
            }
        };
        if self == Self::Negotiating && command != NEGOTIATION {
            return Err(Error::new(
                ErrorClass::CommandNotFound,
                format!("Expecting capabilities negotiation with '{NEGOTIATION}'"),
            ));
        }
        Ok(Request {
            id: None,
            command,
            arguments,
            oob,
        })
    }

    fn negotiate(&mut self, request: Request) -> Result<Value, Error> {
        if request.oob {
            return Err(refused_oob(NEGOTIATION));
        }
        let wanted: QmpCapabilities = from_json(Value::Object(request.arguments))?;
        if *self != Self::Negotiating {
            return Err(Error::new(
                ErrorClass::CommandNotFound,
                "Capabilities negotiation is already complete, command ignored",
            ));
        }
        let oob = wanted
            .enable
            .unwrap_or_default()
            .contains(&QmpCapability::Oob);
        *self = Self::Ready { oob };
        Ok(json!({}))
    }
}

fn command_name(members: &mut Map<String, Value>, key: &str) -> Result<Option<String>, Error> {
    match members.shift_remove(key) {
        None => Ok(None),
        Some(Value::String(name)) => Ok(Some(name)),
        Some(_) => {
            let message = format!("QMP input member '{key}' must be a string");
            Err(Error::generic(message))
        }
    }
}

/// The error of a command that must not overtake others.
pub(crate) fn refused_oob(command: &str) -> Error {
    Error::generic(format!("The command {command} does not support OOB"))
}
