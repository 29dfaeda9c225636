//! What every event loop has: the size of a batch of requests, and the limits of its pool of blocking
//! threads. A change is in force at once; one that is refused changes nothing.

use std::cell::Cell;

use serde_json::Value;
use stord_aio::PoolLimits;
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

/// The properties of an event loop, each in its range.
pub struct EventLoop(Cell<Values>);

#[derive(Clone, Copy)]
struct Values {
    batch: i64,
    pool_min: i64,
    pool_max: i64,
}

impl Values {
    fn check(&self) -> Result<(), Error> {
        let limit = i64::from(i32::MAX);
        let is_good = self.pool_min <= self.pool_max && (1..=limit).contains(&self.pool_max);
        match is_good {
            true => Ok(()),
            false => Err(Error::generic("bad thread-pool-min/thread-pool-max values")),
        }
    }
}

impl EventLoop {
    /// Takes what was asked for.
    ///
    /// # Errors
    /// A property is out of range.
    pub fn new(properties: &EventLoopBaseProperties) -> Result<Self, Error> {
        let EventLoopBaseProperties {
            aio_max_batch,
            thread_pool_min,
            thread_pool_max,
        } = *properties;
        let PoolLimits { min, max } = PoolLimits::DEFAULT;
        let or_default = |value: Option<i64>, default: usize| {
            value.unwrap_or(i64::try_from(default).unwrap_or(i64::MAX))
        };
        let values = Values {
            batch: non_negative("aio-max-batch", aio_max_batch.unwrap_or(0))?,
            pool_min: non_negative("thread-pool-min", or_default(thread_pool_min, min))?,
            pool_max: non_negative("thread-pool-max", or_default(thread_pool_max, max))?,
        };
        values.check()?;
        Ok(Self(Cell::new(values)))
    }

    /// The most requests submitted in one batch; 0 leaves it to the I/O engine.
    pub fn batch(&self) -> u32 {
        u32::try_from(self.0.get().batch).unwrap_or(u32::MAX)
    }

    /// The limits of the pool of blocking threads.
    pub fn pool(&self) -> PoolLimits {
        let Values {
            pool_min, pool_max, ..
        } = self.0.get();
        let count = |value| usize::try_from(value).unwrap_or(usize::MAX);
        PoolLimits {
            min: count(pool_min),
            max: count(pool_max),
        }
    }

    /// The value of a property of [`CLASS`].
    pub fn get(&self, property: &str) -> Option<Value> {
        let values = self.0.get();
        match property {
            "aio-max-batch" => Some(values.batch.into()),
            "thread-pool-min" => Some(values.pool_min.into()),
            "thread-pool-max" => Some(values.pool_max.into()),
            _ => None,
        }
    }

    /// Changes a property of [`CLASS`]; what it is now has to be put into force by the caller.
    ///
    /// # Errors
    /// It is out of range.
    pub fn set(&self, property: &str, value: Value) -> Option<Result<(), Error>> {
        let known = CLASS.properties.iter().any(|known| known.name == property);
        known.then(|| self.change(property, value))
    }

    fn change(&self, property: &str, value: Value) -> Result<(), Error> {
        let value = non_negative(property, from_json_member(property, value)?)?;
        let mut values = self.0.get();
        match property {
            "thread-pool-min" => values.pool_min = value,
            "thread-pool-max" => values.pool_max = value,
            _ => values.batch = value,
        }
        values.check()?;
        self.0.set(values);
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
