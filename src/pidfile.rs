//! The pid file: while it exists with our process id in it, it is locked by us, so that a second
//! daemon with the same pid file does not start; it is removed when the daemon ends.
//!
//! The lock is the one the reference takes (a POSIX record lock over the whole file), so the two
//! exclude each other. It belongs to the process: take it after [`crate::daemonize::detach`].

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use stord_qmp::Error;

use crate::report::reason;

/// The locked pid file; dropping it removes it.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    _locked: File,
}

impl PidFile {
    /// Creates or takes over the file at `path` and writes the process id into it.
    ///
    /// # Errors
    /// The file cannot be created, or another process holds it.
    pub fn create(path: &Path) -> Result<Self, Error> {
        let failed = |what: &str, error: std::io::Error| {
            let reason = reason(&error);
            Error::generic(format!("cannot create PID file: {what}: {reason}")).with_source(error)
        };
        // Absolute, because the working directory is another one when the file is removed.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
        let mut file = loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(|error| {
                    failed(&format!("Could not create '{}'", path.display()), error)
                })?;
            lock(&file).map_err(|error| failed("Cannot lock pid file", error))?;
            if is_at(&file, &path) {
                break file;
            }
            // Another daemon ended and removed the file between our open and our lock.
        };
        file.set_len(0)
            .map_err(|error| failed("Failed to truncate pid file", error))?;
        writeln!(file, "{}", std::process::id())
            .map_err(|error| failed("Failed to write pid file", error))?;
        Ok(Self {
            path,
            _locked: file,
        })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Removed before the lock goes with the descriptor, so that no other daemon's file is hit.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the constants are int, the members short"
)]
fn lock(file: &File) -> std::io::Result<()> {
    let whole = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as nix::libc::c_short,
        l_whence: nix::libc::SEEK_SET as nix::libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_SETLK(&whole))?;
    Ok(())
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(ours), Ok(there)) => ours.dev() == there.dev() && ours.ino() == there.ino(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_the_process_id_and_goes_when_dropped() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pid");
        std::fs::write(&path, "99999 and more\n").expect("writable");
        let pidfile = PidFile::create(&path).expect("nobody holds it");
        let text = std::fs::read_to_string(&path).expect("readable");
        assert_eq!(text, format!("{}\n", std::process::id()));
        drop(pidfile);
        assert!(!path.exists());
    }

    #[test]
    fn missing_directory_is_named() {
        let error = PidFile::create(Path::new("/nonexistent/pid")).expect_err("no directory");
        assert_eq!(
            error.message,
            "cannot create PID file: Could not create '/nonexistent/pid': \
             No such file or directory"
        );
    }
}
