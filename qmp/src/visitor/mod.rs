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

mod input;
mod path;

pub(crate) use input::Scalar;
pub use input::{Form, Input, MAX_DEPTH, Members};
pub use serde_json::{Map, Value};

use crate::error::Error;
use crate::introspect::{Introspection, ObjectShape};

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
