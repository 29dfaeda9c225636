//! `stord create`, `convert`, `info`, `check`, `resize` and `map`, beside qemu-img.

mod check;
mod convert;
mod create;
mod info;
mod map;
mod resize;

use std::path::Path;

use serde_json::Value;

use crate::support::daemon::program;
use crate::support::run::{Ended, run};

/// Runs a stord command.
#[track_caller]
fn stord<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Ended {
    run(program().to_str().unwrap(), args)
}

/// Runs a stord command that must succeed, and gives what it printed.
#[track_caller]
fn stord_ok<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> String {
    let ended = stord(args);
    assert!(ended.success(), "{ended:?}");
    ended.stdout
}

/// Runs a stord command that must fail with status 1, and gives its message.
#[track_caller]
fn refused<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> String {
    let ended = stord(args);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(ended.stdout, "");
    ended.stderr
}

/// What a command printed as JSON.
#[track_caller]
fn parsed(output: &str) -> Value {
    serde_json::from_str(output).unwrap_or_else(|error| panic!("{error}: {output}"))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
