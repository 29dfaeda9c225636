//! The io_uring engine: everything submitted since the last turn goes to the kernel, and the loop
//! sleeps, in one `io_uring_enter`.
//!
//! The ring belongs to one thread from its making to its end. Entries have 128 bytes, because
//! some commands need them. The slots of module `op` keep what the entries point to; a segment
//! array is needed until the entry is submitted only, since the kernel copies it then.
//!
//! One read of the mailbox's eventfd is always in flight; its completion is how other threads
//! wake the loop.

// UNSAFETY: submission queue entries carry pointers.
#![expect(
    unsafe_code,
    reason = "submission queue entries carry pointers to buffers"
)]

mod enter;

use std::cell::{Cell, RefCell};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use nix::errno::Errno;

use self::enter::Entrance;
use super::{Wait, blocking};
use crate::buffer::IoBuffer;
use crate::executor::Local;
use crate::op::{Action, Descriptor, Request, Resources, Slot, When};
use crate::remote;

/// Submission queue entries: 32 KiB of memory for each context.
const SUBMISSIONS: u32 = 256;
/// Completion queue entries; more completions are kept by the kernel until these are read.
const COMPLETIONS: u32 = 1024;
/// Marks completions that nobody waits for.
const UNATTENDED: u64 = 1 << 63;
/// Marks the wait that comes before the transfer in a slot. Only its failure has a completion, and
/// then the transfer has none: one of the two completes the slot.
const WAIT_OF: u64 = 1 << 62;
/// How many completions are looked at before they are acted on.
const HARVEST: usize = 64;

/// The read that other threads wake the loop by.
const WAKE: Action = Action::Receive(When::Unspecified);

type Rings = IoUring<squeue::Entry128, cqueue::Entry>;

pub(crate) struct Ring {
    ring: RefCell<Rings>,
    entrance: Entrance,
    /// The slot of the read of the eventfd.
    wake_slot: Cell<Option<u32>>,
    /// So many entries are submitted at once, without waiting for the end of the turn.
    batch: Cell<usize>,
}

impl Ring {
    /// Makes a ring for the calling thread.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or is too old for what is needed here.
    pub(crate) fn new(batch: u32) -> io::Result<Ring> {
        let ring = make()?;
        let features = ring.params();
        let complete = features.is_feature_ext_arg()
            && features.is_feature_nodrop()
            && features.is_feature_submit_stable()
            && features.is_feature_fast_poll();
        if !complete {
            return Err(Errno::ENOSYS.into());
        }
        let entrance = Entrance::new(ring.as_raw_fd());
        // Some sandboxes allow the set-up and refuse the rest.
        entrance.enter(0, Wait::No, false)?;
        Ok(Ring {
            entrance,
            ring: RefCell::new(ring),
            wake_slot: Cell::new(None),
            batch: Cell::new(batch_size(batch)),
        })
    }

    /// Submits as soon as `batch` operations are queued; 0 for when the queue is full.
    pub(crate) fn set_batch(&self, batch: u32) {
        self.batch.set(batch_size(batch));
    }

    /// Starts to listen for other threads.
    pub(crate) fn listen(&self, local: &Local) {
        let eventfd = remote::mailbox(local.id).eventfd().as_raw_fd();
        let request = Request {
            descriptor: Descriptor::Static(eventfd),
            action: WAKE,
            buffers: IoBuffer::zeroed(size_of::<u64>()).into(),
            batch: 0,
        };
        let slot = self.submit(local, request);
        // Nobody waits for it, and it completes for good when it is cancelled.
        local.slots.borrow_mut().orphan(slot);
        self.wake_slot.set(Some(slot));
    }

    /// Queues an operation.
    #[inline]
    pub(crate) fn submit(&self, local: &Local, request: Request) -> u32 {
        let action = request.action;
        let batch = match request.batch {
            0 => self.batch.get(),
            batch => self.batch.get().min(batch as usize),
        };
        let (index, entry) = {
            let mut slots = local.slots.borrow_mut();
            let (index, slot) = slots.insert(Resources::of(request));
            (index, entry(action, slot).user_data(index.into()))
        };
        match action {
            Action::Receive(When::Ready) | Action::Send(When::Ready) => {
                self.push_when_ready(local, index, action, entry);
            }
            _ => self.push(local, &[entry.into()], batch),
        }
        index
    }

