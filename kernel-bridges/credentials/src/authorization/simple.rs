//! The rule that lets one name in.

use std::sync::{PoisonError, RwLock};

use super::Authorization;

/// One name.
pub struct Simple(RwLock<String>);

impl Simple {
    /// Lets that name in.
    pub fn new(identity: String) -> Self {
        Self(RwLock::new(identity))
    }

    /// The name.
    pub fn identity(&self) -> String {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Lets another name in instead.
    pub fn set_identity(&self, identity: String) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = identity;
    }
}

impl Authorization for Simple {
    fn is_allowed(&self, identity: &str) -> bool {
        *self.0.read().unwrap_or_else(PoisonError::into_inner) == identity
    }
}
