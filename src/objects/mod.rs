//! Objects that users make, found by their ids. Every property that is accepted has an effect, and
//! every object can be looked at and changed through the tree of objects.

mod authz_list;
mod authz_list_file;
mod authz_simple;
pub mod class;
mod event_loop;
pub mod help;
mod iothread;
mod main_loop;
mod secret;
mod secret_keyring;
mod thread_context;
mod tls_creds;
pub mod tree;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use serde_json::Value;
use stord_block::Contexts;
use stord_credentials::{Credential, Credentials};
use stord_qmp::schema::object::{ObjectKind, ObjectOptions};
use stord_qmp::{Error, identifier};

use class::Class;

/// An object that exists.
trait Object {
    /// Its type.
    fn class(&self) -> &'static Class;

    /// The value of a property of its type that can be read.
    ///
    /// # Errors
    /// The value cannot be had.
    fn get(&self, property: &str) -> Result<Value, Error>;

    /// Changes a property of its type that can be written.
    ///
    /// # Errors
    /// The value is of the wrong type or out of range; nothing has changed then.
    fn set(&self, property: &str, value: Value) -> Result<(), Error>;

    /// Ends what the object does, before it is dropped.
    ///
    /// # Errors
    /// It is in use, and stays.
    fn close(&self) -> Result<(), Error> {
        Ok(())
    }

    /// What it is to those who look for credentials.
    fn credential(&self) -> Credential {
        Credential::Other
    }
}

/// The objects that exist.
pub struct Objects {
    contexts: Rc<Contexts>,
    credentials: Arc<Credentials>,
    by_id: RefCell<BTreeMap<String, Rc<dyn Object>>>,
    /// The ids of those that are being made.
    pending: RefCell<BTreeSet<String>>,
}

impl Objects {
    /// No objects.
    pub fn new(contexts: Rc<Contexts>) -> Self {
        Self {
            contexts,
            credentials: Arc::default(),
            by_id: RefCell::default(),
            pending: RefCell::default(),
        }
    }

    /// What of the objects is for those who look for credentials.
    pub fn credentials(&self) -> &Arc<Credentials> {
        &self.credentials
    }

    /// Makes an object.
    ///
    /// # Errors
    /// Its id is taken or no identifier, a property is out of range, or it cannot be made.
    pub async fn add(&self, options: ObjectOptions) -> Result<(), Error> {
        let ObjectOptions { id, kind } = options;
        identifier::check("id", &id)?;
        let taken = id == "type"
            || self.by_id.borrow().contains_key(&id)
            || !self.pending.borrow_mut().insert(id.clone());
        if taken {
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        let made = self.make(&id, kind).await;
        self.pending.borrow_mut().remove(&id);
        match made {
            Ok(object) => {
                self.credentials.insert(&id, object.credential());
                self.by_id.borrow_mut().insert(id, object);
                Ok(())
            }
            Err(error) => {
                self.credentials.remove(&id);
                Err(error)
            }
        }
    }

    /// Removes an object.
    ///
    /// # Errors
    /// There is none of that id, or it is in use.
    pub fn del(&self, id: &str) -> Result<(), Error> {
        let object = self.by_id.borrow().get(id).cloned();
        let object = object.ok_or_else(|| Error::generic(format!("object '{id}' not found")))?;
        object.close()?;
        self.credentials.remove(id);
        self.by_id.borrow_mut().remove(id);
        Ok(())
    }

    /// Every object with its id, by id.
    fn all(&self) -> Vec<(String, Rc<dyn Object>)> {
        let by_id = self.by_id.borrow();
        let entries = by_id.iter();
        entries
            .map(|(id, object)| (id.clone(), Rc::clone(object)))
            .collect()
    }

    async fn make(&self, id: &str, kind: ObjectKind) -> Result<Rc<dyn Object>, Error> {
        Ok(match kind {
            ObjectKind::AuthzList(properties) => Rc::new(authz_list::AuthzList::new(properties)),
            ObjectKind::AuthzListFile(properties) | ObjectKind::AuthzListfile(properties) => {
                Rc::new(authz_list_file::AuthzListFile::open(properties).await?)
            }
            ObjectKind::AuthzSimple(properties) => {
                Rc::new(authz_simple::AuthzSimple::new(properties))
            }
            ObjectKind::Iothread(properties) => {
                Rc::new(iothread::Iothread::start(id, &properties, &self.contexts)?)
            }
            ObjectKind::MainLoop(properties) => {
                let is_main_loop =
                    |object: &Rc<dyn Object>| object.class().name == main_loop::CLASS.name;
                if self.by_id.borrow().values().any(is_main_loop) {
                    return Err(Error::generic("only one main-loop instance allowed"));
                }
                Rc::new(main_loop::MainLoop::new(id, &properties, &self.contexts)?)
            }
            ObjectKind::Secret(properties) => {
                self.credentials.insert(id, Credential::Secret(None));
                Rc::new(secret::SecretObject::load(properties, &self.credentials).await?)
            }
            ObjectKind::SecretKeyring(properties) => {
                self.credentials.insert(id, Credential::Secret(None));
                Rc::new(secret_keyring::SecretKeyring::load(
                    properties,
                    &self.credentials,
                )?)
            }
            ObjectKind::ThreadContext(properties) => {
                Rc::new(thread_context::ThreadContext::start(id, &properties)?)
            }
            ObjectKind::TlsCredsAnon(properties) => {
                self.tls(tls_creds::Properties::Anon(properties)).await?
            }
            ObjectKind::TlsCredsPsk(properties) => {
                self.tls(tls_creds::Properties::Psk(properties)).await?
            }
            ObjectKind::TlsCredsX509(properties) => {
                self.tls(tls_creds::Properties::X509(properties)).await?
            }
        })
    }

    async fn tls(&self, properties: tls_creds::Properties) -> Result<Rc<dyn Object>, Error> {
        let loaded = tls_creds::TlsCreds::load(properties, &self.credentials).await?;
        Ok(Rc::new(loaded))
    }
}

/// Runs what may block on a thread where it may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let result = tokio::task::spawn_blocking(work).await;
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}

/// The value of a property that its type lists and the object does not know: a mistake of ours.
fn unknown(class: &Class, property: &str) -> Error {
    let class = class.name;
    Error::generic(format!("Property '{class}.{property}' not found"))
}
