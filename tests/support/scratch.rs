//! A directory of the test's own. Dropping it kills what still works with it, detaches the loop devices on files below it,
//! unmounts whatever is mounted below it and removes it, also while a test panics.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::mounts;
use super::run::run;

/// The test's own directory.
pub struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    /// A new directory on the disk, readable by every user.
    pub fn new() -> Scratch {
        Scratch::below(&std::env::temp_dir())
    }

    /// A new directory in memory where the machine has room for it, for images that are written a lot.
    pub fn in_memory() -> Scratch {
        let shm = Path::new("/dev/shm");
        if shm.is_dir() {
            Scratch::below(shm)
        } else {
            Scratch::new()
        }
    }

    fn below(parent: &Path) -> Scratch {
        let dir = tempfile::Builder::new()
            .prefix("stord-test-")
            .tempdir_in(parent)
            .expect("the directory for temporary files is writable");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Scratch { dir }
    }

    /// The directory itself.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The path of `name` in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes an empty file, as a mountpoint for instance.
    pub fn empty_file(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap();
        path
    }

    /// Makes a file with this content.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The names in the directory, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.dir())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// The processes that have the directory in their command line.
fn processes_naming(dir: &Path) -> Vec<i32> {
    let dir = dir.to_string_lossy().into_owned();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&dir)
    })
    .collect()
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Daemons whose guard a failing test did not get round to.
        for pid in processes_naming(self.dir()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        // A loop device can sit on a mount and carry a mount: go on as long as something was undone.
        for _ in 0..4 {
            let mut undone = false;
            for mount in mounts::below(self.dir()).iter().rev() {
                undone |= mounts::detach(mount);
            }
            for (device, file) in super::loop_device::all() {
                if Path::new(&file).starts_with(self.dir()) {
                    undone |= run("losetup", &["-d", &device]).success();
                }
            }
            if !undone {
                break;
            }
        }
    }
}
