//! Everything QMP but the input and output: the schema's types and how they are decoded, encoded
//! and introspected, the wire, and the session.
//!
//! - [`schema`]: the types of the interface; the only truth about it.
//! - [`visitor`], [`builtin`], [`introspect`]: what `#[derive(Qapi)]` builds on.
//! - [`keyval`], [`opts`]: the two syntaxes of the command line.
//! - [`json`]: the reader and the writer of the wire.
//! - [`session`]: one client's conversation, from bytes to commands and back.
//! - [`command`]: the commands and events that exist, and their introspection.

extern crate self as stord_qmp;

pub mod base64;
pub mod builtin;
pub mod chardev_opts;
pub mod command;
pub mod error;
pub mod event;
pub mod identifier;
pub mod introspect;
pub mod json;
pub mod keyval;
pub mod opts;
pub mod order;
pub mod schema;
pub mod session;
pub mod visitor;

pub use error::{Error, ErrorClass};
pub use event::Event;
pub use stord_qmp_derive::Qapi;
pub use visitor::Qapi;

use serde_json::Value;
use visitor::{Form, Input};

/// Decodes a JSON value.
///
/// # Errors
/// The value is not exactly one `T`; the message names the parameter by its path.
pub fn from_json<T: Qapi>(value: Value) -> Result<T, Error> {
    T::decode(Input::root(value, Form::Json))
}

/// Decodes a JSON value that is called `name` in error messages.
///
/// # Errors
/// As [`from_json`].
pub fn from_json_member<T: Qapi>(name: &str, value: Value) -> Result<T, Error> {
    let object = Value::Object([(name.to_owned(), value)].into_iter().collect());
    Input::root(object, Form::Json).members()?.member(name)
}

/// Encodes a value as JSON.
pub fn to_json<T: Qapi>(value: &T) -> Value {
    value.encode()
}

/// Decodes the text of a command line option: JSON if it starts with `{`, else keyval.
///
/// # Errors
/// As [`from_json`], or the text is not well-formed, or it asks for help.
pub fn from_keyval<T: Qapi>(text: &str, implied_key: Option<&str>) -> Result<T, Error> {
    if text.starts_with('{') {
        return from_json(json::parse(text.as_bytes())?);
    }
    let parameters = keyval::parse(text, implied_key)?;
    if parameters.help {
        return Err(Error::generic("Help is not available for this option"));
    }
    T::decode(Input::root(parameters.value, Form::Keyval))
}