    /// Queues a transfer behind a wait for its descriptor.
    fn push_when_ready(&self, local: &Local, slot: u32, action: Action, transfer: squeue::Entry) {
        let fd = match &local.slots.borrow_mut().at(slot).resources {
            Some(resources) => Fd(resources.descriptor.as_raw_fd()),
            None => unreachable!("the slot was just filled"),
        };
        let events = blocking::events(action).unwrap_or_default();
        let poll = opcode::PollAdd::new(fd, events)
            .build()
            .user_data(WAIT_OF | u64::from(slot))
            .flags(squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS);
        self.push(local, &[poll.into(), transfer.into()], self.batch.get());
    }

    /// Queues a prepared entry, whose memory the resources own.
    pub(crate) fn submit_entry(
        &self,
        local: &Local,
        resources: Resources,
        entry: squeue::Entry128,
    ) -> u32 {
        let (index, _) = local.slots.borrow_mut().insert(resources);
        self.push(local, &[entry.user_data(index.into())], self.batch.get());
        index
    }

    /// Queues entries that must be submitted together; submits when `batch` are queued.
    #[inline]
    fn push(&self, local: &Local, entries: &[squeue::Entry128], batch: usize) {
        loop {
            {
                let mut ring = self.ring.borrow_mut();
                let mut queue = ring.submission();
                // SAFETY: what the entry points to is owned by its slot until it completes, or
                // it points to nothing.
                if unsafe { queue.push_multiple(entries) }.is_ok() {
                    if queue.len() < batch {
                        return;
                    }
                    drop(queue);
                    drop(ring);
                    self.enter(Wait::No);
                    return;
                }
            }
            self.enter(Wait::No);
            // The kernel takes nothing more while completions overflow.
            self.reap(local);
        }
    }

    pub(crate) fn cancel(&self, local: &Local, slot: u32) {
        // Whichever of the two there is. A transfer behind a wait fails when the wait does.
        for data in [u64::from(slot), WAIT_OF | u64::from(slot)] {
            let entry = opcode::AsyncCancel::new(data).build().user_data(UNATTENDED);
            self.push(local, &[entry.into()], self.batch.get());
        }
    }

    pub(crate) fn turn(&self, local: &Local, wait: Wait) {
        let (nothing_done, nothing_queued, nothing_pending) = {
            let mut ring = self.ring.borrow_mut();
            let done = !ring.completion().is_empty();
            let queue = ring.submission();
            let pending = queue.taskrun() || queue.cq_overflow();
            (!done, queue.is_empty(), !pending)
        };
        let wait = if nothing_done { wait } else { Wait::No };
        if wait != Wait::No || !nothing_queued || !nothing_pending {
            self.enter(wait);
        }
        self.reap(local);
    }

    pub(crate) fn submit_now(&self) {
        self.enter(Wait::No);
    }

    pub(crate) fn has_events(&self) -> bool {
        let mut ring = self.ring.borrow_mut();
        if !ring.completion().is_empty() {
            return true;
        }
        let queue = ring.submission();
        // What is still queued was put off by the kernel, and is to be tried again.
        queue.taskrun() || queue.cq_overflow() || !queue.is_empty()
    }

    pub(crate) fn own_operations(&self) -> usize {
        usize::from(self.wake_slot.get().is_some())
    }

    pub(crate) fn shut_down(&self, local: &Local) {
        if let Some(slot) = self.wake_slot.take() {
            self.cancel(local, slot);
            while local.slots.borrow().in_flight() > 0 {
                self.turn(local, Wait::Forever);
            }
        }
    }

    fn enter(&self, wait: Wait) {
        let (queued, collect) = {
            let mut ring = self.ring.borrow_mut();
            let queue = ring.submission();
            (queue.len(), queue.taskrun() || queue.cq_overflow())
        };
        match self.entrance.enter(queued, wait, collect) {
            // The time is over; a signal came; the completions must be read first; the kernel is
            // short of memory for the moment. The loop comes back.
            Ok(()) | Err(Errno::ETIME | Errno::EINTR | Errno::EBUSY | Errno::EAGAIN) => {}
            Err(errno) => panic!("io_uring_enter failed: {errno}"),
        }
    }

    /// Completes what the kernel has completed.
    fn reap(&self, local: &Local) {
        loop {
            let mut space = [const { MaybeUninit::<cqueue::Entry>::uninit() }; HARVEST];
            let completions = self.ring.borrow_mut().completion().fill(&mut space);
            for completion in &*completions {
                let data = completion.user_data();
                if data == UNATTENDED {
                    continue;
                }
                let data = data & !WAIT_OF;
                #[expect(clippy::cast_possible_truncation, reason = "it is a slot index")]
                let slot = data as u32;
                if self.wake_slot.get() == Some(slot) {
                    self.listen_again(local, slot);
                } else {
                    local.complete(slot, completion.result());
                }
            }
            if completions.len() < HARVEST {
                return;
            }
        }
    }

