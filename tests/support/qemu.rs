//! QEMU's own tools: they make the images and judge what the daemon left of them.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::Scratch;
use super::run::{run, run_ok};

/// Runs qemu-img, which must succeed.
#[track_caller]
pub fn img<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> String {
    run_ok("qemu-img", args)
}

/// Makes a qcow2 image; `options` as for `-o`, may be empty.
#[track_caller]
pub fn create(image: &Path, size: u64, options: &str) {
    let size = size.to_string();
    let image = image.to_str().unwrap();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([image, &size]);
    img(&args);
}

/// Runs qemu-io commands on the image, each of which must succeed.
#[track_caller]
pub fn io(image: &Path, format: &str, commands: &[String]) {
    // Some failures of a command show in its output only.
    for part in commands.chunks(100) {
        let mut args = vec!["-f", format];
        for command in part {
            args.extend(["-c", command]);
        }
        args.push(image.to_str().unwrap());
        let ended = run("qemu-io", &args);
        let bad = !ended.success() || ended.stdout.contains("failed");
        assert!(!bad, "qemu-io {part:?}: {ended:?}");
    }
}

/// The whole guest-visible content, as qemu-img sees it.
#[track_caller]
pub fn content(scratch: &Scratch, image: &Path, format: &str) -> Vec<u8> {
    let raw = scratch.path(&format!(
        "{}.oracle",
        image.file_name().unwrap().to_str().unwrap()
    ));
    img(&[
        "convert",
        "-f",
        format,
        "-O",
        "raw",
        image.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    let content = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    content
}

/// What `qemu-img check` finds.
#[derive(Debug, PartialEq, Eq)]
pub struct Check {
    /// Errors that endanger data.
    pub corruptions: u64,
    /// Clusters taken but not used.
    pub leaks: u64,
    /// What stopped the check.
    pub errors: u64,
}

/// Checks a qcow2 image.
#[track_caller]
pub fn check(image: &Path) -> Check {
    let ended = run(
        "qemu-img",
        &[
            "check",
            "-f",
            "qcow2",
            "--output=json",
            image.to_str().unwrap(),
        ],
    );
    let report: Value =
        serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("qemu-img check: {ended:?}"));
    let field = |name: &str| report[name].as_u64().unwrap_or(0);
    Check {
        corruptions: field("corruptions"),
        leaks: field("leaks"),
        errors: field("check-errors"),
    }
}

/// Asserts that `qemu-img check` finds neither an error nor a leak.
#[track_caller]
pub fn assert_clean(image: &Path) {
    let report = run(
        "qemu-img",
        &["check", "-f", "qcow2", image.to_str().unwrap()],
    );
    assert!(
        report.success(),
        "qemu-img check: {}{}",
        report.stdout,
        report.stderr
    );
}

/// Asserts that `qemu-img check` finds no error, be there leaks or not.
#[track_caller]
pub fn assert_no_corruption(image: &Path) {
    let found = check(image);
    assert_eq!(
        (found.corruptions, found.errors),
        (0, 0),
        "{}",
        img_check_text(image)
    );
}

fn img_check_text(image: &Path) -> String {
    let ended = run(
        "qemu-img",
        &["check", "-f", "qcow2", image.to_str().unwrap()],
    );
    ended.stdout + &ended.stderr
}
