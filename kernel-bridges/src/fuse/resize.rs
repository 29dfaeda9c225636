//! Changes of the image's length.
//!
//! Only an export that grows under writes holds the permission to resize all the time. Any other writable export asks the control
//! thread for each change, which takes the permission for as long as that lasts: so a job that forbids others to resize its node can
//! run beside the export.

use stord_aio::sync::{mpsc, oneshot};
use stord_aio::{Context, Errno};
use stord_block::graph::Claim;
use stord_block::{Backend, Graph, Permissions};

/// How a file system changes its image's length.
pub(super) enum Resizer {
    /// With the permission that its own backend has, or has not.
    Own,
    /// By asking the control thread.
    Control(mpsc::UnboundedSender<ResizeRequest>),
}

/// What the control thread is asked.
pub(crate) struct ResizeRequest {
    size: u64,
    exact: bool,
    done: oneshot::Sender<Result<(), Errno>>,
}

impl Resizer {
    /// Changes the length; `exact` forbids a longer result than asked for.
    pub(super) async fn resize(
        &self,
        backend: &Backend,
        size: u64,
        exact: bool,
    ) -> Result<(), Errno> {
        let Self::Control(requests) = self else {
            return backend.truncate(size, exact).await;
        };
        let (done, answer) = oneshot::channel();
        let request = ResizeRequest { size, exact, done };
        // The control thread serves this until the file system is gone.
        requests.send(request).map_err(|_| Errno::EIO)?;
        answer.await.map_err(|_| Errno::EIO)?
    }
}

/// Answers a file system's requests until it is gone; on the control thread.
pub(crate) async fn serve_resizes(
    mut requests: mpsc::UnboundedReceiver<ResizeRequest>,
    graph: &Graph,
    node_name: &str,
    description: &str,
    context: Context,
) {
    while let Some(ResizeRequest { size, exact, done }) = requests.recv().await {
        let claim = Claim {
            permissions: Permissions::RESIZE,
            shared: Permissions::all(),
        };
        let result = match graph.attach(node_name, description, claim).await {
            Ok(backend) => {
                let resizing = backend.clone();
                let resized = context
                    .run(move || async move { resizing.truncate(size, exact).await })
                    .await;
                graph.detach(backend).await;
                resized.unwrap_or(Err(Errno::EIO))
            }
            Err(error) => {
                tracing::debug!(%error, "no permission to resize");
                Err(Errno::EPERM)
            }
        };
        // Whoever asked may have gone with the mount.
        let _ = done.send(result);
    }
}
