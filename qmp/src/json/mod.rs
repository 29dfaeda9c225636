//! The JSON of the wire: a [`Reader`] that finds the values in a stream of bytes and stays in step
//! whatever the bytes are, and a writer whose output is ASCII.
//!
//! The language is RFC 8259 with one liberty, strings in single quotes. Of the characters in
//! strings, surrogates without partner and noncharacters are refused. What is accepted, what is
//! refused in which words, and where reading resumes after an error is the reference's behaviour,
//! because clients have come to rely on all of it.

mod lexer;
mod reader;
mod string;
mod writer;

pub use reader::{MAX_NESTING, Reader};
pub use writer::{to_compact, to_pretty};

use serde_json::Value;

use crate::error::Error;

/// Reads a text that is one JSON value.
///
/// # Errors
/// It is not well-formed, or there is more than one value in it.
pub fn parse(text: &[u8]) -> Result<Value, Error> {
    let mut reader = Reader::default();
    let mut values = Vec::new();
    reader.feed(text, |value| values.push(value));
    reader.finish(|value| values.push(value));
    let mut values = values.into_iter();
    match (values.next(), values.next()) {
        (Some(Err(error)), _) => Err(error),
        (Some(Ok(_)), Some(_)) => Err(Error::generic("Expecting at most one JSON value")),
        (Some(Ok(value)), None) => Ok(value),
        (None, _) => Err(Error::generic("Expecting a JSON value")),
    }
}
