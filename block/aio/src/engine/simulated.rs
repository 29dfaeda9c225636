//! The engine of a simulation: an operation submitted is carried out, by a plain system call, when
//! the simulation's scheduler picks it.

use std::cell::RefCell;

use super::blocking;
use crate::executor::Local;
use crate::op::{Action, Request, Resources};

#[derive(Default)]
pub(crate) struct Simulated {
    /// Operations submitted and not carried out, in no particular order.
    pending: RefCell<Vec<(u32, Action)>>,
}

impl Simulated {
    pub(crate) fn submit(&self, local: &Local, request: Request) -> u32 {
        let action = request.action;
        let (slot, _) = local.slots.borrow_mut().insert(Resources::of(request));
        self.pending.borrow_mut().push((slot, action));
        slot
    }

    /// How many operations can be carried out now. A wait for a descriptor counts when the
    /// descriptor is ready.
    pub(crate) fn runnable(&self, local: &Local) -> usize {
        let mut pending = self.pending.borrow_mut();
        // Those that cannot go to the end.
        pending.sort_by_key(|&(slot, action)| !blocking::is_ready(local, slot, action));
        pending
            .iter()
            .take_while(|&&(slot, action)| blocking::is_ready(local, slot, action))
            .count()
    }

    /// Carries out one of the runnable operations.
    pub(crate) fn run(&self, local: &Local, index: usize) {
        let (slot, action) = self.pending.borrow_mut().swap_remove(index);
        let result = blocking::perform_in_slot(local, slot, action);
        local.complete(slot, result);
    }

    /// Forgets a wait for a descriptor.
    pub(crate) fn cancel(&self, local: &Local, slot: u32) {
        let found = self.pending.borrow().iter().position(|&(s, _)| s == slot);
        if let Some(index) = found {
            self.pending.borrow_mut().swap_remove(index);
            local.complete(slot, -(nix::errno::Errno::ECANCELED as i32));
        }
    }
}
