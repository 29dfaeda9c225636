//! What a test needs from the machine. By hand a missing piece skips the test loudly and names the remedy; with `CI=true`
//! it fails, so that nothing is skipped there.

use std::io::Write;
use std::path::PathBuf;

/// Ends the calling test early unless the machine has all of these programs (and root, if `root` stands first).
///
/// ```ignore
/// needs!(root, "qemu-img", "fio");
/// ```
#[macro_export]
macro_rules! needs {
    (root $(, $program:literal)* $(,)?) => {
        if !($crate::support::needs_root() && $crate::support::needs(&[$($program),*])) {
            return;
        }
    };
    ($($program:literal),+ $(,)?) => {
        if !$crate::support::needs(&[$($program),+]) {
            return;
        }
    };
}

/// Whether all these programs are there; if not, the test is to return.
#[track_caller]
pub fn needs(programs: &[&str]) -> bool {
    for program in programs {
        if find(program).is_none() {
            return skip(&format!(
                "{program} is not installed: run scripts/setup test"
            ));
        }
    }
    true
}

/// Whether the test may mount and use loop devices; if not, the test is to return.
#[track_caller]
pub fn needs_root() -> bool {
    if !nix::unistd::geteuid().is_root() {
        return skip("not root: run scripts/test as root or with sudo installed");
    }
    if std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .is_err()
    {
        return skip(
            "/dev/fuse cannot be opened: load the kernel module fuse, or give the container the device",
        );
    }
    true
}

/// Says why the running test is skipped, past the test program's capture of output. Always false.
#[track_caller]
pub fn skip(why: &str) -> bool {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("a test");
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{name} lacks a prerequisite, and CI skips nothing: {why}"
    );
    // Not eprintln!, whose output the test harness keeps to itself when the test passes.
    let _ = writeln!(std::io::stderr(), "\nSKIPPED {name}: {why}");
    false
}

/// Where the program is, in PATH or in the directories of the system's own tools.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// The Python that has the `qemu.qmp` package: scripts/setup made it beside cargo's own output.
pub fn python_with_qmp() -> Option<PathBuf> {
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    Some(target.parent()?.join("venv/bin/python3")).filter(|python| python.exists())
}
