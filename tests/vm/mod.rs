//! Tests under a kernel that has VDUSE, the NBD client and ublk as modules: `scripts/vm` boots it in a virtual machine, with the
//! scripts beside this file as the tests. Several share one boot, which costs more than most of them.

use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::needs;
use crate::support::daemon::{is_qemu, program};
use crate::support::prerequisites::skip;
use crate::support::run::Ended;

/// The exit status of scripts/vm when the machine could not be run at all.
const NO_MACHINE: i32 = 2;

/// Emulation takes all processors there are: one machine at a time.
static MACHINE: Mutex<()> = Mutex::new(());

#[track_caller]
fn pass_in_vm(tests: &[&str]) {
    if is_qemu() || !cfg!(target_arch = "x86_64") {
        return;
    }
    needs!(
        "qemu-system-x86_64",
        "busybox",
        "cpio",
        "kmod",
        "xz",
        "zstd"
    );
    let _machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let ended: Ended = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/vm"))
        .arg("run")
        .args(tests)
        .env("STORD_BIN", program())
        .output()
        .expect("scripts/vm can be run")
        .into();
    if ended.code == Some(NO_MACHINE) {
        skip(&ended.stderr);
        return;
    }
    assert!(
        ended.success(),
        "scripts/vm run {} ended with {:?}\n{}{}",
        tests.join(" "),
        ended.code,
        ended.stdout,
        ended.stderr
    );
}

#[test]
fn kernel_nbd_device_works() {
    pass_in_vm(&["boots", "nbd-device"]);
}

#[test]
fn vduse_disks_work() {
    pass_in_vm(&["vduse-space", "vduse-shapes", "vduse-files"]);
}

#[test]
fn vduse_disks_outlive_their_daemon() {
    pass_in_vm(&["vduse-attach", "vduse-recovery"]);
}

#[test]
fn images_are_attached() {
    pass_in_vm(&["attach-nbd", "attach-vduse"]);
}
