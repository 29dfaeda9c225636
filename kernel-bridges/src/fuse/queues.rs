//! Gets the queues of an export going, on their contexts: classic ones, or those of io_uring with a classic one beside them.

use std::future::Future;
use std::os::fd::{AsFd as _, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;

use stord_aio::sync::oneshot;
use stord_aio::{Context, ContextGone, Errno};

use crate::export::Ended;

use super::session::Session;
use super::{classic, kernel, uring};

/// Descriptors for the queues of one connection, those that there are first.
///
/// The more contexts, the more classic queues. With io_uring one of them is enough; the other descriptors carry the commands.
pub(super) fn clone_devices(mut devices: Vec<OwnedFd>, contexts: &[Context]) -> Vec<OwnedFd> {
    while let Some(first) = devices.first()
        && devices.len() < contexts.len()
    {
        match kernel::clone_device(first.as_fd()) {
            Ok(device) => devices.push(device),
            Err(errno) => {
                tracing::warn!(%errno, "cannot clone the FUSE device: serving with fewer queues");
                break;
            }
        }
    }
    devices
}

/// Serves each descriptor with a classic queue.
pub(super) fn serve_classic(
    devices: Vec<OwnedFd>,
    contexts: &[Context],
    session: &Arc<Session>,
) -> Ended {
    let queues: Vec<_> = devices
        .into_iter()
        .zip(contexts)
        .enumerate()
        .map(|(index, (device, context))| {
            let session = Arc::clone(session);
            context.run(move || classic::serve(device, session, index))
        })
        .collect();
    Box::pin(all_ended(queues))
}

/// Serves the kernel's io_uring queues, dealt over the contexts, and the first descriptor with a classic queue.
///
/// # Errors
/// The kernel refuses a queue. What was started ends with the connection, which the caller has to end: the second result resolves
/// then.
pub(super) async fn serve_io_uring(
    device: OwnedFd,
    contexts: &[Context],
    session: &Arc<Session>,
) -> (Result<(), Errno>, Ended) {
    // The kernel says how many queues there are: a context has one share of them.
    let mut distinct: Vec<Context> = Vec::new();
    for context in contexts {
        if distinct
            .iter()
            .all(|known| known.index() != context.index())
        {
            distinct.push(context.clone());
        }
    }
    let mut result = Ok(());
    let mut queues = Vec::new();
    match uring::queue_count() {
        Err(errno) => result = Err(errno),
        Ok(count) => {
            for registered in register(&device, &distinct, session, count, &mut queues) {
                // Without an answer, the context has gone, or there was no descriptor for it.
                let registered = registered.await.unwrap_or(Err(Errno::ENODEV));
                result = result.and(registered);
            }
        }
    }
    let classic = serve_classic(vec![device], contexts, session);
    let ended = Box::pin(async move {
        all_ended(queues).await;
        classic.await;
    });
    (result, ended)
}

type Queue = Pin<Box<dyn Future<Output = Result<(), ContextGone>>>>;

/// Starts `count` queues; each context answers whether its share has been registered.
fn register(
    device: &OwnedFd,
    contexts: &[Context],
    session: &Arc<Session>,
    count: u16,
    queues: &mut Vec<Queue>,
) -> Vec<oneshot::Receiver<Result<(), Errno>>> {
    let (common, inboxes) = uring::Common::new(session, contexts.len(), count);
    let mut registered = Vec::new();
    for (place, (context, inbox)) in contexts.iter().zip(inboxes).enumerate() {
        let numbers: Vec<u16> = (0..count).skip(place).step_by(contexts.len()).collect();
        let (answer, result) = oneshot::channel();
        registered.push(result);
        let device = match kernel::clone_device(device.as_fd()) {
            Ok(device) => device,
            Err(errno) => {
                common.give_up(numbers.len());
                // The receiver is in the list.
                let _ = answer.send(Err(errno));
                continue;
            }
        };
        let common = Arc::clone(&common);
        queues.push(Box::pin(context.run(move || {
            uring::serve(common, place, device, numbers, inbox, answer)
        })));
    }
    registered
}

async fn all_ended<Q: Future<Output = Result<(), ContextGone>>>(queues: Vec<Q>) {
    for queue in queues {
        // A context that has ended has ended its queue before.
        let _ = queue.await;
    }
}
