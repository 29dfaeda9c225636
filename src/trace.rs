//! What the libraries log: warnings and errors always reach standard error as messages of the
//! daemon, and `-T` adds whatever its patterns match, to standard error or a file.
//!
//! The name of an event is the module it comes from, such as `stord_block::graph::open`. An event
//! that is not wanted costs one load: the decision is cached at its call site.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use stord_qmp::Error;
use stord_qmp::opts::Opts;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::report::{Origin, reason};

/// What the names of all events begin with.
const CRATES: &[&str] = &[
    "stord",
    "stord_aio",
    "stord_block",
    "stord_bridges",
    "stord_qmp",
];

/// What `-T help` prints.
pub const HELP: &str = "\
The name of a trace event is the module it comes from, for example
stord_block::graph::open. A pattern may hold '*' and '?':
  -T 'stord_block::*'    everything in the block layer
  -T '*'                 everything
A file given with events= holds one pattern per line; '-' in front of a
pattern takes out what it matches, and '#' begins a comment.
";

/// What is wanted, and where it goes.
struct Selection {
    patterns: Vec<Pattern>,
    file: Option<File>,
}

struct Pattern {
    glob: String,
    wanted: bool,
}

static SELECTION: Mutex<Selection> = Mutex::new(Selection {
    patterns: Vec::new(),
    file: None,
});

fn selection() -> MutexGuard<'static, Selection> {
    SELECTION.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts to log. Only the first call has an effect.
pub fn install() {
    // A second call would come from a test.
    let _ = tracing::subscriber::set_global_default(Log);
}

/// What `-T` came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Its patterns are in force.
    Done,
    /// It asked for [`HELP`].
    Help,
}

/// Does what the value of a `-T` says.
///
/// # Errors
/// It is not well-formed, or one of its files cannot be opened.
pub fn enable(text: &str, origin: &Origin) -> Result<Outcome, Error> {
    let mut opts = Opts::parse(text, "enable")?;
    if opts.help {
        return Ok(Outcome::Help);
    }
    let mut patterns = Vec::new();
    if let Some(glob) = opts.take("enable") {
        patterns.push(glob);
    }
    if let Some(path) = opts.take("events") {
        let text = std::fs::read_to_string(&path).map_err(|error| could_not_open(&path, error))?;
        let lines = text.lines().map(str::trim);
        patterns.extend(
            lines
                .filter(|l| !l.is_empty() && !l.starts_with('#'))
                .map(str::to_owned),
        );
    }
    let file = match opts.take("file") {
        None => None,
        Some(path) => Some(
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(&path)
                .map_err(|error| could_not_open(&path, error))?,
        ),
    };
    opts.finish()?;
    let mut selection = selection();
    for pattern in patterns {
        let (glob, wanted) = match pattern.strip_prefix('-') {
            Some(glob) => (glob, false),
            None => (pattern.as_str(), true),
        };
        if !can_match(glob) {
            if !glob.contains(['*', '?']) {
                origin.warning(&format!("trace event '{glob}' does not exist"), None);
            }
            continue;
        }
        selection.patterns.push(Pattern {
            glob: glob.to_owned(),
            wanted,
        });
    }
    if file.is_some() {
        selection.file = file;
    }
    drop(selection);
    tracing::callsite::rebuild_interest_cache();
    Ok(Outcome::Done)
}

fn could_not_open(path: &str, error: std::io::Error) -> Error {
    let reason = reason(&error);
    Error::generic(format!("could not open '{path}': {reason}")).with_source(error)
}

/// Whether there may be an event that the pattern matches.
fn can_match(glob: &str) -> bool {
    let literal = glob.split(['*', '?']).next().unwrap_or(glob);
    let is_open = literal.len() < glob.len();
    CRATES.iter().any(|name| match literal.strip_prefix(name) {
        Some(rest) => rest.is_empty() || rest.starts_with("::"),
        None => is_open && name.starts_with(literal),
    })
}

