//! A daemon that must not start: what it says, how it ends, and that it leaves nothing behind.

use super::daemon::{is_qemu, program, run_to_end};
use super::run::Ended;
use super::{Scratch, mounts};

/// Starts the daemon with arguments of which the last two (or the last one) are at fault, and compares what it says.
#[track_caller]
pub fn assert_refused(scratch: &Scratch, args: &[&str], message: &str) {
    let before = scratch.names();
    // Were the arguments accepted, QEMU's daemon would run on: then the time limit makes the test fail.
    let ended = run_to_end(scratch, args);
    let wrong = refusal_fault(scratch, args, message, &before, &ended);
    assert!(wrong.is_none(), "{}", wrong.unwrap_or_default());
}

fn refusal_fault(
    scratch: &Scratch,
    args: &[&str],
    message: &str,
    before: &[String],
    ended: &Ended,
) -> Option<String> {
    let program = program();
    let name = program.file_name().unwrap().to_string_lossy().into_owned();
    let wanted = format!("{name}: {message}\n");
    // Faults of the option syntax itself come from below the program, which knows its whole path only.
    let said = ended.stderr.replace(program.to_str().unwrap(), &name);
    if said != wanted {
        return Some(format!(
            "{args:?}\n  said    {said:?}\n  instead {wanted:?}"
        ));
    }
    if ended.code != Some(1) {
        return Some(format!(
            "{args:?}\n  ended with {:?} instead of 1",
            ended.code
        ));
    }
    let after = scratch.names();
    if !is_qemu() && after != before {
        return Some(format!(
            "{args:?}\n  left behind {after:?}, there was {before:?}"
        ));
    }
    let left = mounts::below(scratch.dir());
    for mount in &left {
        mounts::detach(mount);
    }
    if !is_qemu() && !left.is_empty() {
        return Some(format!("{args:?}\n  left mounts behind: {left:?}"));
    }
    None
}

/// Checks many single options: `(option, its value, the message after both)`, each preceded by the options in `first`.
#[track_caller]
pub fn assert_all_refused(scratch: &Scratch, first: &[&str], cases: &[(&str, &str, &str)]) {
    let mut faults = Vec::new();
    for (option, value, message) in cases {
        let mut args = first.to_vec();
        args.extend([option, value]);
        let before = scratch.names();
        let ended = run_to_end(scratch, &args);
        let message = format!("{option} {value}: {message}");
        faults.extend(refusal_fault(scratch, &args, &message, &before, &ended));
    }
    assert!(
        faults.is_empty(),
        "{} of {} are wrong:\n{}",
        faults.len(),
        cases.len(),
        faults.join("\n")
    );
}
