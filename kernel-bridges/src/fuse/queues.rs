//! Gets the queues of an export going, on their contexts: classic ones, or those of io_uring with a classic one beside them.

use std::future::Future;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use stord_aio::sync::oneshot;
use stord_aio::{Context, ContextGone, Errno};

use crate::export::Ended;

use super::entries::Common;
use super::held::HeldEntries;
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

/// Queues of io_uring.
pub(super) struct RingQueues {
    pub(super) common: Arc<Common>,
    /// Whether the kernel took all entries. Where it did not, what was started ends with the connection, which the caller has to end.
    pub(super) registered: Result<(), Errno>,
    pub(super) ended: Ended,
}

/// Serves the kernel's io_uring queues, dealt over the contexts, and the descriptor with a classic queue. `held` are entries that there
/// are already.
pub(super) async fn serve_io_uring(
    device: OwnedFd,
    contexts: &[Context],
    session: &Arc<Session>,
    held: HeldEntries,
) -> RingQueues {
    // The kernel says how many queues there are.
    let mut registered = Ok(());
    let (count, held) = uring::queue_count()
        .and_then(|count| Ok((count, held.of_queues(count)?)))
        .unwrap_or_else(|errno| {
            registered = Err(errno);
            (0, Vec::new())
        });
    // A context has one share of the queues.
    let mut distinct: Vec<Context> = Vec::new();
    for context in contexts {
        if distinct
            .iter()
            .all(|known| known.index() != context.index())
        {
            distinct.push(context.clone());
        }
    }
    if registered.is_err() {
        distinct.clear();
    }
    let mut existing = vec![0; count.into()];
    for entry in &held {
        existing[usize::from(entry.parts.queue)] += 1;
    }
    let (common, inboxes) = Common::new(session, distinct.len(), count, held);
    let mut queues = Vec::new();
    let mut answers = Vec::new();
    for (place, (context, inbox)) in distinct.iter().zip(inboxes).enumerate() {
        let numbers: Vec<_> = (0..count)
            .zip(existing.iter().copied())
            .skip(place)
            .step_by(distinct.len())
            .collect();
        let (answer, result) = oneshot::channel();
        answers.push(result);
        let device = match kernel::clone_device(device.as_fd()) {
            Ok(device) => device,
            Err(errno) => {
                common.give_up(numbers.iter().map(|(queue, _)| *queue));
                // The receiver is in the list.
                let _ = answer.send(Err(errno));
                continue;
            }
        };
        let common = Arc::clone(&common);
        queues
            .push(context.run(move || uring::serve(common, place, device, numbers, inbox, answer)));
    }
    for answer in answers {
        // Without an answer, the context has gone, or there was no descriptor for it.
        registered = registered.and(answer.await.unwrap_or(Err(Errno::ENODEV)));
    }
    let classic = serve_classic(vec![device], contexts, session);
    let ended = Box::pin(async move {
        all_ended(queues).await;
        classic.await;
    });
    RingQueues {
        common,
        registered,
        ended,
    }
}

async fn all_ended<Q: Future<Output = Result<(), ContextGone>>>(queues: Vec<Q>) {
    for queue in queues {
        // A context that has ended has ended its queue before.
        let _ = queue.await;
    }
}
