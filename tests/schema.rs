//! The introspection as it was last agreed on. A change of the interface shows as a change of tests/golden/schema.json,
//! in the same commit.

use std::fs;
use std::path::Path;

use crate::needs;
use crate::support::daemon::{is_qemu, program};
use crate::support::run_ok;

#[test]
fn introspection_is_the_one_agreed_on() {
    needs!("python3");
    if is_qemu() {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("tests/golden/schema.json");
    let script = root.join("scripts/schema-diff");
    let found = run_ok(
        "python3",
        &[
            script.as_os_str(),
            "--print".as_ref(),
            program().as_os_str(),
        ],
    );
    let agreed = fs::read_to_string(&path).unwrap_or_default();
    let changed: Vec<String> = (agreed
        .lines()
        .filter(|line| !found.lines().any(|other| other == *line)))
    .map(|line| format!("- {line}"))
    .chain(
        (found
            .lines()
            .filter(|line| !agreed.lines().any(|other| other == *line)))
        .map(|line| format!("+ {line}")),
    )
    .collect();
    assert!(
        changed.is_empty(),
        "query-qmp-schema has changed:\n{}\nIf that is meant, renew what was agreed on:\n    \
         scripts/schema-diff --print target/debug/stord >tests/golden/schema.json",
        changed.join("\n")
    );
}
