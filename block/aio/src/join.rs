//! Runs several futures of one task at the same time.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

/// Runs all futures together and gives their outputs in the same order. All are started before
/// any is waited for, so what they submit goes to the kernel at once.
pub async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut left = futures.len();
    let mut running: Vec<Pin<Box<F>>> = Vec::new();
    let mut outputs: Vec<Option<F::Output>> = Vec::new();
    for future in futures {
        running.push(Box::pin(future));
        outputs.push(None);
    }
    poll_fn(|cx| {
        for (future, output) in running.iter_mut().zip(&mut outputs) {
            if output.is_none()
                && let Poll::Ready(ready) = future.as_mut().poll(cx)
            {
                *output = Some(ready);
                left -= 1;
            }
        }
        if left == 0 {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    outputs
        .into_iter()
        .map(|output| output.expect("all outputs were counted in"))
        .collect()
}
