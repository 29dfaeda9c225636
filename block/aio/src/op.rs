//! Operations in flight, and why their memory is safe.
//!
//! The kernel, or a blocking thread, reads and writes an operation's memory at any moment between
//! its submission and its completion, whatever becomes of the future that waits for it. So the
//! future owns nothing of it:
//!
//! 1. An operation lives in a slot of its context. The slot owns the buffers, the array of
//!    segments that describes them to the kernel, and a reference to the descriptor.
//! 2. Only the completion gives them back. A slot is freed when its operation has completed *and*
//!    its future has taken the result or is gone. Dropping the future early turns the slot into an
//!    orphan, which the completion frees; leaking the future leaks the slot. Neither frees memory
//!    that may still be written to.
//! 3. Slots are boxed in blocks that never move, so a segment array keeps its address.
//! 4. Slots outlive operations: a context's thread ends only when no operation is in flight, and
//!    its ring is gone before its slots.
//! 5. A buffer handed out again after the completion may be shared with other users of the same
//!    memory; [`IoBuffer`](crate::IoBuffer) never makes references to its bytes, so that a
//!    transfer and a copy at the same time mix up bytes at worst.
//!
//! So safe code cannot free memory under an operation, and no safety rests on `Drop` being run.

use std::any::Any;
use std::future::Future;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crate::executor::{self, Local};
use crate::file::inline::OpenFile;
use crate::iovec::IoVec;

/// What an operation does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    /// Reads into the buffers from a position in bytes.
    Read { offset: u64 },
    /// Writes the buffers to a position in bytes.
    Write { offset: u64, durable: bool },
    /// Reads what comes next from a stream.
    Receive(When),
    /// Writes to a stream what it takes.
    Send(When),
    /// Makes written data, and unless `data_only` all metadata, durable.
    Fsync { data_only: bool },
    /// Allocates or frees space, with the mode bits of fallocate(2).
    Fallocate { mode: i32, offset: u64, len: u64 },
    /// Waits until one of these poll(2) events is there.
    Poll { events: u32 },
}

/// When a stream is read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// At once; EAGAIN when it is not ready, EOPNOTSUPP when the kernel cannot tell.
    Now,
    /// At once, or when it is ready, depending on the kind of descriptor.
    Unspecified,
    /// When it is ready.
    Ready,
}

impl Action {
    /// Whether this waits for somebody outside, perhaps forever, and can be cancelled.
    fn is_wait(self) -> bool {
        matches!(
            self,
            Action::Poll { .. } | Action::Receive(When::Ready) | Action::Send(When::Ready)
        )
    }
}

/// A descriptor, and who keeps it open.
#[derive(Clone, Debug)]
pub(crate) enum Descriptor {
    /// Shared between threads.
    Shared(Arc<OpenFile>),
    /// Belongs to this context.
    Local(Rc<OwnedFd>),
    /// A mailbox's eventfd, which is never closed.
    Static(RawFd),
}

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Descriptor::Shared(fd) => fd.as_raw_fd(),
            Descriptor::Local(fd) => fd.as_raw_fd(),
            Descriptor::Static(fd) => *fd,
        }
    }
}

/// An operation to be started.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) descriptor: Descriptor,
    pub(crate) action: Action,
    pub(crate) buffers: IoVec,
    /// Submit as soon as so many operations are queued; 0 leaves it to the engine.
    pub(crate) batch: u32,
}

/// One operation's place.
pub(crate) struct Slot {
    state: State,
    pub(crate) resources: Option<Resources>,
    /// Describes the buffers to the kernel when there are two; more are in `segments`.
    inline_segments: [libc::iovec; 2],
    segments: Vec<libc::iovec>,
}

/// What the kernel may touch while the operation is in flight.
pub(crate) struct Resources {
    pub(crate) descriptor: Descriptor,
    pub(crate) buffers: IoVec,
    pub(crate) is_wait: bool,
    /// Anything else that has to stay alive.
    #[expect(dead_code, reason = "it is kept, not used")]
    pub(crate) keep: Option<Rc<dyn Any>>,
}

impl Resources {
    /// The resources of an ordinary operation.
    pub(crate) fn of(request: Request) -> Resources {
        Resources {
            is_wait: request.action.is_wait(),
            descriptor: request.descriptor,
            buffers: request.buffers,
            keep: None,
        }
    }
}

impl Slot {
    /// Writes the segment array for the kernel and gives its address and length. It keeps its
    /// place and content until the operation has completed.
    pub(crate) fn describe(&mut self) -> (*const libc::iovec, u32) {
        let resources = self.resources.as_ref().expect("put there with the slot");
        let buffers = resources.buffers.buffers();
        let list = if buffers.len() <= self.inline_segments.len() {
            &mut self.inline_segments[..buffers.len()]
        } else {
            self.segments = vec![NO_SEGMENT; buffers.len()];
            &mut self.segments[..]
        };
        for (segment, buffer) in list.iter_mut().zip(buffers) {
            *segment = libc::iovec {
                iov_base: buffer.as_ptr().cast(),
                iov_len: buffer.len(),
            };
        }
        let count = u32::try_from(list.len()).expect("callers keep to IOV_MAX");
        (list.as_ptr(), count)
    }
}

const NO_SEGMENT: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

