//! Operations carried out by system calls: on a blocking thread, or at once.

// UNSAFETY: hands the buffers' addresses to a blocking thread.
#![expect(
    unsafe_code,
    reason = "buffers are read and written by another thread's system call"
)]

use std::os::fd::{AsRawFd, RawFd};

use crate::executor::Local;
use crate::op::{Action, Request, Resources, When};
use crate::pool::{self, Job};
use crate::remote::{self, Message};
use crate::syscall::{self, Segments};
use crate::task::ExecutorId;

/// An operation on its way to a blocking thread.
struct Blocking {
    fd: RawFd,
    action: Action,
    segments: Segments,
    context: ExecutorId,
    slot: u32,
    result: i32,
}

// SAFETY: the segments point into buffers that the operation's slot owns until `Complete` has been
// received for it (see `op`), so they may be used from any thread until then.
unsafe impl Send for Blocking {}

impl Job for Blocking {
    fn run(&mut self) {
        // SAFETY: see the implementation of `Send`.
        self.result = unsafe { syscall::perform(self.fd, self.action, &self.segments) };
    }

    fn deliver(self: Box<Self>) {
        let message = Message::Complete {
            slot: self.slot,
            result: self.result,
        };
        // The context does not end before this operation, so it still receives.
        let sent = remote::send(self.context, message);
        debug_assert!(sent.is_ok(), "a context ended before its operations");
    }
}

/// Hands an operation to the pool of blocking threads.
pub(crate) fn submit_to_pool(local: &Local, request: Request) -> u32 {
    let fd = request.descriptor.as_raw_fd();
    let action = request.action;
    let segments = syscall::segments(&request.buffers);
    let slot = local.slots.borrow_mut().insert(Resources::of(request)).0;
    let job = Blocking {
        fd,
        action,
        segments,
        context: local.id,
        slot,
        result: 0,
    };
    pool::start(local.id, Box::new(job));
    slot
}

/// Carries an operation out before this returns.
pub(crate) fn submit_inline(local: &Local, request: Request) -> u32 {
    let fd = request.descriptor.as_raw_fd();
    let result = syscall::attempt(fd, request.action, &request.buffers);
    let slot = local.slots.borrow_mut().insert(Resources::of(request)).0;
    local.complete(slot, result);
    slot
}

/// Carries out the operation that a slot holds the buffers of, before this returns.
pub(crate) fn perform_in_slot(local: &Local, slot: u32, action: Action) -> i32 {
    let mut slots = local.slots.borrow_mut();
    match &slots.at(slot).resources {
        Some(resources) => {
            let fd = resources.descriptor.as_raw_fd();
            syscall::attempt(fd, action, &resources.buffers)
        }
        None => 0,
    }
}

/// The poll(2) events that an operation waits for before it does anything.
pub(crate) fn events(action: Action) -> Option<u32> {
    let events = match action {
        Action::Poll { events } => return Some(events),
        Action::Receive(When::Ready) => libc::POLLIN,
        Action::Send(When::Ready) => libc::POLLOUT,
        _ => return None,
    };
    Some(u32::from(events.cast_unsigned()))
}

/// Whether an operation would be carried out without waiting for another process.
pub(crate) fn is_ready(local: &Local, slot: u32, action: Action) -> bool {
    let Some(events) = events(action) else {
        return true;
    };
    match &local.slots.borrow_mut().at(slot).resources {
        Some(resources) => syscall::poll_now(resources.descriptor.as_raw_fd(), events) != 0,
        None => true,
    }
}
