//! Hands every event to every monitor, without ever waiting for one: a monitor whose client has
//! left [`BACKLOG`] events unread gets no more, and is disconnected when its client has read those.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::SystemTime;

use stord_qmp::event::Event;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::rate::Limit;

/// The most events that wait for one client.
pub(super) const BACKLOG: usize = 4096;

/// An event and when it happened.
pub type Dated = Rc<(Event, SystemTime)>;

/// Where events are reported to.
#[derive(Clone, Default)]
pub struct Broadcast {
    monitors: Rc<RefCell<Vec<Sender<Dated>>>>,
    limit: Limit,
}

impl Broadcast {
    /// Reports an event.
    pub fn send(&self, event: Event) {
        tracing::debug!(name = event.name, data = %event.data, "event");
        let monitors = Rc::clone(&self.monitors);
        self.limit.pass(event, move |dated| {
            monitors
                .borrow_mut()
                .retain(|monitor| monitor.try_send(Rc::clone(&dated)).is_ok());
        });
    }

    /// Every event from now on; ends when the receiver has fallen too far behind, or when
    /// [`Broadcast::close`] is called.
    pub fn subscribe(&self) -> Receiver<Dated> {
        let (sender, receiver) = channel(BACKLOG);
        let mut monitors = self.monitors.borrow_mut();
        monitors.retain(|monitor| !monitor.is_closed());
        monitors.push(sender);
        receiver
    }

    /// Ends every subscription, after the events already reported.
    pub fn close(&self) {
        self.monitors.borrow_mut().clear();
    }
}
