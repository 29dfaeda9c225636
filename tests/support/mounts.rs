//! The mount table, read from the kernel rather than through the mounted file systems, which may be dead.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

/// One line of the mount table.
#[derive(Debug)]
pub struct Mount {
    /// Where it is mounted.
    pub at: PathBuf,
    /// Options of the mount and of the file system, comma separated.
    pub options: String,
}

/// All mounts, in the order they were made.
pub fn all() -> Vec<Mount> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table
        .lines()
        .map(|line| {
            let (left, right) = line.split_once(" - ").expect("mountinfo has a separator");
            let left: Vec<&str> = left.split(' ').collect();
            let right: Vec<&str> = right.split(' ').collect();
            Mount {
                at: PathBuf::from(left[4].replace("\\040", " ")),
                options: format!("{},{}", left[5], right[2]),
            }
        })
        .collect()
}

/// The mount on exactly this path, the topmost if there are several.
pub fn on(path: &Path) -> Option<Mount> {
    all().into_iter().rev().find(|mount| mount.at == path)
}

/// Where something is mounted on or below `dir`, in mount order.
pub fn below(dir: &Path) -> Vec<PathBuf> {
    all()
        .into_iter()
        .map(|mount| mount.at)
        .filter(|at| at.starts_with(dir))
        .collect()
}

/// Unmounts lazily, as is right for file systems whose server is dead. False if nothing was there.
pub fn detach(path: &Path) -> bool {
    umount2(path, MntFlags::MNT_DETACH).is_ok()
}