fn matches(glob: &[u8], name: &[u8]) -> bool {
    match (glob.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), None) => matches(rest, name),
        (Some((b'*', rest)), Some((_, after))) => matches(rest, name) || matches(glob, after),
        (Some((b'?', rest)), Some((_, after))) => matches(rest, after),
        (Some((letter, rest)), Some((first, after))) => letter == first && matches(rest, after),
        (None, Some(_)) | (Some(_), None) => false,
    }
}

impl Selection {
    fn wants(&self, target: &str) -> bool {
        let matching = |pattern: &&Pattern| matches(pattern.glob.as_bytes(), target.as_bytes());
        self.patterns
            .iter()
            .rev()
            .find(matching)
            .is_some_and(|pattern| pattern.wanted)
    }
}

/// The receiver of all events. Spans are not used.
struct Log;

fn is_message(metadata: &Metadata<'_>) -> bool {
    *metadata.level() <= Level::WARN
}

impl Subscriber for Log {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let ours = metadata.target().starts_with("stord");
        metadata.is_event()
            && ours
            && (is_message(metadata) || selection().wants(metadata.target()))
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(if selection().patterns.is_empty() {
            LevelFilter::WARN
        } else {
            LevelFilter::TRACE
        })
    }

    fn new_span(&self, _span: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}

    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let metadata = event.metadata();
        if is_message(metadata) {
            let message = text.joined();
            if *metadata.level() == Level::ERROR {
                Origin::none().error(&Error::generic(message));
            } else {
                Origin::none().warning(&message, None);
            }
        }
        let mut selection = selection();
        if selection.wants(metadata.target()) {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let line = format!(
                "{}@{}.{:06}:{} {}\n",
                std::process::id(),
                now.as_secs(),
                now.subsec_micros(),
                metadata.target(),
                text.joined()
            );
            // Tracing must not stop the daemon.
            let _ = match &mut selection.file {
                Some(file) => file.write_all(line.as_bytes()),
                None => std::io::stderr().write_all(line.as_bytes()),
            };
        }
    }

    fn enter(&self, _span: &span::Id) {}

    fn exit(&self, _span: &span::Id) {}
}

/// The message of an event and its fields after it.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Text {
    fn joined(&self) -> String {
        format!("{}{}", self.message, self.fields)
            .trim_start()
            .to_owned()
    }
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn glob(glob: &str, name: &str) -> bool {
        matches(glob.as_bytes(), name.as_bytes())
    }

    #[test]
    fn globs_match_whole_names() {
        assert!(glob("*", "stord_block::graph"));
        assert!(glob("stord_*::graph*", "stord_block::graph::open"));
        assert!(glob("stord_bloc?", "stord_block"));
        assert!(!glob("stord_block", "stord_block::graph"));
        assert!(!glob("*graph", "stord_block::graph::open"));
    }

    #[test]
    fn patterns_for_which_there_cannot_be_an_event_are_told_apart() {
        assert!(can_match("*"));
        assert!(can_match("sto*"));
        assert!(can_match("stord_block::graph"));
        assert!(!can_match("bdrv_co_preadv"));
        assert!(!can_match("qcow2_*"));
        assert!(!can_match("sto"));
    }

    #[test]
    fn last_matching_pattern_decides() {
        let pattern = |glob: &str, wanted| Pattern {
            glob: glob.to_owned(),
            wanted,
        };
        let selection = Selection {
            patterns: vec![
                pattern("stord_block::*", true),
                pattern("stord_block::io::*", false),
            ],
            file: None,
        };
        assert!(selection.wants("stord_block::graph"));
        assert!(!selection.wants("stord_block::io::read"));
        assert!(!selection.wants("stord_aio::pool"));
    }

    #[test]
    fn unknown_keys_are_refused() {
        let error = enable("foo=1", &Origin::none()).expect_err("no such key");
        assert_eq!(error.message, "Invalid parameter 'foo'");
        assert_eq!(enable("help", &Origin::none()).ok(), Some(Outcome::Help));
    }
}
