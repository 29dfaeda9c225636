//! `tls-creds-anon`, `tls-creds-psk` and `tls-creds-x509`: TLS credentials. Files are read when the
//! object is made. What is said later about the side, about verification and about the priority
//! counts for later connections; the rest is for show only, as in the reference.

use std::cell::RefCell;
use std::sync::Arc;

use serde_json::Value;
use stord_credentials::{Credential, Credentials, TlsCredentials};
use stord_qmp::schema::object::{
    QCryptoTLSCredsEndpoint, TlsCredsAnonProperties, TlsCredsProperties, TlsCredsPskProperties,
    TlsCredsX509Properties,
};
use stord_qmp::{Error, from_json_member, to_json};

use super::class::{Class, Form, Property};
use super::{Object, blocking, unknown};

/// The type of all TLS credentials.
pub const COMMON: Class = Class {
    name: "tls-creds",
    parent: Some("object"),
    form: Form::AbstractCreatable,
    properties: &[
        Property::new("endpoint", "QCryptoTLSCredsEndpoint"),
        Property::new("dir", "string"),
        Property::new("verify-peer", "bool"),
        Property::new("priority", "string"),
    ],
};

/// The type of those that prove nothing.
pub const ANON: Class = Class {
    name: "tls-creds-anon",
    parent: Some("tls-creds"),
    form: Form::Creatable,
    properties: &[],
};

/// The type of pre-shared keys.
pub const PSK: Class = Class {
    name: "tls-creds-psk",
    parent: Some("tls-creds"),
    form: Form::Creatable,
    properties: &[Property::new("username", "string")],
};

/// The type of certificates.
pub const X509: Class = Class {
    name: "tls-creds-x509",
    parent: Some("tls-creds"),
    form: Form::Creatable,
    properties: &[
        Property::new("sanity-check", "bool"),
        Property::new("passwordid", "string"),
    ],
};

/// TLS credentials.
pub struct TlsCreds {
    loaded: Arc<TlsCredentials>,
    properties: RefCell<Properties>,
}

/// What was asked for.
#[derive(Clone)]
pub enum Properties {
    /// Nothing to prove.
    Anon(TlsCredsAnonProperties),
    /// Pre-shared keys.
    Psk(TlsCredsPskProperties),
    /// Certificates.
    X509(TlsCredsX509Properties),
}

impl Properties {
    fn common(&mut self) -> &mut TlsCredsProperties {
        match self {
            Self::Anon(anon) => &mut anon.common,
            Self::Psk(psk) => &mut psk.common,
            Self::X509(x509) => &mut x509.common,
        }
    }
}

impl TlsCreds {
    /// Loads credentials.
    ///
    /// # Errors
    /// A file is missing or no good, or the priority is not understood.
    pub async fn load(
        properties: Properties,
        credentials: &Arc<Credentials>,
    ) -> Result<Self, Error> {
        let credentials = Arc::clone(credentials);
        blocking(move || {
            let loaded = match &properties {
                Properties::Anon(anon) => TlsCredentials::anonymous(anon)?,
                Properties::Psk(psk) => TlsCredentials::psk(psk)?,
                Properties::X509(x509) => TlsCredentials::x509(x509, &credentials)?,
            };
            Ok((Arc::new(loaded), properties))
        })
        .await
        .map(|(loaded, properties)| Self {
            loaded,
            properties: RefCell::new(properties),
        })
    }
}

impl Object for TlsCreds {
    fn class(&self) -> &'static Class {
        match &*self.properties.borrow() {
            Properties::Anon(_) => &ANON,
            Properties::Psk(_) => &PSK,
            Properties::X509(_) => &X509,
        }
    }

    fn get(&self, property: &str) -> Result<Value, Error> {
        let class = self.class();
        let mut properties = self.properties.borrow().clone();
        let text = |text: &Option<String>| text.as_deref().unwrap_or_default().into();
        Ok(match (property, &properties) {
            ("username", Properties::Psk(psk)) => text(&psk.username),
            ("sanity-check", Properties::X509(x509)) => x509.sanity_check.unwrap_or(true).into(),
            ("passwordid", Properties::X509(x509)) => text(&x509.passwordid),
            _ => {
                let common = properties.common();
                match property {
                    "endpoint" => to_json(&self.loaded.endpoint()),
                    "dir" => text(&common.dir),
                    "verify-peer" => common.verify_peer.unwrap_or(true).into(),
                    "priority" => text(&common.priority),
                    _ => return Err(unknown(class, property)),
                }
            }
        })
    }

    fn set(&self, property: &str, value: Value) -> Result<(), Error> {
        let class = self.class();
        let mut properties = self.properties.borrow_mut();
        match (property, &mut *properties) {
            ("username", Properties::Psk(psk)) => {
                psk.username = Some(from_json_member(property, value)?);
            }
            ("sanity-check", Properties::X509(x509)) => {
                x509.sanity_check = Some(from_json_member(property, value)?);
            }
            ("passwordid", Properties::X509(x509)) => {
                x509.passwordid = Some(from_json_member(property, value)?);
            }
            ("endpoint", _) => {
                let endpoint: QCryptoTLSCredsEndpoint = from_json_member(property, value)?;
                self.loaded.set_endpoint(endpoint);
            }
            ("dir", properties) => {
                properties.common().dir = Some(from_json_member(property, value)?);
            }
            ("verify-peer", properties) => {
                let verify_peer = from_json_member(property, value)?;
                properties.common().verify_peer = Some(verify_peer);
                self.loaded.set_verify_peer(verify_peer);
            }
            ("priority", properties) => {
                let priority: String = from_json_member(property, value)?;
                self.loaded.set_priority(&priority)?;
                properties.common().priority = Some(priority);
            }
            _ => return Err(unknown(class, property)),
        }
        Ok(())
    }

    fn credential(&self) -> Credential {
        Credential::Tls(Arc::clone(&self.loaded))
    }
}
