//! The directory where the daemons of a user keep what others of theirs have to find: /run/stord for root.
//!
//! It is nobody else's, and goes when nothing is in it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

/// The directory of one user.
#[derive(Clone, Debug)]
pub struct StateDirectory(PathBuf);

impl StateDirectory {
    /// That of the user who runs this process.
    pub fn of_user() -> Self {
        let user = geteuid();
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty());
        Self(if user.is_root() {
            PathBuf::from("/run/stord")
        } else if let Some(runtime) = runtime {
            Path::new(&runtime).join("stord")
        } else {
            std::env::temp_dir().join(format!("stord-{user}"))
        })
    }

    /// Another one, for tests.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is, or would be.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes it, or checks that nobody else could have made it for us. Another daemon of the user may remove it as long as it is empty.
    ///
    /// # Errors
    /// It cannot be made, or belongs to another user.
    pub fn create(&self) -> io::Result<&Path> {
        create(&self.0)?;
        Ok(&self.0)
    }

    /// The same with a directory inside it.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_inside(&self, name: &str) -> io::Result<PathBuf> {
        loop {
            let path = self.create()?.join(name);
            match create(&path) {
                // The one around it has just been removed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                created => return created.map(|()| path),
            }
        }
    }
}

fn create(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        result => return result,
    }
    let found = fs::symlink_metadata(path)?;
    if found.is_dir() && found.uid() == geteuid().as_raw() {
        return Ok(());
    }
    Err(io::Error::other("it belongs to another user"))
}
