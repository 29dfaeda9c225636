//! The types of objects and what clients may know of them. A property that is listed is there: what
//! an object accepts and reports is checked against its type.

use stord_qmp::schema::object::{ObjectPropertyInfo, ObjectTypeInfo, QomListTypes};
use stord_qmp::{Error, ErrorClass};

use super::{
    authz_list, authz_list_file, authz_simple, event_loop, iothread, main_loop, secret,
    secret_keyring, thread_context, tls_creds,
};
use crate::chardev;

/// A type.
pub struct Class {
    /// The name.
    pub name: &'static str,
    /// The type it extends; none for the roots.
    pub parent: Option<&'static str>,
    /// What there is of it.
    pub form: Form,
    /// Its properties besides those of its parent.
    pub properties: &'static [Property],
}

/// What there is of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Other types, but no objects.
    Abstract,
    /// As before, all of which users can create objects of.
    AbstractCreatable,
    /// Objects.
    Concrete,
    /// Objects that users create.
    Creatable,
    /// Promises that types of other ancestry make.
    Interface,
}

/// A property.
#[derive(Debug, PartialEq, Eq)]
pub struct Property {
    /// The name.
    pub name: &'static str,
    /// The type of its value, as the reference names it.
    pub kind: &'static str,
    /// What clients may do with it.
    pub access: Access,
}

/// What clients may do with a property.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Get it.
    Read,
    /// Get and set it.
    ReadWrite,
    /// Set it.
    Write,
}

impl Property {
    /// A property that clients get and set.
    pub const fn new(name: &'static str, kind: &'static str) -> Self {
        Self::with_access(name, kind, Access::ReadWrite)
    }

    /// A property with limits on what clients may do.
    pub const fn with_access(name: &'static str, kind: &'static str, access: Access) -> Self {
        Self { name, kind, access }
    }

    /// Whether its value can be got.
    pub fn is_readable(&self) -> bool {
        self.access != Access::Write
    }

    /// Whether its value can be set.
    pub fn is_writable(&self) -> bool {
        self.access != Access::Read
    }
}

/// What everything has.
const TYPE: Property = Property::with_access("type", "string", Access::Read);

/// What users can create implements it.
const USER_CREATABLE: &str = "user-creatable";

const fn plain(name: &'static str, parent: Option<&'static str>, form: Form) -> Class {
    Class {
        name,
        parent,
        form,
        properties: &[],
    }
}

const OBJECT: Class = plain("object", None, Form::Abstract);
const INTERFACE: Class = plain("interface", None, Form::Interface);
const CREATABLE: Class = plain(USER_CREATABLE, Some("interface"), Form::Interface);
/// What holds objects.
pub const CONTAINER: Class = plain("container", Some("object"), Form::Concrete);
const AUTHZ: Class = plain("authz", Some("object"), Form::Abstract);

/// The types of what users make and of what holds it.
const CLASSES: &[&Class] = &[
    &OBJECT,
    &INTERFACE,
    &CREATABLE,
    &CONTAINER,
    &AUTHZ,
    &authz_list::CLASS,
    &authz_list_file::CLASS,
    &authz_simple::CLASS,
    &event_loop::CLASS,
    &iothread::CLASS,
    &main_loop::CLASS,
    &secret::COMMON,
    &secret::CLASS,
    &secret_keyring::CLASS,
    &thread_context::CLASS,
    &tls_creds::COMMON,
    &tls_creds::ANON,
    &tls_creds::PSK,
    &tls_creds::X509,
];

/// Every type, those of character devices included.
fn every() -> impl Iterator<Item = &'static Class> {
    CLASSES.iter().chain(chardev::CLASSES).copied()
}

impl Class {
    /// The type of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        every().find(|class| class.name == name)
    }

    /// This type and those it extends, the nearest first.
    pub fn lineage(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |class| class.parent.and_then(Self::find))
    }

    /// Every property: `type`, then those of the types it extends, then its own.
    pub fn all_properties(&self) -> impl Iterator<Item = &Property> {
        let mut lineage: Vec<_> = self.lineage().collect();
        lineage.reverse();
        let own = lineage.into_iter().flat_map(|class| class.properties);
        std::iter::once(&TYPE).chain(own)
    }

    /// The property of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn property(&self, name: &str) -> Result<&Property, Error> {
        let found = self.all_properties().find(|property| property.name == name);
        found.ok_or_else(|| {
            let class = self.name;
            Error::generic(format!("Property '{class}.{name}' not found"))
        })
    }

    /// Every property as clients see it.
    pub fn describe(&self) -> Vec<ObjectPropertyInfo> {
        let info = |property: &Property| described(property.name, property.kind);
        self.all_properties().map(info).collect()
    }

    fn is_abstract(&self) -> bool {
        !matches!(self.form, Form::Concrete | Form::Creatable)
    }

    fn implements(&self, name: &str) -> bool {
        let creatable = matches!(self.form, Form::Creatable | Form::AbstractCreatable);
        self.lineage().any(|class| class.name == name)
            || (creatable && CREATABLE.lineage().any(|class| class.name == name))
    }
}

/// A property as clients see it.
pub fn described(name: &str, kind: &str) -> ObjectPropertyInfo {
    ObjectPropertyInfo {
        name: name.to_owned(),
        r#type: kind.to_owned(),
        description: None,
        default_value: None,
    }
}

/// The types that users can create, by name.
pub fn creatable() -> Vec<&'static Class> {
    let is_creatable = |class: &&Class| class.form == Form::Creatable;
    let mut classes: Vec<_> = every().filter(is_creatable).collect();
    classes.sort_by_key(|class| class.name);
    classes
}

/// The types asked for.
pub fn list(wanted: &QomListTypes) -> Vec<ObjectTypeInfo> {
    let is_wanted = |class: &&Class| {
        let implements = wanted.implements.as_deref();
        (wanted.r#abstract == Some(true) || !class.is_abstract())
            && implements.is_none_or(|name| class.implements(name))
    };
    let info = |class: &Class| ObjectTypeInfo {
        name: class.name.to_owned(),
        r#abstract: class.is_abstract().then_some(true),
        parent: class.parent.map(str::to_owned),
    };
    every().filter(is_wanted).map(info).collect()
}

/// The properties of a type.
///
/// # Errors
/// There is no such type, or it has none because it is an interface.
pub fn list_properties(name: &str) -> Result<Vec<ObjectPropertyInfo>, Error> {
    match Class::find(name) {
        None => Err(Error::new(
            ErrorClass::DeviceNotFound,
            format!("Class '{name}' not found"),
        )),
        Some(class) if class.form == Form::Interface => {
            Err(Error::generic("Parameter 'typename' expects a QOM type"))
        }
        Some(class) => Ok(class.describe()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_exist_and_names_are_taken_once() {
        for class in every() {
            assert!(class.parent.is_none_or(|name| Class::find(name).is_some()));
            let same_name = |other: &&'static Class| other.name == class.name;
            assert_eq!(every().filter(same_name).count(), 1, "{}", class.name);
        }
    }

    #[test]
    fn types_are_listed_by_what_they_are() {
        let names = |implements: &str, r#abstract| -> Vec<String> {
            let wanted = QomListTypes {
                implements: Some(implements.to_owned()),
                r#abstract,
            };
            list(&wanted).into_iter().map(|info| info.name).collect()
        };
        assert_eq!(names("secret_common", None), ["secret", "secret_keyring"]);
        assert_eq!(names("secret_common", Some(true)).len(), 3);
        assert_eq!(names(USER_CREATABLE, None).len(), creatable().len());
        assert!(names("nope", Some(true)).is_empty());
    }
}
