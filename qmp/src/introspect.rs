//! The schema as clients see it is derived from the types themselves, so it cannot disagree with
//! what is accepted.
//!
//! As in the reference, the names of types are not part of the interface: objects, enumerations and
//! alternates are numbered in the order they are first mentioned, an array is its element's name in
//! brackets, and only built-in types have names that say something.

use std::any::TypeId;
use std::collections::HashMap;

use serde_json::Value;

use crate::schema::introspect::{
    JsonType, SchemaInfo, SchemaInfoAlternate, SchemaInfoAlternateMember, SchemaInfoArray,
    SchemaInfoBuiltin, SchemaInfoEnum, SchemaInfoEnumMember, SchemaInfoObject,
    SchemaInfoObjectMember, SchemaInfoObjectVariant, SchemaMetaType,
};
use crate::visitor::{Name, Object, Qapi, Union};

/// The types described so far.
#[derive(Default)]
pub struct Introspection {
    numbered: Vec<Option<SchemaInfo>>,
    numbers: HashMap<TypeId, String>,
    named: Vec<SchemaInfo>,
}

/// The members and branches of an object type under description.
#[derive(Default)]
pub struct ObjectShape {
    members: Vec<SchemaInfoObjectMember>,
    tag: Option<String>,
    variants: Option<Vec<SchemaInfoObjectVariant>>,
}

impl Introspection {
    /// Everything described: the numbered types in order, then built-in types and arrays.
    pub fn into_types(self) -> Vec<SchemaInfo> {
        let numbered = self.numbered.into_iter().flatten();
        numbered.chain(self.named).collect()
    }

    /// Describes a built-in type.
    pub fn builtin(&mut self, name: &str, json_type: JsonType) -> String {
        self.named(
            name,
            SchemaMetaType::Builtin(SchemaInfoBuiltin { json_type }),
        )
    }

    /// Describes a list of `T`.
    pub fn array<T: Qapi>(&mut self) -> String {
        let element_type = T::introspect(self);
        let name = format!("[{element_type}]");
        self.named(
            &name,
            SchemaMetaType::Array(SchemaInfoArray { element_type }),
        )
    }

    /// Describes an object type with the given features.
    pub fn object<T: Object>(&mut self, features: &[&str]) -> String {
        self.numbered::<T>(features, |schema| {
            let mut shape = ObjectShape::default();
            T::describe(schema, &mut shape);
            SchemaMetaType::Object(SchemaInfoObject {
                members: shape.members,
                tag: shape.tag,
                variants: shape.variants,
            })
        })
    }

    /// Describes an enumeration, `T` being the Rust type it belongs to.
    pub fn enumeration<T: 'static>(&mut self, names: &[Name], features: &[&str]) -> String {
        self.numbered::<T>(features, |_| {
            let member = |name: &Name| SchemaInfoEnumMember {
                name: name.name.to_owned(),
                features: feature_list(name.features),
            };
            SchemaMetaType::Enum(SchemaInfoEnum {
                members: names.iter().map(member).collect(),
                values: names.iter().map(|name| name.name.to_owned()).collect(),
            })
        })
    }

    /// Describes an alternate of the types whose names `branches` returns.
    pub fn alternate<T: 'static>(
        &mut self,
        branches: impl FnOnce(&mut Self) -> Vec<String>,
        features: &[&str],
    ) -> String {
        self.numbered::<T>(features, |schema| {
            let member = |r#type| SchemaInfoAlternateMember { r#type };
            SchemaMetaType::Alternate(SchemaInfoAlternate {
                members: branches(schema).into_iter().map(member).collect(),
            })
        })
    }

    fn named(&mut self, name: &str, meta: SchemaMetaType) -> String {
        if !self.named.iter().any(|info| info.name == name) {
            self.named.push(SchemaInfo {
                name: name.to_owned(),
                features: None,
                meta,
            });
        }
        name.to_owned()
    }

    /// Numbers `T` before describing it, so that a type may contain itself.
    fn numbered<T: 'static>(
        &mut self,
        features: &[&str],
        describe: impl FnOnce(&mut Self) -> SchemaMetaType,
    ) -> String {
        if let Some(name) = self.numbers.get(&TypeId::of::<T>()) {
            return name.clone();
        }
        let number = self.numbered.len();
        let name = number.to_string();
        self.numbered.push(None);
        self.numbers.insert(TypeId::of::<T>(), name.clone());
        let meta = describe(self);
        self.numbered[number] = Some(SchemaInfo {
            name: name.clone(),
            features: feature_list(features),
            meta,
        });
        name
    }
}

impl ObjectShape {
    /// Adds a member of type `T`.
    pub fn member<T: Qapi>(&mut self, schema: &mut Introspection, name: &str, features: &[&str]) {
        self.members.push(SchemaInfoObjectMember {
            name: name.to_owned(),
            r#type: T::introspect(schema),
            default: T::OPTIONAL.then_some(Value::Null),
            features: feature_list(features),
        });
    }

    /// Adds the tag called `name` and the branches of `U`.
    pub fn union<U: Union>(&mut self, schema: &mut Introspection, name: &str) {
        self.members.push(SchemaInfoObjectMember {
            name: name.to_owned(),
            r#type: schema.enumeration::<U>(U::TAGS, &[]),
            default: None,
            features: None,
        });
        let variant = |(tag, r#type): (&Name, _)| SchemaInfoObjectVariant {
            case: tag.name.to_owned(),
            r#type,
        };
        let branches = U::branches(schema);
        self.tag = Some(name.to_owned());
        self.variants = Some(U::TAGS.iter().zip(branches).map(variant).collect());
    }
}

pub(crate) fn feature_list(features: &[&str]) -> Option<Vec<String>> {
    let owned = || features.iter().map(|name| (*name).to_owned()).collect();
    (!features.is_empty()).then(owned)
}
