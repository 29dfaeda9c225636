//! Everything the daemon says to a person goes to standard error through here, prefixed with the
//! program's name and, while an option is being processed, with that option as it was given.
//!
//! The shape is the reference's: `NAME: --OPTION VALUE: message`, with advice on lines of its own
//! after it. A program that reads these messages finds the same prefix and the same words.

use std::io::Write;
use std::rc::Rc;
use std::sync::OnceLock;

use stord_qmp::Error;

static PROGRAM: OnceLock<String> = OnceLock::new();

/// Sets the name in front of every message: the base name of `argv0`. Only the first call counts.
pub fn set_program(argv0: &str) {
    let base = argv0.rsplit('/').next().unwrap_or(argv0);
    // A second call would come from a test, where the name does not matter.
    let _ = PROGRAM.set(base.to_owned());
}

/// The name in front of every message.
pub fn program() -> &'static str {
    PROGRAM.get().map_or("stord", String::as_str)
}

/// What went wrong in the words of the C library, without Rust's "(os error N)".
pub fn reason(error: &std::io::Error) -> String {
    Error::reason(error)
}

/// Reports what is wrong with the command line itself, in the C library's form: under the program's
/// whole name.
pub fn usage(argv0: &str, message: &str) {
    // Nobody can be told that standard error is closed.
    let _ = writeln!(std::io::stderr(), "{argv0}: {message}");
}

/// Prints what was asked for to standard output.
pub fn print(text: &str) {
    // Nobody can be told that it is closed.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Where a message comes from: an option of the command line, or nothing in particular.
#[derive(Clone, Debug, Default)]
pub struct Origin(Option<Rc<str>>);

impl Origin {
    /// A message that no option caused.
    pub const fn none() -> Self {
        Self(None)
    }

    /// A message caused by an option, which is `text` as it stood on the command line.
    pub fn option(text: &str) -> Self {
        Self(Some(text.into()))
    }

    /// Reports a failure and the advice that goes with it.
    pub fn error(&self, error: &Error) {
        self.print("", &error.message, error.hint.as_deref());
    }

    /// Reports something that may not be what was wanted, with advice.
    pub fn warning(&self, message: &str, hint: Option<&str>) {
        self.print("warning: ", message, hint);
    }

    /// Reports something that a person waiting for the daemon must know.
    pub fn info(&self, message: &str) {
        self.print("info: ", message, None);
    }

    fn print(&self, kind: &str, message: &str, hint: Option<&str>) {
        let text = self.format(program(), kind, message, hint);
        // One write, so that lines of several threads and processes do not mix. Nobody can be told
        // that standard error is closed.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }

    fn format(&self, program: &str, kind: &str, message: &str, hint: Option<&str>) -> String {
        let mut text = format!("{program}: ");
        if let Some(option) = &self.0 {
            text.push_str(option);
            text.push_str(": ");
        }
        text.push_str(kind);
        text.push_str(message);
        text.push('\n');
        if let Some(hint) = hint {
            text.push_str(hint.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_stands_between_program_and_message() {
        let text = Origin::option("--blockdev nope").format("stord", "", "no such driver", None);
        assert_eq!(text, "stord: --blockdev nope: no such driver\n");
    }

    #[test]
    fn reason_is_the_c_library_s_text() {
        let error = std::io::Error::from_raw_os_error(nix::libc::EAGAIN);
        assert_eq!(reason(&error), "Resource temporarily unavailable");
    }

    #[test]
    fn advice_has_its_own_line() {
        let text = Origin::none().format("stord", "warning: ", "odd", Some("do this\n"));
        assert_eq!(text, "stord: warning: odd\ndo this\n");
    }
}