    fn listen_again(&self, local: &Local, slot: u32) {
        let entry = {
            let mut slots = local.slots.borrow_mut();
            entry(WAKE, slots.at(slot)).user_data(slot.into())
        };
        self.push(local, &[entry.into()], self.batch.get());
    }
}

fn batch_size(batch: u32) -> usize {
    if batch == 0 {
        SUBMISSIONS as usize
    } else {
        batch as usize
    }
}

/// Makes a ring with the best flags that this kernel knows.
fn make() -> io::Result<Rings> {
    type Setup = fn(&mut io_uring::Builder<squeue::Entry128, cqueue::Entry>);
    let steps: [Setup; 4] = [
        |b| {
            b.setup_single_issuer()
                .setup_defer_taskrun()
                .setup_no_sqarray();
        },
        |b| {
            b.setup_single_issuer().setup_defer_taskrun();
        },
        |b| {
            b.setup_single_issuer().setup_coop_taskrun();
        },
        |b| {
            b.setup_coop_taskrun();
        },
    ];
    let mut refused = Errno::EINVAL.into();
    for step in steps {
        let mut builder = Rings::builder();
        builder
            .dontfork()
            .setup_clamp()
            .setup_cqsize(COMPLETIONS)
            .setup_submit_all()
            .setup_taskrun_flag();
        step(&mut builder);
        match builder.build(SUBMISSIONS) {
            Ok(ring) => return Ok(ring),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = error,
            Err(error) => return Err(error),
        }
    }
    Err(refused)
}

/// Writes the entry for an operation whose resources are in the slot.
#[inline]
fn entry(action: Action, slot: &mut Slot) -> squeue::Entry {
    let resources = slot.resources.as_ref().expect("put there with the slot");
    let fd = Fd(resources.descriptor.as_raw_fd());
    match action {
        Action::Read { offset } => read(slot, fd, offset, 0),
        Action::Write { offset, durable } => {
            write(slot, fd, offset, if durable { libc::RWF_DSYNC } else { 0 })
        }
        Action::Receive(when) => read(slot, fd, STREAM, nowait(when)),
        Action::Send(when) => write(slot, fd, STREAM, nowait(when)),
        Action::Fsync { data_only } => {
            let flags = if data_only {
                types::FsyncFlags::DATASYNC
            } else {
                types::FsyncFlags::empty()
            };
            opcode::Fsync::new(fd).flags(flags).build()
        }
        Action::Fallocate { mode, offset, len } => opcode::Fallocate::new(fd, len)
            .offset(offset)
            .mode(mode)
            .build(),
        Action::Poll { events } => opcode::PollAdd::new(fd, events).build(),
    }
}

/// The position of a descriptor that has none.
const STREAM: u64 = u64::MAX;

fn nowait(when: When) -> i32 {
    match when {
        When::Now => libc::RWF_NOWAIT,
        // Linked to a poll, or left to the kernel.
        When::Ready | When::Unspecified => 0,
    }
}

#[inline]
fn read(slot: &mut Slot, fd: Fd, offset: u64, flags: i32) -> squeue::Entry {
    match single(slot) {
        Some((ptr, len)) => opcode::Read::new(fd, ptr, len)
            .offset(offset)
            .rw_flags(flags)
            .build(),
        None => {
            let (list, count) = slot.describe();
            opcode::Readv::new(fd, list, count)
                .offset(offset)
                .rw_flags(flags)
                .build()
        }
    }
}

#[inline]
fn write(slot: &mut Slot, fd: Fd, offset: u64, flags: i32) -> squeue::Entry {
    match single(slot) {
        Some((ptr, len)) => opcode::Write::new(fd, ptr, len)
            .offset(offset)
            .rw_flags(flags)
            .build(),
        None => {
            let (list, count) = slot.describe();
            opcode::Writev::new(fd, list, count)
                .offset(offset)
                .rw_flags(flags)
                .build()
        }
    }
}

/// Address and length of the only buffer.
fn single(slot: &Slot) -> Option<(*mut u8, u32)> {
    match slot.resources.as_ref()?.buffers.buffers() {
        [buffer] => Some((buffer.as_ptr(), u32::try_from(buffer.len()).ok()?)),
        _ => None,
    }
}
