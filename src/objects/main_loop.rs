//! `main-loop`: the thread that serves everything that is not I/O. There is at most one such object,
//! and it stays.

use serde_json::Value;
use stord_qmp::Error;
use stord_qmp::schema::object::EventLoopBaseProperties;

use super::class::{Class, Form};
use super::event_loop::EventLoop;
use super::{Object, unknown};

/// The type.
pub const CLASS: Class = Class {
    name: "main-loop",
    parent: Some("event-loop-base"),
    form: Form::Creatable,
    properties: &[],
};

/// The main loop.
pub struct MainLoop {
    id: String,
    event_loop: EventLoop,
}

impl MainLoop {
    /// Takes the properties of the loop that runs already.
    ///
    /// # Errors
    /// One is out of range, or not what the loop can do.
    pub fn new(id: &str, properties: &EventLoopBaseProperties) -> Result<Self, Error> {
        let event_loop = EventLoop::new(properties)?;
        if event_loop.batch() != 0 {
            return Err(Error::generic(
                "Parameter 'aio-max-batch' of the main loop is not supported by stord yet",
            ));
        }
        Ok(Self {
            id: id.to_owned(),
            event_loop,
        })
    }
}

impl Object for MainLoop {
    fn class(&self) -> &'static Class {
        &CLASS
    }

    fn get(&self, property: &str) -> Result<Value, Error> {
        (self.event_loop.get(property)).ok_or_else(|| unknown(&CLASS, property))
    }

    fn set(&self, property: &str, value: Value) -> Result<(), Error> {
        let result = self.event_loop.set(property, value);
        result.unwrap_or_else(|| Err(unknown(&CLASS, property)))
    }

    fn close(&self) -> Result<(), Error> {
        let id = &self.id;
        Err(Error::generic(format!(
            "object '{id}' is in use, can not be deleted"
        )))
    }
}
