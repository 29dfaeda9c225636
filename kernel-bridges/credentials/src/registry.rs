//! Finds credentials by the id of their object, from any thread. An object that is deleted stays
//! with those who have found it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use stord_qmp::Error;
use stord_qmp::schema::object::QCryptoTLSCredsEndpoint;

use crate::{Authorization, Secret, TlsCredentials};

/// Every object by its id, and what of it is a credential.
#[derive(Default)]
pub struct Credentials {
    by_id: RwLock<BTreeMap<String, Credential>>,
}

/// What an object is to those who look for credentials.
#[derive(Clone)]
pub enum Credential {
    /// Bytes to be kept secret; none while they are still being loaded.
    Secret(Option<Arc<Secret>>),
    /// A rule about who may come in.
    Authorization(Arc<dyn Authorization>),
    /// TLS credentials.
    Tls(Arc<TlsCredentials>),
    /// Nothing of the kind.
    Other,
}

impl Credentials {
    /// Makes an object known, in place of one of the same id.
    pub fn insert(&self, id: &str, credential: Credential) {
        let mut by_id = self.by_id.write().unwrap_or_else(PoisonError::into_inner);
        by_id.insert(id.to_owned(), credential);
    }

    /// Forgets an object.
    pub fn remove(&self, id: &str) {
        let mut by_id = self.by_id.write().unwrap_or_else(PoisonError::into_inner);
        by_id.remove(id);
    }

    /// The secret of that id.
    ///
    /// # Errors
    /// There is no such object, it is no secret, or it is not loaded yet.
    pub fn secret(&self, id: &str) -> Result<Arc<Secret>, Error> {
        match self.find(id) {
            None => Err(Error::generic(format!("No secret with id '{id}'"))),
            Some(Credential::Secret(Some(secret))) => Ok(secret),
            Some(Credential::Secret(None)) => {
                Err(Error::generic(format!("Secret with id '{id}' has no data")))
            }
            Some(_) => Err(Error::generic(format!(
                "Object with id '{id}' is not a secret"
            ))),
        }
    }

    /// The secret of that id as text.
    ///
    /// # Errors
    /// As [`secret`](Self::secret), or it is no UTF-8.
    pub fn secret_text(&self, id: &str) -> Result<String, Error> {
        let secret = self.secret(id)?;
        match std::str::from_utf8(secret.bytes()) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(Error::generic(format!(
                "Data from secret {id} is not valid UTF-8"
            ))),
        }
    }

    /// The rule of that id.
    ///
    /// # Errors
    /// There is no such object, or it is no rule.
    pub fn authorization(&self, id: &str) -> Result<Arc<dyn Authorization>, Error> {
        match self.find(id) {
            None => Err(Error::generic(format!("Cannot find object ID {id}"))),
            Some(Credential::Authorization(rule)) => Ok(rule),
            Some(_) => Err(Error::generic(format!(
                "Object '{id}' is not a QAuthZ subclass"
            ))),
        }
    }

    /// The TLS credentials of that id, for that side of connections.
    ///
    /// # Errors
    /// There is no such object, it is something else, or for the other side.
    pub fn tls(
        &self,
        id: &str,
        endpoint: QCryptoTLSCredsEndpoint,
    ) -> Result<Arc<TlsCredentials>, Error> {
        match self.find(id) {
            None => Err(Error::generic(format!("No TLS credentials with id '{id}'"))),
            Some(Credential::Tls(credentials)) => {
                credentials.expect(endpoint)?;
                Ok(credentials)
            }
            Some(_) => Err(Error::generic(format!(
                "Object with id '{id}' is not TLS credentials"
            ))),
        }
    }

    fn find(&self, id: &str) -> Option<Credential> {
        let by_id = self.by_id.read().unwrap_or_else(PoisonError::into_inner);
        by_id.get(id).cloned()
    }
}
