//! Images for tests that `qemu-img` makes.

use std::path::Path;
use std::process::Command;

pub(super) use super::opened::{Image, Setup, defaults};

/// Runs a tool of QEMU; a missing one fails the test with what to install.
pub(super) fn qemu(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program} ({error}): install qemu-utils"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An empty image made by `qemu-img create` with these options.
pub(super) fn created(options: &str, size: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image.qcow2");
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([text(&path), size]);
    qemu("qemu-img", &args);
    std::fs::read(&path).expect("the image")
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("a name in UTF-8")
}

/// Compares without printing megabytes.
#[track_caller]
pub(super) fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: lengths");
    if let Some(at) = ours.iter().zip(theirs).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {at:#x} is {:#x}, not {:#x}",
            ours[at], theirs[at]
        );
    }
}
