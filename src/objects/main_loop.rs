//! `main-loop`: the threads that serve what no iothread serves. There is at most one such object, and
//! it stays.

use std::rc::Rc;

use serde_json::Value;
use stord_block::Contexts;
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
    contexts: Rc<Contexts>,
    event_loop: EventLoop,
}

impl MainLoop {
    /// Gives the loop that runs already these properties.
    ///
    /// # Errors
    /// One is out of range.
    pub fn new(
        id: &str,
        properties: &EventLoopBaseProperties,
        contexts: &Rc<Contexts>,
    ) -> Result<Self, Error> {
        let event_loop = EventLoop::new(properties)?;
        contexts.set_main_loop(event_loop.batch(), event_loop.pool());
        Ok(Self {
            id: id.to_owned(),
            contexts: Rc::clone(contexts),
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
        result.unwrap_or_else(|| Err(unknown(&CLASS, property)))?;
        let (batch, pool) = (self.event_loop.batch(), self.event_loop.pool());
        self.contexts.set_main_loop(batch, pool);
        Ok(())
    }

    fn close(&self) -> Result<(), Error> {
        let id = &self.id;
        Err(Error::generic(format!(
            "object '{id}' is in use, can not be deleted"
        )))
    }
}
