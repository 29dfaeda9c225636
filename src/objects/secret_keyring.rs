//! `secret_keyring`: bytes to be kept secret, from the kernel's keyrings. They are read when the
//! object is made.

use std::cell::RefCell;
use std::sync::Arc;

use serde_json::Value;
use stord_credentials::secret::Source;
use stord_credentials::{Credential, Credentials, Secret};
use stord_qmp::schema::object::SecretKeyringProperties;
use stord_qmp::{Error, from_json_member};

use super::class::{Class, Form, Property};
use super::secret::{encoding, get_common, set_common};
use super::{Object, unknown};

/// The type.
pub const CLASS: Class = Class {
    name: "secret_keyring",
    parent: Some("secret_common"),
    form: Form::Creatable,
    properties: &[Property::new("serial", "int32_t")],
};

/// A secret.
pub struct SecretKeyring {
    secret: Arc<Secret>,
    properties: RefCell<SecretKeyringProperties>,
}

impl SecretKeyring {
    /// Reads a secret. It does not wait, and a key of this very thread can only be read on it.
    ///
    /// # Errors
    /// There is no such key, or it is not to be read.
    pub fn load(
        properties: SecretKeyringProperties,
        credentials: &Credentials,
    ) -> Result<Self, Error> {
        let source = Source::Key(properties.serial);
        let secret = Secret::load(&source, encoding(&properties.common), credentials)?;
        Ok(Self {
            secret: Arc::new(secret),
            properties: RefCell::new(properties),
        })
    }
}

impl Object for SecretKeyring {
    fn class(&self) -> &'static Class {
        &CLASS
    }

    fn get(&self, property: &str) -> Result<Value, Error> {
        let properties = self.properties.borrow();
        match property {
            "serial" => Ok(properties.serial.into()),
            _ => get_common(&properties.common, property).ok_or_else(|| unknown(&CLASS, property)),
        }
    }

    fn set(&self, property: &str, value: Value) -> Result<(), Error> {
        let mut properties = self.properties.borrow_mut();
        match property {
            "serial" => properties.serial = from_json_member(property, value)?,
            _ => set_common(&mut properties.common, property, value)?,
        }
        Ok(())
    }

    fn credential(&self) -> Credential {
        Credential::Secret(Some(Arc::clone(&self.secret)))
    }
}
