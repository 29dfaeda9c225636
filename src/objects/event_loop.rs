//! What every event loop has: the size of a batch of requests, and its pool of blocking threads.
//!
//! The pool of blocking threads is one for the whole process, so its limits can only be what they
//! are. A batch has its size from the start.

use std::cell::Cell;

use serde_json::Value;
use stord_qmp::schema::object::EventLoopBaseProperties;
use stord_qmp::{Error, from_json_member};

use super::class::{Class, Form, Property};

/// The type.
pub const CLASS: Class = Class {
    name: "event-loop-base",
    parent: Some("object"),
    form: Form::AbstractCreatable,
    properties: &[
        Property::new("thread-pool-min", "int"),
        Property::new("aio-max-batch", "int"),
        Property::new("thread-pool-max", "int"),
    ],
};

const POOL_MIN: i64 = 0;
const POOL_MAX: i64 = 64;

/// The properties of an event loop, each in its range.
pub struct EventLoop {
    batch: i64,
    pool: Cell<(i64, i64)>,
}

impl EventLoop {
    /// Takes what was asked for.
    ///
    /// # Errors
    /// A property is out of range, or not what the process's pool is.
    pub fn new(properties: &EventLoopBaseProperties) -> Result<Self, Error> {
        let EventLoopBaseProperties {
            aio_max_batch,
            thread_pool_min,
            thread_pool_max,
        } = *properties;
        let event_loop = Self {
            batch: non_negative("aio-max-batch", aio_max_batch.unwrap_or(0))?,
            pool: Cell::new((POOL_MIN, POOL_MAX)),
        };
        let min = non_negative("thread-pool-min", thread_pool_min.unwrap_or(POOL_MIN))?;
        let max = non_negative("thread-pool-max", thread_pool_max.unwrap_or(POOL_MAX))?;
        event_loop.set_pool(min, max)?;
        Ok(event_loop)
    }

    /// The most requests submitted in one batch; 0 leaves it to the I/O engine.
    pub fn batch(&self) -> u32 {
        u32::try_from(self.batch).unwrap_or(u32::MAX)
    }

    /// The value of a property of [`CLASS`].
    pub fn get(&self, property: &str) -> Option<Value> {
        let (min, max) = self.pool.get();
        match property {
            "aio-max-batch" => Some(self.batch.into()),
            "thread-pool-min" => Some(min.into()),
            "thread-pool-max" => Some(max.into()),
            _ => None,
        }
    }

    /// Changes a property of [`CLASS`].
    ///
    /// # Errors
    /// It is out of range, or cannot be changed to that.
    pub fn set(&self, property: &str, value: Value) -> Option<Result<(), Error>> {
        let known = CLASS.properties.iter().any(|known| known.name == property);
        known.then(|| self.change(property, value))
    }

    fn change(&self, property: &str, value: Value) -> Result<(), Error> {
        let value = non_negative(property, from_json_member(property, value)?)?;
        let (min, max) = self.pool.get();
        match property {
            "thread-pool-min" => self.set_pool(value, max),
            "thread-pool-max" => self.set_pool(min, value),
            _ if value == self.batch => Ok(()),
            _ => Err(Error::generic(format!(
                "Parameter '{property}' cannot be changed by stord yet"
            ))),
        }
    }

    fn set_pool(&self, min: i64, max: i64) -> Result<(), Error> {
        if min > max || max == 0 {
            return Err(Error::generic("bad thread-pool-min/thread-pool-max values"));
        }
        if (min, max) != (POOL_MIN, POOL_MAX) {
            return Err(Error::generic(
                "Parameters 'thread-pool-min' and 'thread-pool-max' are not supported by stord yet",
            ));
        }
        self.pool.set((min, max));
        Ok(())
    }
}

/// Refuses a negative value of a property.
///
/// # Errors
/// It is negative.
pub fn non_negative(property: &str, value: i64) -> Result<i64, Error> {
    if value < 0 {
        let range = format!("[0, {}]", i64::MAX);
        let message = format!("{property} value must be in range {range}");
        return Err(Error::generic(message));
    }
    Ok(value)
}
