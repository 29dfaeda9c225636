//! The JSON of the wire.

use serde_json::Value;

use crate::error::Error;

/// Reads one JSON text.
///
/// # Errors
/// It is not well-formed.
pub fn parse(text: &[u8]) -> Result<Value, Error> {
    serde_json::from_slice(text)
        .map_err(|error| Error::generic(format!("JSON parse error, {error}")).with_source(error))
}
