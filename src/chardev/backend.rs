//! What a character device is connected to, and what must be known of each kind of it.

use std::pin::Pin;

use serde_json::Value;

use super::Connection;
use super::ringbuf::Ringbuf;
use crate::objects::class::{Access, Class, Form, Property};

/// A connection to come; never, if the device has had its last.
pub type Connecting<'a> = Pin<Box<dyn Future<Output = Connection> + 'a>>;

/// What a character device is connected to.
pub trait Backend {
    /// The kind, as `chardev-add` names it.
    fn kind(&self) -> &'static str;

    /// What it is connected to, in the reference's notation.
    fn filename(&self) -> String {
        self.kind().to_owned()
    }

    /// The next connection for that user. Called again only after the user's last connection is
    /// dropped.
    fn connect(&self, user: usize) -> Connecting<'_>;

    /// How many users there can be.
    fn capacity(&self) -> usize {
        1
    }

    /// Whether it hands bytes on from and to other devices.
    fn is_shared(&self) -> bool {
        false
    }

    /// The number of users has changed.
    fn users_changed(&self, _users: usize) {}

    /// Sends a break, if there is such a thing.
    fn send_break(&self) {}

    /// The path of the pseudo terminal, if it is one.
    fn pty(&self) -> Option<String> {
        None
    }

    /// The buffer, if it is one.
    fn ringbuf(&self) -> Option<&Ringbuf> {
        None
    }

    /// The value of a property of its class.
    fn property(&self, _name: &str) -> Option<Value> {
        None
    }
}

const CHARDEV: Class = Class {
    name: "chardev",
    parent: Some("object"),
    form: Form::Abstract,
    properties: &[],
};

const FD: Class = Class {
    name: "chardev-fd",
    parent: Some("chardev"),
    form: Form::Abstract,
    properties: &[],
};

const SOCKET: Class = Class {
    name: "chardev-socket",
    parent: Some("chardev"),
    form: Form::Concrete,
    properties: &[
        Property::with_access("connected", "bool", Access::Read),
        Property::with_access("addr", "SocketAddress", Access::Read),
    ],
};

const fn plain(name: &'static str, parent: &'static str) -> Class {
    Class {
        name,
        parent: Some(parent),
        form: Form::Concrete,
        properties: &[],
    }
}

/// The types of character devices.
pub const CLASSES: &[&Class] = &[
    &CHARDEV,
    &FD,
    &SOCKET,
    &plain("chardev-file", "chardev-fd"),
    &plain("chardev-hub", "chardev"),
    &plain("chardev-memory", "chardev-ringbuf"),
    &plain("chardev-mux", "chardev"),
    &plain("chardev-null", "chardev"),
    &plain("chardev-parallel", "chardev"),
    &plain("chardev-pipe", "chardev-fd"),
    &plain("chardev-pty", "chardev"),
    &plain("chardev-ringbuf", "chardev"),
    &plain("chardev-serial", "chardev-fd"),
    &plain("chardev-stdio", "chardev-fd"),
    &plain("chardev-udp", "chardev"),
];

/// The type of devices of that kind.
pub fn class_of(kind: &str) -> &'static Class {
    let is_it = |class: &&&Class| class.name.strip_prefix("chardev-") == Some(kind);
    CLASSES.iter().find(is_it).unwrap_or(&&CHARDEV)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_type() {
        for kind in stord_qmp::chardev_opts::BACKENDS {
            assert_eq!(class_of(kind).name, format!("chardev-{kind}"));
        }
    }
}
