//! The engine for kernels and sandboxes without io_uring: the loop sleeps in epoll, and what may
//! block runs on the pool of blocking threads.
//!
//! Transfers of streams are done at once. A descriptor is registered with epoll while somebody waits for it, for the
//! events of all who wait, one shot at a time; whoever is left over is registered again.

// UNSAFETY: borrows descriptors by number.
#![expect(unsafe_code, reason = "epoll knows descriptors by number only")]

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::{Wait, blocking};
use crate::executor::Local;
use crate::op::{Action, Request, Resources};
use crate::remote;
use crate::task::ExecutorId;

/// Marks the mailbox's eventfd among the events; no descriptor has this number.
const MAILBOX: u64 = u64::MAX;
const EVENTS: usize = 64;

pub(crate) struct Fallback {
    epoll: Epoll,
    waiting: RefCell<BTreeMap<RawFd, Vec<Waiter>>>,
    /// Waits that have ended, to be completed in the next turn.
    done: RefCell<VecDeque<(u32, Outcome)>>,
    context: ExecutorId,
}

struct Waiter {
    slot: u32,
    events: u32,
    action: Action,
}

/// How a wait ended.
enum Outcome {
    /// These events are there, and this was to be done when they are.
    Ready(u32, Action),
    Failed(Errno),
}

impl Fallback {
    /// # Errors
    ///
    /// When epoll is refused.
    pub(crate) fn new(context: ExecutorId) -> io::Result<Fallback> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, MAILBOX);
        epoll.add(remote::mailbox(context).eventfd(), event)?;
        Ok(Fallback {
            epoll,
            waiting: RefCell::default(),
            done: RefCell::default(),
            context,
        })
    }

    pub(crate) fn submit(&self, local: &Local, request: Request) -> u32 {
        if let Some(events) = blocking::events(request.action) {
            return self.wait_for(local, request, events);
        }
        match request.action {
            Action::Receive(_) | Action::Send(_) => blocking::submit_inline(local, request),
            _ => blocking::submit_to_pool(local, request),
        }
    }

    fn wait_for(&self, local: &Local, request: Request, events: u32) -> u32 {
        let fd = request.descriptor.as_raw_fd();
        let action = request.action;
        let (slot, _) = local.slots.borrow_mut().insert(Resources::of(request));
        let mut waiting = self.waiting.borrow_mut();
        let waiters = waiting.entry(fd).or_default();
        let is_new = waiters.is_empty();
        waiters.push(Waiter {
            slot,
            events,
            action,
        });
        if let Err(errno) = self.register(fd, waiters, is_new) {
            waiters.pop();
            if waiters.is_empty() {
                waiting.remove(&fd);
            }
            let outcome = match errno {
                // A regular file, which is always ready.
                Errno::EPERM => Outcome::Ready(events, action),
                errno => Outcome::Failed(errno),
            };
            self.done.borrow_mut().push_back((slot, outcome));
        }
        slot
    }

    /// Registers a descriptor for the events of all who wait for it.
    fn register(&self, fd: RawFd, waiters: &[Waiter], is_new: bool) -> Result<(), Errno> {
        let events = waiters.iter().fold(0, |all, waiter| all | waiter.events);
        let flags = EpollFlags::from_bits_truncate(events.cast_signed()) | EpollFlags::EPOLLONESHOT;
        let data = u64::from(fd.cast_unsigned());
        let mut event = EpollEvent::new(flags, data);
        let fd = borrow(fd);
        if !is_new {
            return self.epoll.modify(fd, &mut event);
        }
        match self.epoll.add(fd, event) {
            // It is still registered from an earlier wait.
            Err(Errno::EEXIST) => self.epoll.modify(fd, &mut event),
            result => result,
        }
    }

    pub(crate) fn cancel(&self, _local: &Local, slot: u32) {
        let mut waiting = self.waiting.borrow_mut();
        let found = waiting
            .iter()
            .find(|(_, waiters)| waiters.iter().any(|waiter| waiter.slot == slot))
            .map(|(fd, _)| *fd);
        let Some(fd) = found else { return };
        if let Some(waiters) = waiting.get_mut(&fd) {
            waiters.retain(|waiter| waiter.slot != slot);
            if waiters.is_empty() {
                waiting.remove(&fd);
                // Fails only when it is not registered any more.
                let _ = self.epoll.delete(borrow(fd));
            }
        }
        self.done
            .borrow_mut()
            .push_back((slot, Outcome::Failed(Errno::ECANCELED)));
    }

    pub(crate) fn turn(&self, local: &Local, wait: Wait) {
        let wait = if self.done.borrow().is_empty() {
            wait
        } else {
            Wait::No
        };
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = match self.epoll.wait(&mut events, timeout(wait)) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => panic!("epoll_wait failed: {errno}"),
        };
        for event in &events[..count] {
            if event.data() == MAILBOX {
                remote::mailbox(self.context).silence();
            } else if let Ok(fd) = RawFd::try_from(event.data()) {
                self.ready(fd, event.events().bits().cast_unsigned());
            }
        }
        loop {
            let done = self.done.borrow_mut().pop_front();
            let Some((slot, outcome)) = done else { return };
            let result = match outcome {
                Outcome::Ready(events, Action::Poll { .. }) => {
                    i32::try_from(events).unwrap_or(i32::MAX)
                }
                Outcome::Ready(_, action) => blocking::perform_in_slot(local, slot, action),
                Outcome::Failed(errno) => -(errno as i32),
            };
            local.complete(slot, result);
        }
    }

    /// Completes the waits that these events end.
    fn ready(&self, fd: RawFd, events: u32) {
        let always = (EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP)
            .bits()
            .cast_unsigned();
        let mut waiting = self.waiting.borrow_mut();
        let Some(waiters) = waiting.get_mut(&fd) else {
            return;
        };
        let mut done = self.done.borrow_mut();
        waiters.retain(|waiter| {
            let seen = events & (waiter.events | always);
            if seen != 0 {
                done.push_back((waiter.slot, Outcome::Ready(seen, waiter.action)));
            }
            seen == 0
        });
        if waiters.is_empty() {
            waiting.remove(&fd);
        } else if let Err(errno) = self.register(fd, waiters, false) {
            for waiter in waiting.remove(&fd).unwrap_or_default() {
                done.push_back((waiter.slot, Outcome::Failed(errno)));
            }
        }
    }

    pub(crate) fn has_events(&self) -> bool {
        // Only epoll knows whether what is waited for has come.
        !self.done.borrow().is_empty() || !self.waiting.borrow().is_empty()
    }
}

/// A descriptor that a waiter's slot keeps open.
fn borrow<'a>(fd: RawFd) -> BorrowedFd<'a> {
    // SAFETY: a slot owns the descriptor as long as somebody waits for it, and the result is used
    // for one call only.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

fn timeout(wait: Wait) -> EpollTimeout {
    match wait {
        Wait::No => EpollTimeout::ZERO,
        Wait::Forever => EpollTimeout::NONE,
        // Rounded up, so that a timer has expired when the loop looks.
        Wait::AtMost(time) => (time + Duration::from_micros(999))
            .try_into()
            .unwrap_or(EpollTimeout::MAX),
    }
}
