//! Commands of drivers that speak io_uring, such as FUSE and ublk.

// UNSAFETY: a command may make the driver use memory that only the caller knows of.
#![expect(
    unsafe_code,
    reason = "what a command points to is known to its caller only"
)]

use std::any::Any;
use std::future::Future;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use io_uring::opcode::UringCmd80;
use io_uring::types::Fd;

use crate::engine::Engine;
use crate::executor;
use crate::iovec::IoVec;
use crate::op::{Descriptor, Op, Resources};

/// Where the kernel's `struct io_uring_sqe` has its length field, which the binding leaves zero.
const LEN_AT: usize = 24;

/// Queues an `IORING_OP_URING_CMD` with 80 bytes of command on the ring of this context; `addr` and
/// `len` are the entry's fields of these names. `None` when the context has no ring.
///
/// # Safety
///
/// The memory that the command refers to must stay valid until `keep` is dropped, and nobody may
/// hold a Rust reference to what the driver writes. `keep` lives until the command has completed.
///
/// # Panics
///
/// Outside a context or simulation.
pub unsafe fn uring_cmd(
    fd: &Rc<OwnedFd>,
    operation: u32,
    command: [u8; 80],
    addr: u64,
    len: u32,
    keep: Rc<dyn Any>,
) -> Option<UringCmd> {
    executor::with(|local| {
        let Engine::Ring(ring) = &local.engine else {
            return None;
        };
        let mut entry = UringCmd80::new(Fd(fd.as_raw_fd()), operation)
            .cmd(command)
            .addr(Some(addr))
            .build();
        // SAFETY: the entry is a `struct io_uring_sqe` and 64 bytes more, and any value of its
        // length field is a valid one.
        unsafe {
            (&raw mut entry)
                .cast::<u8>()
                .add(LEN_AT)
                .cast::<u32>()
                .write(len);
        }
        let resources = Resources {
            descriptor: Descriptor::Local(Rc::clone(fd)),
            buffers: IoVec::new(),
            is_wait: false,
            keep: Some(keep),
        };
        Some(UringCmd(Op::new(
            ring.submit_entry(local, resources, entry),
        )))
    })
}

/// Waits for a command's completion and gives its result: not negative, or a negated errno.
/// Dropping it does not cancel the command.
#[derive(Debug)]
#[must_use = "the result tells whether the command failed"]
pub struct UringCmd(Op);

impl Future for UringCmd {
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        Pin::new(&mut self.0).poll(cx).map(|done| done.result)
    }
}
