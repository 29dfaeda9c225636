//! Runs other programs with a time limit, so that a hanging daemon ends a test instead of stopping the whole run.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Far beyond what any program here takes on a busy machine of two cores.
const LIMIT_SECONDS: &str = "240";

/// How a program ended and what it printed.
#[derive(Debug)]
pub struct Ended {
    /// The exit status; 124 if it ran into the time limit, `None` if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ended {
    /// Whether it exited with status 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Ended {
        Ended {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// A command under the time limit, for callers that want to set its directory or environment.
pub fn limited(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=5", LIMIT_SECONDS])
        .arg(program)
        .stdin(Stdio::null());
    command
}

/// Runs the program and waits for its end.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Ended {
    limited(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("cannot start {program}: {error}"))
        .into()
}

/// Runs the program in a directory and waits for its end.
#[track_caller]
pub fn run_in<S: AsRef<OsStr>>(dir: &Path, program: impl AsRef<OsStr>, args: &[S]) -> Ended {
    let program = program.as_ref();
    limited(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()))
        .into()
}

/// Runs the program, panics with all it printed unless it succeeds, and returns its standard output.
#[track_caller]
pub fn run_ok<S: AsRef<OsStr>>(program: &str, args: &[S]) -> String {
    let ended = run(program, args);
    if !ended.success() {
        let args: Vec<_> = args
            .iter()
            .map(|arg| arg.as_ref().to_string_lossy())
            .collect();
        panic!(
            "{program} {} ended with {:?}\n{}{}",
            args.join(" "),
            ended.code,
            ended.stdout,
            ended.stderr
        );
    }
    ended.stdout
}
