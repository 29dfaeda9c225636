//! Failed requests as events: of a user's failures, at most one waits to be told, the last one, so that a flood of them costs no
//! memory.

use std::sync::{Arc, Mutex, PoisonError};

use stord_aio::Errno;

use super::statistics::Kind;
use crate::graph::{BlockEvent, Events};

/// A request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The request would have changed something.
    pub is_write: bool,
    /// Why it failed.
    pub errno: Errno,
}

/// The failures of one user of a node. Clones share them.
#[derive(Clone)]
pub struct Failures(Arc<Shared>);

struct Shared {
    id: String,
    node_name: String,
    last: Mutex<Option<Failure>>,
    events: Events,
}

impl Failures {
    /// Reports to `events` as `id` what fails at the node.
    pub(crate) fn new(id: String, node_name: String, events: Events) -> Self {
        Self(Arc::new(Shared {
            id,
            node_name,
            last: Mutex::new(None),
            events,
        }))
    }

    /// The name of the user.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// The node whose user it is.
    pub fn node_name(&self) -> &str {
        &self.0.node_name
    }

    /// The last failure, if it has not been taken yet.
    pub fn take(&self) -> Option<Failure> {
        self.lock().take()
    }

    /// Notes a failure. What the storage cannot do, and says so, is none.
    pub(super) fn report(&self, kind: Kind, errno: Errno) {
        if errno == Errno::ENOTSUP {
            return;
        }
        let failure = Failure {
            is_write: !matches!(kind, Kind::Read),
            errno,
        };
        if self.lock().replace(failure).is_none() {
            self.0.events.send(BlockEvent::Failed(self.clone()));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Failure>> {
        self.0.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PartialEq for Failures {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Failures {}

impl std::fmt::Debug for Failures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Failures").field(&self.0.id).finish()
    }
}
