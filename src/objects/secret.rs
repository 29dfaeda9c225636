//! `secret`: bytes to be kept secret, given as text or as a file. They are read when the object is
//! made; what its properties are changed to afterwards is for show only, as in the reference.

use std::cell::RefCell;
use std::sync::Arc;

use serde_json::Value;
use stord_credentials::secret::{Encoding, Source};
use stord_credentials::{Credential, Credentials, Secret};
use stord_qmp::schema::object::{QCryptoSecretFormat, SecretCommonProperties, SecretProperties};
use stord_qmp::{Error, from_json_member, to_json};

use super::class::{Class, Form, Property};
use super::{Object, blocking, unknown};

/// The type of all secrets.
pub const COMMON: Class = Class {
    name: "secret_common",
    parent: Some("object"),
    form: Form::AbstractCreatable,
    properties: &[
        Property::new("iv", "string"),
        Property::new("keyid", "string"),
        Property::new("format", "QCryptoSecretFormat"),
    ],
};

/// The type.
pub const CLASS: Class = Class {
    name: "secret",
    parent: Some("secret_common"),
    form: Form::Creatable,
    properties: &[
        Property::new("file", "string"),
        Property::new("data", "string"),
    ],
};

/// A secret.
pub struct SecretObject {
    secret: Arc<Secret>,
    properties: RefCell<SecretProperties>,
}

impl SecretObject {
    /// Reads a secret.
    ///
    /// # Errors
    /// There are several sources or none, or the one there is cannot be read.
    pub async fn load(
        properties: SecretProperties,
        credentials: &Arc<Credentials>,
    ) -> Result<Self, Error> {
        let credentials = Arc::clone(credentials);
        blocking(move || {
            let source = match (&properties.data, &properties.file) {
                (Some(data), None) => Source::Data(data),
                (None, Some(file)) => Source::File(file),
                (Some(_), Some(_)) => {
                    return Err(Error::generic("'file' and 'data' are mutually exclusive"));
                }
                (None, None) => {
                    return Err(Error::generic("Either 'file' or 'data' must be provided"));
                }
            };
            let secret = Secret::load(&source, encoding(&properties.common), &credentials)?;
            Ok((Arc::new(secret), properties))
        })
        .await
        .map(|(secret, properties)| Self {
            secret,
            properties: RefCell::new(properties),
        })
    }
}

impl Object for SecretObject {
    fn class(&self) -> &'static Class {
        &CLASS
    }

    fn get(&self, property: &str) -> Result<Value, Error> {
        let properties = self.properties.borrow();
        match property {
            "data" => Ok(text(&properties.data)),
            "file" => Ok(text(&properties.file)),
            _ => get_common(&properties.common, property).ok_or_else(|| unknown(&CLASS, property)),
        }
    }

    fn set(&self, property: &str, value: Value) -> Result<(), Error> {
        let mut properties = self.properties.borrow_mut();
        match property {
            "data" => properties.data = Some(from_json_member(property, value)?),
            "file" => properties.file = Some(from_json_member(property, value)?),
            _ => set_common(&mut properties.common, property, value)?,
        }
        Ok(())
    }

    fn credential(&self) -> Credential {
        Credential::Secret(Some(Arc::clone(&self.secret)))
    }
}

/// How the bytes of a secret are to be read.
pub fn encoding(common: &SecretCommonProperties) -> Encoding<'_> {
    Encoding {
        format: common.format,
        key: common.keyid.as_deref(),
        iv: common.iv.as_deref(),
    }
}

/// The value of a property of [`COMMON`].
pub fn get_common(common: &SecretCommonProperties, property: &str) -> Option<Value> {
    match property {
        "iv" => Some(text(&common.iv)),
        "keyid" => Some(text(&common.keyid)),
        "format" => Some(to_json(&common.format.unwrap_or(QCryptoSecretFormat::Raw))),
        _ => None,
    }
}

/// Changes a property of [`COMMON`].
///
/// # Errors
/// The value is of the wrong type.
pub fn set_common(
    common: &mut SecretCommonProperties,
    property: &str,
    value: Value,
) -> Result<(), Error> {
    match property {
        "iv" => common.iv = Some(from_json_member(property, value)?),
        "keyid" => common.keyid = Some(from_json_member(property, value)?),
        "format" => common.format = Some(from_json_member(property, value)?),
        _ => return Err(unknown(&COMMON, property)),
    }
    Ok(())
}

/// A string property that need not be set.
fn text(value: &Option<String>) -> Value {
    value.as_deref().unwrap_or_default().into()
}
