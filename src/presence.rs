//! Tells the other stords of this user what this one does: whoever connects to the socket that each
//! has in the user's directory is told in JSON, and that is all that happens there. A socket on which
//! nobody listens is that of a daemon that is gone.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use crate::daemon::Daemon;
use crate::mount::registry::Registry;

/// How the names of the sockets end.
pub const ENDING: &str = "status";

/// The socket of this process, there until dropped.
pub struct Presence {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Presence {
    /// Makes the socket. Needs a `LocalSet`.
    ///
    /// # Errors
    /// The user's directory cannot be made, written or trusted.
    pub fn announce(daemon: &Rc<Daemon>, registry: &Registry) -> io::Result<Self> {
        let (listener, path) = listen(registry)?;
        let started = SystemTime::now();
        let daemon = Rc::downgrade(daemon);
        let task = tokio::task::spawn_local(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::task::spawn_local(answer(client, Weak::clone(&daemon), started));
            }
        });
        Ok(Self { path, task })
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
        if let Some(directory) = self.path.parent() {
            // It stays while others have something there.
            let _ = std::fs::remove_dir(directory);
        }
    }
}

fn listen(registry: &Registry) -> io::Result<(UnixListener, PathBuf)> {
    loop {
        let directory = registry.directory()?;
        let path = directory.join(format!("{}.{ENDING}", std::process::id()));
        // One of a process that had our number before.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        match UnixListener::bind(&path) {
            Ok(listener) => {
                restrict(&path)?;
                return Ok((listener, path));
            }
            // Another stord has removed the directory with its last entry.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

/// Lets nobody but the user in, should the directory be opened to others.
fn restrict(path: &Path) -> io::Result<()> {
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))
}

async fn answer(mut client: UnixStream, daemon: Weak<Daemon>, started: SystemTime) {
    let Some(daemon) = daemon.upgrade() else {
        return;
    };
    let text = describe(&daemon, started).await.to_string();
    drop(daemon);
    // A client that has gone need not know.
    let _ = client.write_all(text.as_bytes()).await;
}

async fn describe(daemon: &Daemon, started: SystemTime) -> Value {
    let arguments: Vec<String> = std::env::args_os()
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let since = started.duration_since(UNIX_EPOCH).unwrap_or_default();
    let in_use = |device: &stord_qmp::schema::chardev::ChardevInfo| device.frontend_open;
    let monitors: Vec<String> = daemon
        .chardevs
        .query()
        .into_iter()
        .filter(in_use)
        .map(|device| device.filename)
        .collect();
    // Without their nodes if the disk does not answer: the list is complete anyhow.
    let nodes = daemon.graph.query_named_block_nodes(true).await;
    let nodes = nodes.unwrap_or_default();
    let device = daemon.attached.borrow().clone();
    let device = device.as_ref().and_then(|path| path.to_str());
    let exports: Vec<Value> = daemon
        .exports
        .query()
        .into_iter()
        .map(|export| {
            let name = Some(export.node_name.as_str());
            let node = nodes.iter().find(|node| node.node_name.as_deref() == name);
            json!({
                "id": export.id,
                "type": stord_qmp::to_json(&export.r#type),
                "node-name": export.node_name,
                "image": node.map(|node| &node.file),
                // Under a device, the mountpoint is hidden.
                "mountpoint": daemon.exports.mountpoint(&export.id).filter(|_| device.is_none()),
                "device": export.device.as_deref().or(device),
            })
        })
        .collect();
    json!({
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "started": since.as_secs(),
        "arguments": arguments,
        "monitors": monitors,
        "exports": exports,
    })
}
