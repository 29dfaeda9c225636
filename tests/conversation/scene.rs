//! The requests of a conversation, as its file has them.

use std::path::Path;

/// A conversation.
pub struct Scene {
    /// Options for the start of the daemon.
    pub arguments: Vec<String>,
    /// Shell commands to run before that.
    pub preparations: Vec<String>,
    steps: Vec<Step>,
}

/// A line of a conversation.
pub struct Step {
    /// The line's number, from 1 on.
    pub line: usize,
    /// Why the answers are meant to differ, if they are.
    pub intended: Option<String>,
    /// What to do.
    pub action: Action,
}

/// What a line asks for.
pub enum Action {
    /// These bytes are sent, and so many replies are waited for.
    Send(Vec<u8>, usize),
    /// An event with this text is waited for.
    Await(String),
    /// A shell command is run.
    Run(String),
    /// A shell command is run for its output.
    Look(String),
}

impl Scene {
    /// Reads a conversation.
    pub fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut scene = Self {
            arguments: Vec::new(),
            preparations: Vec::new(),
            steps: Vec::new(),
        };
        for (line, text) in (1..).zip(text.lines()) {
            scene.take(line, text.trim());
        }
        scene
    }

    fn take(&mut self, line: usize, text: &str) {
        let (intended, text) = match text.strip_prefix('[').and_then(|text| text.split_once(']')) {
            Some((key, rest)) => (Some(key.to_owned()), rest.trim_start()),
            None => (None, text),
        };
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        let action = match word {
            "" | "#" => return,
            "--" => {
                self.arguments.extend(rest.split(' ').map(str::to_owned));
                return;
            }
            "!" if self.steps.is_empty() => {
                self.preparations.push(rest.to_owned());
                return;
            }
            "!" => Action::Run(rest.to_owned()),
            "?" => Action::Look(rest.to_owned()),
            "~" => Action::Await(rest.to_owned()),
            bytes if bytes.starts_with('=') => {
                let replies = bytes.trim_start_matches('=').parse().unwrap_or(1);
                Action::Send(unescaped(rest), replies)
            }
            command => Action::Send(request(command, rest).into_bytes(), 1),
        };
        self.steps.push(Step {
            line,
            intended,
            action,
        });
    }

    /// Each request together with the waiting for its consequences.
    pub fn units(&self) -> impl Iterator<Item = &[Step]> {
        let is_consequence = |_: &Step, next: &Step| matches!(next.action, Action::Await(_));
        self.steps.chunk_by(is_consequence)
    }
}

fn request(command: &str, arguments: &str) -> String {
    match arguments {
        "" => format!(r#"{{"execute":"{command}"}}"#),
        _ => format!(r#"{{"execute":"{command}","arguments":{arguments}}}"#),
    }
}

/// The bytes that a line means: `\xNN` is a byte.
fn unescaped(text: &str) -> Vec<u8> {
    let mut parts = text.split("\\x");
    let mut bytes: Vec<u8> = parts.next().unwrap_or_default().bytes().collect();
    for part in parts {
        let (digits, rest) = part.split_at(2);
        bytes.push(u8::from_str_radix(digits, 16).expect("two hexadecimal digits after \\x"));
        bytes.extend(rest.bytes());
    }
    bytes
}
