//! `authz-simple`: the rule that lets one name in.

use std::sync::Arc;

use serde_json::Value;
use stord_credentials::Credential;
use stord_credentials::authorization::Simple;
use stord_qmp::schema::object::AuthZSimpleProperties;
use stord_qmp::{Error, from_json_member};

use super::class::{Class, Form, Property};
use super::{Object, unknown};

/// The type.
pub const CLASS: Class = Class {
    name: "authz-simple",
    parent: Some("authz"),
    form: Form::Creatable,
    properties: &[Property::new("identity", "string")],
};

/// The rule.
pub struct AuthzSimple(Arc<Simple>);

impl AuthzSimple {
    /// Lets a name in.
    pub fn new(properties: AuthZSimpleProperties) -> Self {
        Self(Arc::new(Simple::new(properties.identity)))
    }
}

impl Object for AuthzSimple {
    fn class(&self) -> &'static Class {
        &CLASS
    }

    fn get(&self, property: &str) -> Result<Value, Error> {
        match property {
            "identity" => Ok(self.0.identity().into()),
            _ => Err(unknown(&CLASS, property)),
        }
    }

    fn set(&self, property: &str, value: Value) -> Result<(), Error> {
        match property {
            "identity" => self.0.set_identity(from_json_member(property, value)?),
            _ => return Err(unknown(&CLASS, property)),
        }
        Ok(())
    }

    fn credential(&self) -> Credential {
        Credential::Authorization(Arc::clone(&self.0) as Arc<_>)
    }
}
