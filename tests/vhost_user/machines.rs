//! Virtual machines with the disk: `machine.py` starts them and says what each case sees to.

use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::needs;
use crate::support::Scratch;
use crate::support::daemon::{is_qemu, program};
use crate::support::prerequisites::skip;
use crate::support::run::Ended;

/// The exit status of scripts/vm when the machine could not be made.
const NO_MACHINE: i32 = 2;

/// Emulation takes all processors there are.
static MACHINE: Mutex<()> = Mutex::new(());

#[track_caller]
fn pass(case: &str) {
    if is_qemu() || !cfg!(target_arch = "x86_64") {
        return;
    }
    needs!(
        "qemu-system-x86_64",
        "qemu-img",
        "fio",
        "python3",
        "busybox",
        "cpio",
        "kmod",
        "xz",
        "zstd"
    );
    let _machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let scratch = Scratch::new();
    let made: Ended = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/vm"))
        .arg("files")
        .arg(scratch.dir())
        .arg("obeys")
        .env("STORD_BIN", program())
        .output()
        .expect("scripts/vm can be run")
        .into();
    if made.code == Some(NO_MACHINE) {
        skip(&made.stderr);
        return;
    }
    assert!(made.success(), "{made:?}");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vhost_user/machine.py");
    let ended: Ended = Command::new("python3")
        .args([script, case])
        .arg(program())
        .arg(scratch.dir())
        .output()
        .expect("Python can be run")
        .into();
    assert!(ended.success(), "{case}:\n{}{}", ended.stdout, ended.stderr);
}

#[test]
fn machine_lives_on_one_queue() {
    pass("one_queue");
}

#[test]
fn machine_lives_on_four_queues() {
    pass("four_queues");
}

#[test]
fn machine_waits_for_a_daemon_that_is_killed() {
    pass("restarts");
}

#[test]
fn machine_moves_to_another_monitor() {
    pass("migration");
}