#[derive(Default)]
enum State {
    #[default]
    Free,
    /// In flight; the future, once polled, is woken through this.
    Flying(Option<Waker>),
    /// In flight, and nobody waits.
    Orphaned,
    /// Completed; the future has not looked yet.
    Done(i32),
}

const BLOCK: usize = 32;
const BLOCK_U32: u32 = 32;
const _: () = assert!(BLOCK == BLOCK_U32 as usize, "the same number twice");

/// All operation slots of one context.
#[derive(Default)]
pub(crate) struct Slots {
    blocks: Vec<Box<[Slot; BLOCK]>>,
    free: Vec<u32>,
    in_flight: usize,
}

impl Slots {
    /// Takes a slot for an operation that is about to be submitted.
    pub(crate) fn insert(&mut self, resources: Resources) -> (u32, &mut Slot) {
        if self.free.is_empty() {
            self.grow();
        }
        let index = self.free.pop().expect("just grown");
        self.in_flight += 1;
        let slot = self.at(index);
        slot.state = State::Flying(None);
        slot.resources = Some(resources);
        (index, slot)
    }

    fn grow(&mut self) {
        let first = u32::try_from(self.blocks.len() * BLOCK).expect("fewer than 2^32 operations");
        self.blocks.push(Box::new(
            [const {
                Slot {
                    state: State::Free,
                    resources: None,
                    inline_segments: [NO_SEGMENT; 2],
                    segments: Vec::new(),
                }
            }; BLOCK],
        ));
        self.free.extend((first..first + BLOCK_U32).rev());
    }

    pub(crate) fn at(&mut self, index: u32) -> &mut Slot {
        let index = index as usize;
        &mut self.blocks[index / BLOCK][index % BLOCK]
    }

    /// Gives up the result of an operation in flight.
    pub(crate) fn orphan(&mut self, index: u32) {
        self.at(index).state = State::Orphaned;
    }

    fn release(&mut self, index: u32) -> Option<Resources> {
        let slot = self.at(index);
        slot.state = State::Free;
        if slot.segments.capacity() > 0 {
            slot.segments = Vec::new();
        }
        let resources = slot.resources.take();
        self.free.push(index);
        resources
    }

    /// The number of operations that have not completed.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The operations in flight that wait for descriptors.
    pub(crate) fn waits(&mut self) -> Vec<u32> {
        (0..)
            .zip(self.blocks.iter().flat_map(|block| block.iter()))
            .filter(|(_, slot)| {
                matches!(slot.state, State::Flying(_) | State::Orphaned)
                    && slot.resources.as_ref().is_some_and(|r| r.is_wait)
            })
            .map(|(index, _)| index)
            .collect()
    }
}

/// What became of an operation.
#[derive(Debug)]
pub(crate) struct Completion {
    /// As from the system call: not negative, or a negated errno.
    pub(crate) result: i32,
    /// The operation's buffers.
    pub(crate) buffers: IoVec,
}

impl Local {
    /// Notes that an operation has completed, with the result of the system call or a negated
    /// errno.
    pub(crate) fn complete(&self, index: u32, result: i32) {
        let mut slots = self.slots.borrow_mut();
        slots.in_flight -= 1;
        let slot = slots.at(index);
        match std::mem::take(&mut slot.state) {
            State::Flying(waker) => {
                slot.state = State::Done(result);
                drop(slots);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            State::Orphaned => {
                let resources = slots.release(index);
                drop(slots);
                drop(resources);
            }
            State::Free | State::Done(_) => unreachable!("an operation completes once"),
        }
    }
}

/// Waits for an operation.
#[must_use = "an operation that nobody waits for is lost"]
#[derive(Debug)]
pub(crate) struct Op {
    slot: Option<u32>,
    /// Slots belong to the thread.
    not_send: PhantomData<*mut ()>,
}

impl Op {
    pub(crate) fn new(slot: u32) -> Op {
        Op {
            slot: Some(slot),
            not_send: PhantomData,
        }
    }
}

impl Future for Op {
    type Output = Completion;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completion> {
        let index = self.slot.expect("polled after it was done");
        executor::with(|local| {
            let mut slots = local.slots.borrow_mut();
            let slot = slots.at(index);
            match &mut slot.state {
                State::Done(result) => {
                    let result = *result;
                    let resources = slots.release(index);
                    drop(slots);
                    self.slot = None;
                    let buffers = resources.map(|r| r.buffers).unwrap_or_default();
                    Poll::Ready(Completion { result, buffers })
                }
                State::Flying(waker) => {
                    match waker {
                        Some(waker) => waker.clone_from(cx.waker()),
                        None => *waker = Some(cx.waker().clone()),
                    }
                    Poll::Pending
                }
                State::Free | State::Orphaned => unreachable!("the future owns the result"),
            }
        })
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        let Some(index) = self.slot else { return };
        executor::try_with(|local| {
            let mut slots = local.slots.borrow_mut();
            let slot = slots.at(index);
            if let State::Done(_) = slot.state {
                let resources = slots.release(index);
                drop(slots);
                drop(resources);
                return;
            }
            slot.state = State::Orphaned;
            let is_wait = slot.resources.as_ref().is_some_and(|r| r.is_wait);
            drop(slots);
            if is_wait {
                // It might never complete by itself.
                local.engine.cancel(local, index);
            }
        });
    }
}

#[cfg(test)]
mod tests;
