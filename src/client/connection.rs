//! A connection to a monitor, stord's or QEMU's: one command at a time, and events as they come.

use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::report::{Origin, reason};

/// How long a monitor may take to greet before the person is told what may be the matter.
const PATIENCE: Duration = Duration::from_secs(2);

/// A connection past the greeting.
pub struct Connection {
    writer: Box<dyn Write>,
    replies: Receiver<Value>,
    serial: u64,
}

/// Why there is no result.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// The monitor says no.
    Refused {
        /// The kind of error.
        class: String,
        /// What is wrong.
        message: String,
    },
    /// The monitor is gone, or was never there.
    Lost(String),
}

impl Failure {
    /// What is wrong, for people.
    pub fn message(&self) -> &str {
        match self {
            Self::Refused { message, .. } | Self::Lost(message) => message,
        }
    }
}

/// What is to be done with events. It is done on a thread of its own.
pub type EventSink = Box<dyn FnMut(&Value) + Send>;

impl Connection {
    /// Connects to a monitor: the path of a socket, or `host:port`.
    ///
    /// # Errors
    /// Nobody listens there, or somebody who is no monitor.
    pub fn open(place: &str, mut events: EventSink) -> Result<Self, Failure> {
        let lost = |error: io::Error| {
            let reason = reason(&error);
            Failure::Lost(format!("cannot connect to '{place}': {reason}"))
        };
        let (reader, writer) = connect(place).map_err(lost)?;
        let (sender, replies) = channel();
        thread::spawn(move || receive(reader, &sender, &mut events));
        let mut connection = Self {
            writer,
            replies,
            serial: 0,
        };
        let greeting = match connection.replies.recv_timeout(PATIENCE) {
            Err(RecvTimeoutError::Timeout) => {
                let waiting = "no greeting yet: another client may be using this monitor, waiting";
                Origin::none().info(waiting);
                connection.replies.recv().ok()
            }
            greeting => greeting.ok(),
        };
        if greeting.is_none_or(|greeting| greeting.get("QMP").is_none()) {
            let message = format!("'{place}' does not greet as a QMP monitor does");
            return Err(Failure::Lost(message));
        }
        connection.execute("qmp_capabilities", None)?;
        Ok(connection)
    }

    /// Has a command done, and waits for its result.
    ///
    /// # Errors
    /// The monitor refuses, or is gone.
    pub fn execute(&mut self, command: &str, arguments: Option<Value>) -> Result<Value, Failure> {
        let mut request = json!({"execute": command});
        if let Some(arguments) = arguments {
            request["arguments"] = arguments;
        }
        self.request(request)
    }

    /// Sends a request as it is, but for its id, and waits for the result.
    ///
    /// # Errors
    /// The monitor refuses, or is gone.
    pub fn request(&mut self, mut request: Value) -> Result<Value, Failure> {
        self.serial += 1;
        let id = json!(format!("stord-{}", self.serial));
        if let Some(request) = request.as_object_mut() {
            request.insert("id".to_owned(), id.clone());
        }
        let text = format!("{request}\n");
        let sent = self.writer.write_all(text.as_bytes());
        sent.and_then(|()| self.writer.flush())
            .map_err(|error| Failure::Lost(format!("the monitor is gone: {}", reason(&error))))?;
        loop {
            let gone = |_| Failure::Lost("the monitor has closed the connection".to_owned());
            let mut reply = self.replies.recv().map_err(gone)?;
            let error = reply.get("error").filter(|error| error.is_object());
            // What cannot be understood has no id.
            if reply.get("id") != Some(&id) && (error.is_none() || reply.get("id").is_some()) {
                continue;
            }
            if let Some(error) = error {
                let text = |key| error[key].as_str().unwrap_or_default().to_owned();
                return Err(Failure::Refused {
                    class: text("class"),
                    message: text("desc"),
                });
            }
            return Ok(reply["return"].take());
        }
    }

    /// Waits until the monitor closes the connection.
    pub fn wait_for_end(&self) {
        while self.replies.recv().is_ok() {}
    }
}

fn connect(place: &str) -> io::Result<(Box<dyn Read + Send>, Box<dyn Write>)> {
    let is_path = place.contains('/') || !place.contains(':');
    if is_path {
        let stream = UnixStream::connect(place)?;
        return Ok((Box::new(stream.try_clone()?), Box::new(stream)));
    }
    let stream = TcpStream::connect(place)?;
    stream.set_nodelay(true)?;
    Ok((Box::new(stream.try_clone()?), Box::new(stream)))
}

/// Takes messages apart until there are no more, or no more that are JSON.
fn receive(reader: Box<dyn Read + Send>, replies: &Sender<Value>, events: &mut EventSink) {
    let messages = serde_json::Deserializer::from_reader(BufReader::new(reader)).into_iter();
    for message in messages {
        let Ok(message) = message else {
            return;
        };
        let message: Value = message;
        if message.get("event").is_some() {
            events(&message);
        } else if replies.send(message).is_err() {
            return;
        }
    }
}
