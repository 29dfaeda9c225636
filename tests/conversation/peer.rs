//! One of the two daemons, at work in a directory of its own.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::Outcome;
use super::normal::Normal;
use super::scene::{Action, Scene, Step};
use crate::support::daemon::Daemon;
use crate::support::{Qmp, Scratch};

/// A daemon and a client of its monitor.
pub struct Peer<'a> {
    scratch: &'a Scratch,
    qmp: Qmp,
    normal: Normal,
    /// Ended when dropped.
    _daemon: Daemon,
}

impl<'a> Peer<'a> {
    /// Prepares the directory and starts the program there.
    pub fn start(program: &Path, scratch: &'a Scratch, scene: &Scene) -> Self {
        for command in &scene.preparations {
            let (output, success) = shell(scratch, command);
            assert!(success, "{command}: {output}");
        }
        let mut arguments: Vec<String> = [
            "--chardev",
            "socket,id=conversation,path=conversation.sock,server=on,wait=off",
            "--monitor",
            "conversation",
        ]
        .map(str::to_owned)
        .into();
        arguments.extend(scene.arguments.iter().cloned());
        let daemon = Daemon::start_as(scratch, Command::new(program), &arguments);
        let qmp = Qmp::connect(&scratch.path("conversation.sock"));
        Self {
            scratch,
            qmp,
            normal: Normal::default(),
            _daemon: daemon,
        }
    }

    /// Does the steps, of which all but the first wait for events.
    pub fn perform(&mut self, steps: &[Step]) -> Outcome {
        let mut outcome = Outcome {
            answer: Value::Null,
            events: Vec::new(),
            before_reply: 0,
        };
        for step in steps {
            match &step.action {
                Action::Send(bytes, replies) => {
                    self.qmp.send(bytes);
                    self.qmp.send(b"\n");
                    let mut answer = self.reply(&mut outcome.events);
                    outcome.before_reply = outcome.events.len();
                    self.normal.answer(bytes, &mut answer);
                    for _ in 1..*replies {
                        answer = json!([answer, self.reply(&mut outcome.events)]);
                    }
                    outcome.answer = answer;
                }
                Action::Await(text) => self.wait(text, &mut outcome.events),
                Action::Run(command) => {
                    shell(self.scratch, command);
                }
                Action::Look(command) => {
                    let (output, success) = shell(self.scratch, command);
                    outcome.answer = json!({"success": success, "output": output});
                }
            }
        }
        outcome
    }

    fn reply(&mut self, events: &mut Vec<Value>) -> Value {
        loop {
            let message = self.message();
            if message.get("event").is_none() {
                return message;
            }
            events.push(message);
        }
    }

    fn wait(&mut self, text: &str, events: &mut Vec<Value>) {
        while !events.iter().any(|event| event.to_string().contains(text)) {
            let message = self.message();
            let is_event = message.get("event").is_some();
            events.push(message);
            if !is_event {
                return;
            }
        }
    }

    fn message(&mut self) -> Value {
        let mut message = self.qmp.receive();
        self.normal.message(&mut message);
        message
    }
}

/// What the command prints, and whether it succeeds.
fn shell(scratch: &Scratch, command: &str) -> (String, bool) {
    let ended = crate::support::run::run_in(scratch.dir(), "sh", &["-c", command]);
    let success = ended.success();
    (ended.stdout + &ended.stderr, success)
}
