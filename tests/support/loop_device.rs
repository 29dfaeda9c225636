//! Loop devices as guards.

use std::path::Path;

use super::run::{run, run_ok};

/// A loop device over a file; detached when dropped.
pub struct LoopDevice {
    /// Its path, `/dev/loopN`.
    pub path: String,
}

impl LoopDevice {
    /// Attaches the file, reading and writing it with O_DIRECT if `direct`.
    #[track_caller]
    pub fn attach(file: &Path, direct: bool) -> LoopDevice {
        let direct = format!("--direct-io={}", if direct { "on" } else { "off" });
        let file = file.to_str().unwrap();
        let path = run_ok("losetup", &["--find", "--show", &direct, file])
            .trim()
            .to_owned();
        LoopDevice { path }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run("losetup", &["--detach", &self.path]);
    }
}

/// All loop devices with the file under each.
pub fn all() -> Vec<(String, String)> {
    run(
        "losetup",
        &[
            "--list",
            "--noheadings",
            "--raw",
            "--output",
            "NAME,BACK-FILE",
        ],
    )
    .stdout
    .lines()
    .filter_map(|line| line.split_once(' '))
    .map(|(device, file)| {
        (
            device.to_owned(),
            file.trim_end_matches(" (deleted)").to_owned(),
        )
    })
    .collect()
}
