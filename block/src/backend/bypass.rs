//! Bypasses: users that read a file themselves, because its bytes are, one for one, those of a backend.
//!
//! While a bypass exists, the bytes stay where they are: an edit that would put them elsewhere is refused. Everything else goes on
//! unseen by the bypass, and the reads past the backend are seen by nobody: they are not counted.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use stord_qmp::Error;

use super::{Backend, Root};
use crate::driver::{Driver, FILE};
use crate::graph::Node;

/// The right to read a backend's bytes from a file. Dropping it gives the right back.
pub struct Bypass {
    root: Arc<Root>,
    file: OwnedFd,
    direct: bool,
}

impl Bypass {
    /// The file, open for reading only. It carries no locks.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Whether the page cache is to be left alone (`cache.direct=on`).
    pub fn is_direct(&self) -> bool {
        self.direct
    }
}

impl Drop for Bypass {
    fn drop(&mut self) {
        self.root.bypasses.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Backend {
    /// A bypass, if the backend is a regular file with nothing but plain `raw` nodes in between, and no edit is going on. To be called
    /// on a context.
    pub fn bypass(&self) -> Option<Bypass> {
        // Keeps edits away until the bypass is counted.
        let _ticket = self.0.gate.try_enter()?;
        let mut node = self.0.node()?;
        loop {
            let below = match node.driver() {
                Driver::Protocol(leaf) => {
                    let (file, direct) = leaf.plain_file()?;
                    self.0.bypasses.fetch_add(1, Ordering::AcqRel);
                    return Some(Bypass {
                        root: Arc::clone(&self.0),
                        file,
                        direct,
                    });
                }
                Driver::Format(format) if format.is_plain() => node.children().node(FILE)?,
                Driver::Format(_) => return None,
            };
            node = below;
        }
    }
}

impl Root {
    /// Refuses an edit, which is in a drained section, that would give `node` and so this root other bytes.
    pub(crate) fn check_no_bypass(&self, node: &Node) -> Result<(), Error> {
        if self.bypasses.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        Err(Error::generic(format!(
            "Node '{}' is in use: the kernel reads its file without asking for {}",
            node.name(),
            self.name
        ))
        .with_hint("close the open files of the export, or create it with passthrough=off"))
    }
}
