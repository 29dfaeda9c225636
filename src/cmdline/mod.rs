//! Reads the command line into what is to be done, in the order it was given.
//!
//! There are two passes, as in the reference. The first one ends the process for `--help`,
//! `--version` and what is no option at all, whatever else was asked for, and learns whether to
//! daemonize. Everything else is a [`Step`], and what is wrong with a step is found out only when
//! the steps before it are done.

mod getopt;
pub mod help;

use std::ffi::OsString;
use std::path::PathBuf;

use getopt::{Given, Spec, Value};

use crate::report::Origin;

/// The options that are done one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Add a block node.
    Blockdev,
    /// Add a character device.
    Chardev,
    /// Add an export.
    Export,
    /// Add a monitor.
    Monitor,
    /// Start the NBD server.
    NbdServer,
    /// Add an object.
    Object,
    /// Say what to trace.
    Trace,
    /// An argument that is no option, which is an error.
    Operand,
}

/// One thing to do.
#[derive(Clone, Debug)]
pub struct Step {
    /// What.
    pub action: Action,
    /// With which value.
    pub value: String,
    /// Where to say it comes from.
    pub origin: Origin,
}

/// What the command line asks for.
#[derive(Clone, Debug, Default)]
pub struct CommandLine {
    /// Go into the background once start-up is complete.
    pub daemonize: bool,
    /// The pid file, if there is to be one.
    pub pidfile: Option<PathBuf>,
    /// What to do, in this order.
    pub steps: Vec<Step>,
}

/// What the first pass comes to.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Be the daemon.
    Run(CommandLine),
    /// Print this text to standard output and exit with 0.
    Print(String),
    /// Print this text to standard error, after the program's full name, and exit with 1.
    Usage(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Step(Action),
    Daemonize,
    Help,
    Pidfile,
    Version,
}

const SPECS: &[Spec<Kind>] = &[
    required("blockdev", None, Kind::Step(Action::Blockdev)),
    required("chardev", None, Kind::Step(Action::Chardev)),
    bare("daemonize", None, Kind::Daemonize),
    required("export", None, Kind::Step(Action::Export)),
    bare("help", Some('h'), Kind::Help),
    required("monitor", None, Kind::Step(Action::Monitor)),
    required("nbd-server", None, Kind::Step(Action::NbdServer)),
    required("object", None, Kind::Step(Action::Object)),
    required("pidfile", None, Kind::Pidfile),
    required("trace", Some('T'), Kind::Step(Action::Trace)),
    bare("version", Some('V'), Kind::Version),
];

const fn required(long: &'static str, short: Option<char>, kind: Kind) -> Spec<Kind> {
    Spec {
        long,
        short,
        value: Value::Required,
        kind,
    }
}

const fn bare(long: &'static str, short: Option<char>, kind: Kind) -> Spec<Kind> {
    Spec {
        long,
        short,
        value: Value::None,
        kind,
    }
}

/// Makes the first pass over the arguments, the program's name not among them.
pub fn read(args: Vec<OsString>) -> Outcome {
    let mut words = Vec::with_capacity(args.len());
    for arg in args {
        match arg.into_string() {
            Ok(word) => words.push(word),
            Err(arg) => {
                let lossy = arg.to_string_lossy();
                return Outcome::Usage(format!("argument '{lossy}' is not valid UTF-8"));
            }
        }
    }
    let (given, error) = getopt::scan(SPECS, &words);
    let mut command_line = CommandLine::default();
    for option in given {
        let Given { kind, value, text } = option;
        let action = match kind {
            Some(Kind::Help) => return Outcome::Print(help::usage()),
            Some(Kind::Version) => return Outcome::Print(help::version()),
            Some(Kind::Daemonize) => {
                command_line.daemonize = true;
                continue;
            }
            Some(Kind::Pidfile) => {
                command_line.pidfile = Some(value.into());
                continue;
            }
            Some(Kind::Step(action)) => action,
            None => Action::Operand,
        };
        command_line.steps.push(Step {
            action,
            value,
            origin: Origin::option(&text),
        });
    }
    match error {
        Some(message) => Outcome::Usage(message),
        None => Outcome::Run(command_line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_words(words: &[&str]) -> Outcome {
        read(words.iter().map(OsString::from).collect())
    }

    #[test]
    fn steps_keep_their_order() {
        let Outcome::Run(line) = read_words(&[
            "--export",
            "e",
            "--daemonize",
            "--pidfile=a",
            "--blockdev=b",
            "--pidfile",
            "c",
            "x",
            "--object",
            "o",
        ]) else {
            panic!("it is a daemon's command line");
        };
        let steps: Vec<(Action, &str)> = line
            .steps
            .iter()
            .map(|step| (step.action, step.value.as_str()))
            .collect();
        assert_eq!(
            steps,
            [
                (Action::Export, "e"),
                (Action::Blockdev, "b"),
                (Action::Operand, "x"),
                (Action::Object, "o"),
            ]
        );
        assert!(line.daemonize);
        assert_eq!(line.pidfile, Some(PathBuf::from("c")));
    }

    #[test]
    fn first_of_help_version_and_mistake_decides() {
        assert!(matches!(
            read_words(&["--blockdev", "nope", "x", "-V", "--bogus"]),
            Outcome::Print(text) if text == help::version()
        ));
        assert!(matches!(
            read_words(&["--bogus", "-V"]),
            Outcome::Usage(message) if message == "unrecognized option '--bogus'"
        ));
        assert!(matches!(
            read_words(&["-hV"]),
            Outcome::Print(text) if text == help::usage()
        ));
    }

    #[test]
    fn argument_in_another_encoding_is_refused() {
        use std::os::unix::ffi::OsStringExt;
        let args = vec![OsString::from_vec(vec![b'-', 0xff])];
        assert!(matches!(read(args), Outcome::Usage(message) if message.contains("UTF-8")));
    }
}
