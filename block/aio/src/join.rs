//! Runs several futures of one task at the same time.

// UNSAFETY: pins the elements of a pinned slice.
#![expect(unsafe_code, reason = "a slice has no safe pin projection")]

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

/// Runs all futures together and gives their outputs in the same order. All are started before
/// any is waited for, so what they submit goes to the kernel at once. Meant for the pieces of a
/// request: each wake-up polls all that are left.
pub async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let pieces: Box<[Piece<F>]> = futures.into_iter().map(Piece::Running).collect();
    let mut pieces = Box::into_pin(pieces);
    poll_fn(|cx| {
        let mut is_done = true;
        for mut piece in each(pieces.as_mut()) {
            let Some(future) = piece.as_mut().running() else {
                continue;
            };
            match future.poll(cx) {
                Poll::Ready(output) => piece.set(Piece::Done(output)),
                Poll::Pending => is_done = false,
            }
        }
        if is_done {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    each(pieces.as_mut())
        .map(|piece| piece.take().expect("all are done"))
        .collect()
}

enum Piece<F: Future> {
    Running(F),
    Done(F::Output),
    Taken,
}

impl<F: Future> Piece<F> {
    fn running(self: Pin<&mut Self>) -> Option<Pin<&mut F>> {
        // SAFETY: the future is pinned with the piece: it is never moved out of it, and `Piece` has
        // no `Drop` and is not `Unpin` unless the future is.
        unsafe {
            match self.get_unchecked_mut() {
                Piece::Running(future) => Some(Pin::new_unchecked(future)),
                Piece::Done(_) | Piece::Taken => None,
            }
        }
    }

    fn take(mut self: Pin<&mut Self>) -> Option<F::Output> {
        if self.as_mut().running().is_some() {
            return None;
        }
        // SAFETY: there is no future in it, and an output is not pinned.
        match std::mem::replace(unsafe { self.get_unchecked_mut() }, Piece::Taken) {
            Piece::Done(output) => Some(output),
            Piece::Running(_) | Piece::Taken => None,
        }
    }
}

fn each<T>(slice: Pin<&mut [T]>) -> impl Iterator<Item = Pin<&mut T>> {
    // SAFETY: the elements of a pinned slice are pinned: they do not move unless the slice does,
    // and nothing is moved out of it here.
    unsafe {
        slice
            .get_unchecked_mut()
            .iter_mut()
            .map(|element| Pin::new_unchecked(element))
    }
}
