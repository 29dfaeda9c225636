//! A value on its way to becoming typed: taking it apart reports everything wrong with it, and
//! nothing of it is left unlooked at.

use serde_json::{Map, Value};

use super::path::{Path, Step};
use super::{DecodeBranch, Kind, Name, Object, Qapi, Union};
use crate::error::Error;

/// The deepest nesting of a value in typed input; deep enough for any sensible chain of nodes.
pub const MAX_DEPTH: usize = 128;

/// How the input was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// JSON: values have types.
    Json,
    /// Keyval text: every scalar is a string.
    Keyval,
}

/// A value about to be decoded, with its place in the whole input.
pub struct Input<'p> {
    value: Value,
    path: Path<'p>,
}

impl<'p> Input<'p> {
    /// The whole input.
    pub fn root(value: Value, form: Form) -> Self {
        let path = Path::root(form);
        Input { value, path }
    }

    /// The value's JSON type.
    pub fn kind(&self) -> Kind {
        Kind::of(&self.value)
    }

    /// The value as it is.
    pub fn into_value(self) -> Value {
        self.value
    }

    /// An error saying that the value is not of the type called `expected`.
    pub fn wrong_type(&self, expected: &str) -> Error {
        let path = match self.path.depth {
            0 => "<anonymous>".to_owned(),
            _ => self.path.to_string(),
        };
        Error::generic(format!(
            "Invalid parameter type for '{path}', expected: {expected}"
        ))
    }

    /// An error saying that the value is not what `expected` says, as in `expects integer`.
    pub(crate) fn expects(&self, expected: &str) -> Error {
        Error::generic(format!("Parameter '{}' expects {expected}", self.path))
    }

    /// An error saying that the value is too large or too small for the type called `expected`.
    pub(crate) fn out_of_range(&self, expected: &str) -> Error {
        let name = self.path.last_name();
        Error::generic(format!("Parameter '{name}' expects {expected}"))
    }

    /// The value if it is JSON, the text if it came from a keyval string.
    pub(crate) fn scalar(&self) -> Result<Scalar<'_>, Error> {
        match (&self.value, self.path.form) {
            (Value::String(text), Form::Keyval) => Ok(Scalar::Text(text)),
            (Value::Array(_) | Value::Object(_), Form::Keyval) => Err(Error::generic(format!(
                "Parameters '{}.*' are unexpected",
                self.path
            ))),
            (value, _) => Ok(Scalar::Typed(value)),
        }
    }

    /// The value as a string.
    ///
    /// # Errors
    /// It is none.
    pub fn into_string(self) -> Result<String, Error> {
        self.scalar()?;
        match self.value {
            Value::String(text) => Ok(text),
            _ => Err(self.wrong_type("string")),
        }
    }

    /// The one of `values` that has the value's name, `names` and `values` being in the same order.
    ///
    /// # Errors
    /// It is no string, or none of the names.
    pub fn one_of<T: Copy>(self, names: &[Name], values: &[T]) -> Result<T, Error> {
        let path = self.path;
        let text = self.into_string()?;
        let mut pairs = names.iter().zip(values);
        match pairs.find(|(known, _)| known.name == text) {
            Some((_, value)) => Ok(*value),
            None => Err(Error::generic(format!(
                "Parameter '{}' does not accept value '{text}'",
                path.last_name()
            ))),
        }
    }

    /// Decodes the elements of a list.
    ///
    /// # Errors
    /// The value is no list, or an element is not a `T`.
    pub fn elements<T: Qapi>(self) -> Result<Vec<T>, Error> {
        let Value::Array(values) = self.value else {
            return Err(self.wrong_type("array"));
        };
        let path = self.path;
        let element = |(index, value)| {
            T::decode(Input {
                value,
                path: path.child(Step::Index(index)),
            })
        };
        values.into_iter().enumerate().map(element).collect()
    }

    /// The value's members, to be taken one by one.
    ///
    /// # Errors
    /// The value is no object, or nested too deeply.
    pub fn members(self) -> Result<Members<'p>, Error> {
        if self.path.depth > MAX_DEPTH {
            return Err(Error::generic(format!(
                "Parameter '{}' is nested too deeply",
                self.path
            )));
        }
        match self.value {
            Value::Object(values) => Ok(Members {
                values,
                path: self.path,
            }),
            _ => Err(self.wrong_type("object")),
        }
    }

    /// Decodes an object that has `T`'s members and no others.
    ///
    /// # Errors
    /// As [`Qapi::decode`].
    pub fn object<T: Object>(self) -> Result<T, Error> {
        let mut members = self.members()?;
        let object = T::decode_members(&mut members)?;
        members.finish()?;
        Ok(object)
    }
}

/// A scalar before it is read as a certain type.
pub(crate) enum Scalar<'a> {
    /// From JSON.
    Typed(&'a Value),
    /// From keyval text.
    Text(&'a str),
}

/// The members of an object that have not been taken yet.
pub struct Members<'p> {
    values: Map<String, Value>,
    path: Path<'p>,
}

impl Members<'_> {
    /// Takes and decodes a member.
    ///
    /// # Errors
    /// It is missing though not optional, or not a `T`.
    pub fn member<T: Qapi>(&mut self, name: &str) -> Result<T, Error> {
        let path = self.path.child(Step::Member(name));
        match self.values.shift_remove(name) {
            Some(value) => T::decode(Input { value, path }),
            None => {
                T::absent().ok_or_else(|| Error::generic(format!("Parameter '{path}' is missing")))
            }
        }
    }

    /// Takes the tag of a union and returns the decoder of the branch it names.
    ///
    /// # Errors
    /// It is missing, or names no branch.
    pub fn tag<U: Union>(&mut self, name: &str) -> Result<DecodeBranch<U>, Error> {
        let path = self.path.child(Step::Member(name));
        match self.values.shift_remove(name) {
            Some(value) => Input { value, path }.one_of(U::TAGS, U::DECODERS),
            None => Err(Error::generic(format!("Parameter '{path}' is missing"))),
        }
    }

    /// Ends the decoding of the object.
    ///
    /// # Errors
    /// A member is left that nobody has taken.
    fn finish(self) -> Result<(), Error> {
        match self.values.keys().next() {
            None => Ok(()),
            Some(name) => Err(Error::generic(format!(
                "Parameter '{}' is unexpected",
                self.path.child(Step::Member(name))
            ))),
        }
    }
}
