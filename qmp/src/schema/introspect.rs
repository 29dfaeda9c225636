//! The schema of the schema: what `query-qmp-schema` returns.

use serde_json::Value;

use crate::Qapi;

/// A command, an event or a type.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct SchemaInfo {
    /// What it is.
    #[qapi(union = "meta-type")]
    pub meta: SchemaMetaType,
    /// The name; of a type other than built-in ones it says nothing.
    pub name: String,
    /// Its special features.
    pub features: Option<Vec<String>>,
}

/// What an entity of the schema is.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union)]
pub enum SchemaMetaType {
    /// A built-in type.
    Builtin(SchemaInfoBuiltin),
    /// An enumeration.
    Enum(SchemaInfoEnum),
    /// A list type.
    Array(SchemaInfoArray),
    /// An object type.
    Object(SchemaInfoObject),
    /// A choice by JSON type.
    Alternate(SchemaInfoAlternate),
    /// A command.
    Command(SchemaInfoCommand),
    /// An event.
    Event(SchemaInfoEvent),
}

/// A type of JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum JsonType {
    /// A string.
    String,
    /// A number.
    Number,
    /// An integral number.
    Int,
    /// A boolean.
    Boolean,
    /// Null.
    Null,
    /// An object.
    Object,
    /// An array.
    Array,
    /// Any of them.
    Value,
}

/// A built-in type.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct SchemaInfoBuiltin {
    /// How it is written.
    pub json_type: JsonType,
}

/// An enumeration.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct SchemaInfoEnum {
    /// The values.
    pub members: Vec<SchemaInfoEnumMember>,
    /// The names of the values, for clients that do not know `members`.
    #[qapi(features("deprecated"))]
    pub values: Vec<String>,
}

/// A value of an enumeration.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct SchemaInfoEnumMember {
    /// The name.
    pub name: String,
    /// Its special features.
    pub features: Option<Vec<String>>,
}

/// A list type.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct SchemaInfoArray {
    /// The type of the elements.
    pub element_type: String,
}

/// An object type.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct SchemaInfoObject {
    /// The members that are always there.
    pub members: Vec<SchemaInfoObjectMember>,
    /// The member that tells the variant, in a union.
    pub tag: Option<String>,
    /// The variants of a union.
    pub variants: Option<Vec<SchemaInfoObjectVariant>>,
}

/// A member of an object type.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct SchemaInfoObjectMember {
    /// The name.
    pub name: String,
    /// The type.
    pub r#type: String,
    /// Present if the member is optional; `null` says nothing about the default.
    pub default: Option<Value>,
    /// Its special features.
    pub features: Option<Vec<String>>,
}

/// A variant of a union.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct SchemaInfoObjectVariant {
    /// The value of the tag.
    pub case: String,
    /// The object type that holds the variant's members.
    pub r#type: String,
}

/// A choice by JSON type.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct SchemaInfoAlternate {
    /// The choices.
    pub members: Vec<SchemaInfoAlternateMember>,
}

/// A choice of an alternate.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct SchemaInfoAlternateMember {
    /// The type.
    pub r#type: String,
}

/// A command.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct SchemaInfoCommand {
    /// The object type of its arguments.
    pub arg_type: String,
    /// The type of what it returns.
    pub ret_type: String,
    /// Whether it may be executed out of band; default off.
    pub allow_oob: Option<bool>,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct SchemaInfoEvent {
    /// The object type of its data.
    pub arg_type: String,
}
