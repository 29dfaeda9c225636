//! Decoding is strict: every member is known, present or optional, of the right type and in range,
//! or the error names the offending parameter by its full path.
//!
//! Two forms of input share one code path. JSON carries typed values; keyval text
//! (`driver=raw,file.driver=file`) carries strings only, which scalars then parse. The form also
//! decides how a list element is named in a message: `children[0].x` or `children.0.x`.
//!
//! Types that contain themselves are decoded, opened and dropped by recursion, so their nesting is
//! limited to [`MAX_DEPTH`], far below what JSON itself may nest.
//!
//! `#[derive(Qapi)]` writes the implementations; this module is what its output calls.

use std::fmt;

pub use serde_json::{Map, Value};

use crate::error::Error;
use crate::introspect::{Introspection, ObjectShape};

/// The deepest nesting of a value in typed input; deep enough for any sensible chain of nodes.
pub const MAX_DEPTH: usize = 128;

/// A type of the schema: it can be decoded strictly, encoded, and described to clients.
pub trait Qapi: Sized + 'static {
    /// Whether a member of this type may be left out.
    const OPTIONAL: bool = false;
    /// The JSON type a value takes; alternates choose their branch by it.
    const KIND: Kind;

    /// Reads a value.
    ///
    /// # Errors
    /// Anything but exactly one valid value of the type, named by its path.
    fn decode(input: Input<'_>) -> Result<Self, Error>;

    /// The value that stands for a member left out, if there is one.
    fn absent() -> Option<Self> {
        None
    }

    /// The JSON of the value.
    fn encode(&self) -> Value;

    /// Whether a member of this value is left out of its object.
    fn is_absent(&self) -> bool {
        false
    }

    /// Adds the type to the introspection and returns the name it has there.
    fn introspect(schema: &mut Introspection) -> String;
}

/// A type made of members, which can therefore be the base or the branch of another.
pub trait Object: Qapi {
    /// Takes this type's members out of a larger set.
    ///
    /// # Errors
    /// As [`Qapi::decode`]; members of other types are left alone.
    fn decode_members(members: &mut Members<'_>) -> Result<Self, Error>;

    /// Adds this value's members.
    fn encode_members(&self, members: &mut Map<String, Value>);

    /// Adds this type's members and branches to a shape.
    fn describe(schema: &mut Introspection, shape: &mut ObjectShape);
}

/// A name among the values of an enumeration or the branches of a union.
#[derive(Clone, Copy, Debug)]
pub struct Name {
    /// The name on the wire.
    pub name: &'static str,
    /// Its special features, such as `deprecated`.
    pub features: &'static [&'static str],
}

/// The branches of a flat union; which one is told by a tag among the union's own members.
pub trait Union: Sized + 'static {
    /// The values of the tag.
    const TAGS: &'static [Name];

    /// How the branch of each tag is decoded, in the order of [`Union::TAGS`].
    const DECODERS: &'static [DecodeBranch<Self>];

    /// Adds the tag under `tag_name`, then the members of the branch.
    fn encode_branch(&self, tag_name: &str, members: &mut Map<String, Value>);

    /// The type names of the branches, in the order of [`Union::TAGS`].
    fn branches(schema: &mut Introspection) -> Vec<String>;
}

/// Takes the members of one branch of a union and makes the union of them.
pub type DecodeBranch<U> = fn(&mut Members<'_>) -> Result<U, Error>;

/// The data of an event, whose name is part of its type.
pub trait EventData: Object {
    /// The event's name on the wire.
    const NAME: &'static str;
}

/// The JSON type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool,
    /// A number, integral or not.
    Number,
    /// A string.
    String,
    /// A list.
    Array,
    /// A set of members.
    Object,
    /// Any of them.
    Any,
}

impl Kind {
    fn of(value: &Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(_) => Self::Bool,
            Value::Number(_) => Self::Number,
            Value::String(_) => Self::String,
            Value::Array(_) => Self::Array,
            Value::Object(_) => Self::Object,
        }
    }
}

/// How the input was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// JSON: values have types.
    Json,
    /// Keyval text: every scalar is a string.
    Keyval,
}

/// Where a value is in the whole input.
#[derive(Clone, Copy)]
struct Path<'p> {
    parent: Option<&'p Path<'p>>,
    step: Step<'p>,
    depth: usize,
    form: Form,
}

#[derive(Clone, Copy)]
enum Step<'p> {
    Root,
    Member(&'p str),
    Index(usize),
}

impl<'p> Path<'p> {
    fn child(&'p self, step: Step<'p>) -> Self {
        Path {
            parent: Some(self),
            step,
            depth: self.depth + 1,
            form: self.form,
        }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(parent), false) = (self.parent, matches!(self.step, Step::Root)) else {
            return Ok(());
        };
        parent.fmt(f)?;
        let first = matches!(parent.step, Step::Root);
        match (self.step, self.form) {
            (Step::Root, _) => Ok(()),
            (Step::Member(name), _) if first => f.write_str(name),
            (Step::Member(name), _) => write!(f, ".{name}"),
            (Step::Index(index), Form::Json) => write!(f, "[{index}]"),
            (Step::Index(index), Form::Keyval) if first => write!(f, "{index}"),
            (Step::Index(index), Form::Keyval) => write!(f, ".{index}"),
        }
    }
}

/// A value about to be decoded, with its place in the whole input.
pub struct Input<'p> {
    value: Value,
    path: Path<'p>,
}

impl<'p> Input<'p> {
    /// The whole input.
    pub fn root(value: Value, form: Form) -> Self {
        let path = Path {
            parent: None,
            step: Step::Root,
            depth: 0,
            form,
        };
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
        let path = match self.path.step {
            Step::Root => "<anonymous>".to_owned(),
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
                "Parameter '{path}' does not accept value '{text}'"
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

/// The JSON of an object.
pub fn encode_object<T: Object>(object: &T) -> Value {
    let mut members = Map::new();
    object.encode_members(&mut members);
    Value::Object(members)
}

/// Adds `value` to `members` unless it is an absent optional; the counterpart of [`Members::member`].
pub fn encode_member<T: Qapi>(members: &mut Map<String, Value>, name: &str, value: &T) {
    if !value.is_absent() {
        members.insert(name.to_owned(), value.encode());
    }
}
