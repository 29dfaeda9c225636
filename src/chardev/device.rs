//! A character device and its users.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use stord_qmp::Error;

use super::log::Log;
use super::{Backend, Connection, class_of};
use crate::objects::class::Class;

/// A character device.
pub struct Chardev {
    id: String,
    backend: Box<dyn Backend>,
    log: Option<Log>,
    users: RefCell<BTreeSet<usize>>,
    open: Cell<usize>,
}

impl Chardev {
    /// A device without users.
    pub fn new(id: String, backend: Box<dyn Backend>, log: Option<Log>) -> Self {
        Self {
            id,
            backend,
            log,
            users: RefCell::default(),
            open: Cell::new(0),
        }
    }

    /// The device's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it is connected to.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Its type.
    pub fn class(&self) -> &'static Class {
        class_of(self.backend.kind())
    }

    /// Whether it hands bytes on from and to other devices.
    pub fn is_shared(&self) -> bool {
        self.backend.is_shared()
    }

    /// Whether it has a user.
    pub fn has_users(&self) -> bool {
        !self.users.borrow().is_empty()
    }

    /// Whether it has a user that is ready for bytes.
    pub fn is_open(&self) -> bool {
        self.open.get() > 0
    }

    /// Becomes a user of the device.
    ///
    /// # Errors
    /// It has as many as there can be.
    pub fn claim(self: &Rc<Self>) -> Result<User, Error> {
        let capacity = self.backend.capacity();
        let free = (0..capacity).find(|number| !self.users.borrow().contains(number));
        let number = free.ok_or_else(|| {
            let id = &self.id;
            Error::generic(match capacity {
                1 => format!("chardev '{id}' is already in use"),
                _ => format!("too many uses of multiplexed chardev '{id}' (maximum is {capacity})"),
            })
        })?;
        self.users.borrow_mut().insert(number);
        self.backend.users_changed(self.users.borrow().len());
        Ok(User {
            device: Rc::clone(self),
            number,
            open: Cell::new(false),
        })
    }
}

/// The use of a device, until dropped.
pub struct User {
    device: Rc<Chardev>,
    number: usize,
    open: Cell<bool>,
}

impl User {
    /// The device.
    pub fn device(&self) -> &Chardev {
        &self.device
    }

    /// Says whether the user is ready for bytes. It is not at first.
    pub fn set_open(&self, open: bool) {
        let was_open = self.open.replace(open);
        let count = &self.device.open;
        count.set(count.get() + usize::from(open) - usize::from(was_open));
    }

    /// The next connection; never, if the device has had its last. Call it again only after the
    /// last connection is dropped.
    pub async fn connect(&self) -> Connection {
        let connection = self.device.backend.connect(self.number).await;
        match &self.device.log {
            Some(log) => log.watch(connection),
            None => connection,
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.set_open(false);
        let mut users = self.device.users.borrow_mut();
        users.remove(&self.number);
        self.device.backend.users_changed(users.len());
    }
}
