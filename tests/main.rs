//! Integration tests: the built daemon seen from outside, as its users see it.

mod support;

mod bad_input;
mod content;
mod locking;
mod schema;
