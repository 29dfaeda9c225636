//! The same conversation with QEMU's storage daemon and with ours, held anew in each run: the same returns, the same classes and
//! texts of errors, the same events in an order that the reference allows.
//!
//! The requests are in `tests/conversation/*.qmp`, one to a line. The first word of a line says what it is:
//!
//! | | |
//! |---|---|
//! | `#` | a comment |
//! | `--` | options for the start of both daemons |
//! | `!` | a shell command, run in the directory of each daemon |
//! | `?` | the same, and its output is compared |
//! | `~` | waits for an event that has this text in it |
//! | `=` | bytes to send as they are, `\\xNN` being a byte |
//! | `=3` | the same, and there are three replies |
//! | anything else | a command, and its arguments as JSON |
//!
//! A word in brackets before all this is a key of [`INTENDED`]: what is answered is meant to differ. That it still does is
//! checked, too.

mod command_line;
mod normal;
mod peer;
mod scene;

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use crate::support::Scratch;
use crate::support::daemon::{is_qemu, program};
use crate::support::prerequisites::{find, skip};
use crate::support::run::run;
use peer::Peer;
use scene::{Action, Scene, Step};

/// The version whose every word counts.
const REFERENCE: &str = "qemu-storage-daemon version 10.0.2";

/// What is meant to differ, and why.
const INTENDED: &[(&str, &str)] = &[
    (
        "version",
        "the version is the reference's, the package is ours",
    ),
    (
        "ejected",
        "an image that cannot be activated stays as it was: inactive, and described as before",
    ),
    (
        "iothread-in-use",
        "an iothread that serves an export cannot be deleted: in the reference the export then stands still",
    ),
    (
        "iothread-of-export",
        "a running export stays on its threads",
    ),
    (
        "refused-value",
        "a value that is refused is not taken over; in the reference it stays, and every later change fails",
    ),
    (
        "listfile",
        "the reference's QMP knows the type only by a name under which its object cannot be made",
    ),
    (
        "stale-length",
        "the kernel is told of the new length at once; in the reference it shows the old one for a while",
    ),
    (
        "create-in-use",
        "a file in which somebody writes is not made an image of; the reference overwrites it first and fails then",
    ),
    (
        "batch",
        "a number that stays what it is counts as unchanged; the reference compares it with text",
    ),
    (
        "iothreads",
        "an export may have several iothreads, as in later versions of the reference",
    ),
    (
        "numbers",
        "numbers in ids come back as they were written; the reference makes floating point of them",
    ),
    (
        "several",
        "of several members too many another one is named",
    ),
    (
        "empty",
        "an empty object for what has no other members is as good as none; the reference takes it for an unknown option",
    ),
    (
        "backing-format",
        "the format that is noted is that of the backing node; the reference notes that of the image itself, which makes \
         the next opening fail",
    ),
];

/// The reference, if it is the version that is compared with.
fn reference() -> Option<std::path::PathBuf> {
    let path = find("qemu-storage-daemon");
    let version = run("qemu-storage-daemon", &["--version"]).stdout;
    match path {
        Some(path) if version.starts_with(REFERENCE) => Some(path),
        _ => {
            skip(&format!(
                "this is no {REFERENCE}: run scripts/setup test on Debian 12 or 13"
            ));
            None
        }
    }
}

/// Holds a conversation with both, and fails with all that differs.
#[track_caller]
fn hold(name: &str) {
    if is_qemu() || !crate::support::needs_root() {
        return;
    }
    let Some(reference) = reference() else { return };
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conversation");
    let scene = Scene::read(&directory.join(format!("{name}.qmp")));
    let theirs = Scratch::new();
    let ours = Scratch::new();
    let mut theirs = Peer::start(&reference, &theirs, &scene);
    let mut ours = Peer::start(&program(), &ours, &scene);
    let mut differences = String::new();
    for steps in scene.units() {
        compare_unit(steps, &mut theirs, &mut ours, &mut differences);
    }
    assert!(
        differences.is_empty(),
        "{name}: the reference (-) and stord (+) differ:\n{differences}"
    );
}

/// Compares what both make of a request and of the waiting for its consequences.
fn compare_unit(steps: &[Step], theirs: &mut Peer, ours: &mut Peer, differences: &mut String) {
    let Some(first) = steps.first() else { return };
    let expected = theirs.perform(steps);
    let found = ours.perform(steps);
    let agree = expected.answer == found.answer && expected.agrees_in_events(&found);
    let mut note = |what: &str| {
        let _ = writeln!(
            differences,
            "line {}: {}{what}",
            first.line,
            first.action.text()
        );
    };
    match &first.intended {
        None if agree => {}
        None => {
            note("");
            for (sign, outcome) in [('-', &expected), ('+', &found)] {
                for line in outcome.lines() {
                    let _ = writeln!(differences, "    {sign} {line}");
                }
            }
        }
        Some(key) => {
            if !INTENDED.iter().any(|(known, _)| known == key) {
                note(": nobody says why this is to differ");
            }
            if agree {
                note(": does not differ any more");
            }
        }
    }
}

/// What came of a request.
struct Outcome {
    /// The reply, or what else there is to compare.
    answer: Value,
    /// The events, of which so many came before the reply.
    events: Vec<Value>,
    before_reply: usize,
}

impl Outcome {
    /// Whether the events are the same in the same order, and none that the reference tells before the reply comes after it.
    /// What a job does by itself may come before or after the reply, as it has progressed.
    fn agrees_in_events(&self, other: &Self) -> bool {
        let is_own = |event: &&Value| {
            let status = event["data"]["status"].as_str().unwrap_or_default();
            !matches!(status, "waiting" | "pending" | "aborting" | "concluded")
        };
        let prompt = |outcome: &Self| {
            let before = outcome.events.iter().take(outcome.before_reply);
            before.filter(is_own).count()
        };
        self.events == other.events && prompt(self) == prompt(other)
    }

    fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.events.iter().map(Value::to_string).collect();
        lines.insert(self.before_reply.min(lines.len()), self.answer.to_string());
        lines
    }
}

macro_rules! conversations {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                hold(stringify!($name));
            }
        )*

        #[test]
        fn every_conversation_is_held() {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conversation");
            let files = std::fs::read_dir(directory).unwrap();
            let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
            let mut scenes: Vec<_> = names.filter(|name| name.ends_with(".qmp")).collect();
            scenes.sort();
            let mut held = [$(concat!(stringify!($name), ".qmp")),*];
            held.sort_unstable();
            assert_eq!(scenes, held);
        }
    };
}

conversations! {
    activity
    backing_names
    chardevs
    exports
    images
    jobs
    nodes
    objects
    protocol
    reopening
    vduse
    vhost_user
}

/// How a request reads in the list of differences.
impl Action {
    fn text(&self) -> String {
        match self {
            Action::Send(bytes, _) => String::from_utf8_lossy(bytes).into_owned(),
            Action::Await(text) => format!("~ {text}"),
            Action::Run(command) => format!("! {command}"),
            Action::Look(command) => format!("? {command}"),
        }
    }
}
