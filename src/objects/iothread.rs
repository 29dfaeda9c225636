//! `iothread`: a thread that serves I/O. How it does that can be changed while it works.

use std::rc::Rc;

use serde_json::Value;
use stord_aio::{Context, PollParams};
use stord_block::Contexts;
use stord_qmp::schema::object::IothreadProperties;
use stord_qmp::{Error, from_json_member};

use super::class::{Class, Form, Property};
use super::event_loop::{EventLoop, non_negative};
use super::{Object, unknown};

/// The polling time of an iothread that does not say, in ns.
const DEFAULT_POLL_MAX_NS: i64 = 32_768;

/// The type.
pub const CLASS: Class = Class {
    name: "iothread",
    parent: Some("event-loop-base"),
    form: Form::Creatable,
    properties: &[
        Property::new("poll-max-ns", "int"),
        Property::new("poll-grow", "int"),
        Property::new("poll-shrink", "int"),
    ],
};

/// An iothread.
pub struct Iothread {
    id: String,
    contexts: Rc<Contexts>,
    context: Context,
    event_loop: EventLoop,
}

impl Iothread {
    /// Starts the thread.
    ///
    /// # Errors
    /// A property is out of range, or the thread cannot be started.
    pub fn start(
        id: &str,
        properties: &IothreadProperties,
        contexts: &Rc<Contexts>,
    ) -> Result<Self, Error> {
        let parameter = |name, value: Option<i64>, default| {
            non_negative(name, value.unwrap_or(default)).map(i64::cast_unsigned)
        };
        let poll = PollParams {
            max_ns: parameter("poll-max-ns", properties.poll_max_ns, DEFAULT_POLL_MAX_NS)?,
            grow: parameter("poll-grow", properties.poll_grow, 0)?,
            shrink: parameter("poll-shrink", properties.poll_shrink, 0)?,
        };
        let event_loop = EventLoop::new(&properties.event_loop)?;
        contexts.add_iothread(id, poll, event_loop.batch(), event_loop.pool())?;
        let context = contexts.acquire(id)?;
        // Only the work that it is given keeps it from being removed.
        contexts.release(id);
        Ok(Self {
            id: id.to_owned(),
            contexts: Rc::clone(contexts),
            context,
            event_loop,
        })
    }
}

impl Object for Iothread {
    fn class(&self) -> &'static Class {
        &CLASS
    }

    fn get(&self, property: &str) -> Result<Value, Error> {
        let poll = self.context.polling();
        match property {
            "poll-max-ns" => Ok(poll.max_ns.into()),
            "poll-grow" => Ok(poll.grow.into()),
            "poll-shrink" => Ok(poll.shrink.into()),
            _ => (self.event_loop.get(property)).ok_or_else(|| unknown(&CLASS, property)),
        }
    }

    fn set(&self, property: &str, value: Value) -> Result<(), Error> {
        if let Some(result) = self.event_loop.set(property, value.clone()) {
            result?;
            self.context.set_batch(self.event_loop.batch());
            self.context.set_pool_limits(self.event_loop.pool());
            return Ok(());
        }
        let value = non_negative(property, from_json_member(property, value)?)?.cast_unsigned();
        let mut poll = self.context.polling();
        match property {
            "poll-max-ns" => poll.max_ns = value,
            "poll-grow" => poll.grow = value,
            "poll-shrink" => poll.shrink = value,
            _ => return Err(unknown(&CLASS, property)),
        }
        self.context.set_polling(poll);
        Ok(())
    }

    fn close(&self) -> Result<(), Error> {
        self.contexts.remove_iothread(&self.id)
    }
}
