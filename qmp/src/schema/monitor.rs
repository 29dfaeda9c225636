//! Monitors: where QMP is spoken.

use crate::Qapi;

/// What `--monitor` creates.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct MonitorOptions {
    /// The monitor's id; default made up.
    pub id: Option<String>,
    /// The protocol; default `control`.
    pub mode: Option<MonitorMode>,
    /// Whether replies are laid out for people; default off.
    pub pretty: Option<bool>,
    /// The character device it talks on.
    pub chardev: String,
}

/// The protocol of a monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum MonitorMode {
    /// Commands for people, which only QEMU itself has.
    Readline,
    /// QMP.
    Control,
}
