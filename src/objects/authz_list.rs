//! `authz-list`: rules that compare names with patterns.

use std::sync::Arc;

use serde_json::Value;
use stord_credentials::Credential;
use stord_credentials::authorization::List;
use stord_qmp::schema::object::AuthZListProperties;
use stord_qmp::{Error, from_json_member, to_json};

use super::class::{Class, Form, Property};
use super::{Object, unknown};

/// The type.
pub const CLASS: Class = Class {
    name: "authz-list",
    parent: Some("authz"),
    form: Form::Creatable,
    properties: &[
        Property::new("policy", "QAuthZListPolicy"),
        Property::new("rules", "QAuthZListRule"),
    ],
};

/// The rules.
pub struct AuthzList(Arc<List>);

impl AuthzList {
    /// These rules.
    pub fn new(properties: AuthZListProperties) -> Self {
        Self(Arc::new(List::new(properties)))
    }
}

impl Object for AuthzList {
    fn class(&self) -> &'static Class {
        &CLASS
    }

    fn get(&self, property: &str) -> Result<Value, Error> {
        match property {
            "policy" => Ok(to_json(&self.0.policy())),
            "rules" => Ok(to_json(&self.0.rules())),
            _ => Err(unknown(&CLASS, property)),
        }
    }

    fn set(&self, property: &str, value: Value) -> Result<(), Error> {
        match property {
            "policy" => self.0.set_policy(from_json_member(property, value)?),
            "rules" => self.0.set_rules(from_json_member(property, value)?),
            _ => return Err(unknown(&CLASS, property)),
        }
        Ok(())
    }

    fn credential(&self) -> Credential {
        Credential::Authorization(Arc::clone(&self.0) as Arc<_>)
    }
}
