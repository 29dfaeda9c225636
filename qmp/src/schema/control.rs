//! The protocol's own commands.

use crate::Qapi;

/// Arguments of `qmp_capabilities`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct QmpCapabilities {
    /// The capabilities to switch on; default none.
    pub enable: Option<Vec<QmpCapability>>,
}

/// A capability of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum QmpCapability {
    /// Commands may be executed out of band.
    Oob,
}

/// The version, as the greeting and `query-version` report it.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct VersionInfo {
    /// The version of the interface, which clients compare with QEMU's.
    pub qemu: VersionTriple,
    /// What the software calls itself.
    pub package: String,
}

/// A version in three parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub struct VersionTriple {
    /// The first part.
    pub major: i64,
    /// The second part.
    pub minor: i64,
    /// The third part.
    pub micro: i64,
}

/// A command, as `query-commands` reports it.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct CommandInfo {
    /// The name.
    pub name: String,
}
