//! An event as it goes to every monitor: a name and data that belong together by type.

use serde_json::Value;

use crate::visitor::{EventData, Qapi};

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// The event's name.
    pub name: &'static str,
    /// Its data, an object.
    pub data: Value,
}

impl Event {
    /// The event that `data` is the data of.
    pub fn new<E: EventData>(data: &E) -> Self {
        Self {
            name: E::NAME,
            data: Qapi::encode(data),
        }
    }
}
