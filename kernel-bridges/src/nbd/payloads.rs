//! Memory for payloads of one connection, used again and again, so that large requests do not take fresh pages each time.

use std::cell::RefCell;

use stord_aio::IoBuffer;

/// In front of each payload there is room for its header, so that both leave as one piece; a page, so that payloads are aligned.
pub(super) const FRONT: usize = 4096;
/// Buffers come in sizes of these payloads, in bytes; longer ones are not kept.
const CLASSES: [usize; 4] = [16 << 10, 64 << 10, 256 << 10, 1 << 20];
/// So many bytes of free buffers are kept.
const KEPT_BYTES: usize = 4 << 20;

/// Free buffers, by class.
#[derive(Default)]
pub(super) struct Payloads {
    free: RefCell<Free>,
}

#[derive(Default)]
struct Free {
    classes: [Vec<IoBuffer>; CLASSES.len()],
    bytes: usize,
}

fn class_of(length: usize) -> Option<usize> {
    CLASSES.iter().position(|class| length <= *class)
}

impl Payloads {
    /// Memory for a payload of `length` bytes, from [`FRONT`] on. Its content is whatever it was.
    pub(super) fn take(&self, length: usize) -> IoBuffer {
        let Some(class) = class_of(length) else {
            return IoBuffer::zeroed(FRONT + length);
        };
        let mut free = self.free.borrow_mut();
        match free.classes[class].pop() {
            Some(buffer) => {
                free.bytes -= buffer.len();
                buffer
            }
            None => IoBuffer::zeroed(FRONT + CLASSES[class]),
        }
    }

    /// Gives memory back that nobody uses any more.
    pub(super) fn put(&self, buffer: IoBuffer) {
        let payload = buffer.len().saturating_sub(FRONT);
        let Some(class) = class_of(payload).filter(|class| CLASSES[*class] == payload) else {
            return;
        };
        let mut free = self.free.borrow_mut();
        if free.bytes + buffer.len() <= KEPT_BYTES {
            free.bytes += buffer.len();
            free.classes[class].push(buffer);
        }
    }

    /// Gives all free memory back to the system.
    pub(super) fn trim(&self) {
        *self.free.borrow_mut() = Free::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_bounded() {
        let payloads = Payloads::default();
        let buffer = payloads.take(100_000);
        assert!(buffer.len() >= FRONT + 100_000);
        let address = buffer.addr();
        payloads.put(buffer);
        assert_eq!(payloads.take(200_000).addr(), address);
        let many: Vec<_> = (0..20).map(|_| payloads.take(1 << 20)).collect();
        for buffer in many {
            payloads.put(buffer);
        }
        assert!(payloads.free.borrow().bytes <= KEPT_BYTES);
        payloads.put(payloads.take(8 << 20));
        payloads.trim();
        assert_eq!(payloads.free.borrow().bytes, 0);
    }
}
