//! A QMP client over a unix socket that keeps events until they are asked for.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// A client past the greeting, with capabilities negotiated.
pub struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    events: Vec<Value>,
    /// What the daemon said first.
    pub greeting: Value,
}

/// An error reply.
#[derive(Debug, PartialEq, Eq)]
pub struct QmpError {
    /// The class, such as `GenericError`.
    pub class: String,
    /// The text for people.
    pub desc: String,
}

impl Qmp {
    /// Connects, reads the greeting, negotiates.
    #[track_caller]
    pub fn connect(path: &Path) -> Qmp {
        let mut qmp = Qmp::connect_raw(path);
        qmp.execute("qmp_capabilities", json!({}));
        qmp
    }

    /// Connects and reads the greeting only.
    #[track_caller]
    pub fn connect_raw(path: &Path) -> Qmp {
        let stream =
            UnixStream::connect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        let mut qmp = Qmp {
            stream,
            lines,
            events: Vec::new(),
            greeting: Value::Null,
        };
        qmp.greeting = qmp.receive();
        qmp
    }

    /// Sends these bytes as they are.
    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next message, event or reply.
    #[track_caller]
    pub fn receive(&mut self) -> Value {
        let mut line = String::new();
        let count = self
            .lines
            .read_line(&mut line)
            .expect("the daemon answers in time");
        assert_ne!(count, 0, "the daemon closed the connection");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("not JSON ({error}): {line}"))
    }

    /// The next reply; events before it are kept.
    #[track_caller]
    pub fn reply(&mut self) -> Value {
        loop {
            let message = self.receive();
            if message.get("event").is_none() {
                return message;
            }
            self.events.push(message);
        }
    }

    /// Executes a command.
    ///
    /// # Errors
    /// The daemon's error reply.
    #[track_caller]
    pub fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let message = json!({"execute": command, "arguments": arguments});
        self.send(format!("{message}\n").as_bytes());
        let mut reply = self.reply();
        match reply.get("error") {
            Some(error) => Err(QmpError {
                class: error["class"].as_str().unwrap().to_owned(),
                desc: error["desc"].as_str().unwrap().to_owned(),
            }),
            None => Ok(reply["return"].take()),
        }
    }

    /// Executes a command that must succeed.
    #[track_caller]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.try_execute(command, arguments)
            .unwrap_or_else(|error| panic!("{command}: {}: {}", error.class, error.desc))
    }

    /// Executes a command that must fail, and returns the text of its `GenericError`.
    #[track_caller]
    pub fn refuse(&mut self, command: &str, arguments: Value) -> String {
        match self.try_execute(command, arguments) {
            Ok(value) => panic!("{command} succeeded: {value}"),
            Err(error) => {
                assert_eq!(error.class, "GenericError", "{}", error.desc);
                error.desc
            }
        }
    }

    /// Waits for an event of this name and returns its data.
    #[track_caller]
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return self.events.remove(at)["data"].take();
            }
            let message = self.receive();
            assert!(
                message.get("event").is_some(),
                "a reply nobody waits for: {message}"
            );
            self.events.push(message);
        }
    }
}
