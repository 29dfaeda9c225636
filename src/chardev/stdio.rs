//! The device that is the daemon's standard input and output. Reading and writing happens on
//! threads that may block, so that the mode of descriptors shared with other processes is left
//! alone.
//!
//! A terminal is switched to give each byte at once and not to echo, as the reference does, so
//! that programs that drive the daemon through a pseudo terminal see its replies only. Its mode is
//! restored when the device goes.

use std::cell::Cell;
use std::io;

use nix::sys::termios::{
    InputFlags, LocalFlags, OutputFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr,
    tcsetattr,
};
use stord_qmp::schema::chardev::ChardevStdio;

use super::backend::Connecting;
use super::file::once;
use super::{Backend, Connection};

/// Standard input and output.
pub struct Stdio {
    connection: Cell<Option<Connection>>,
    terminal: Option<Termios>,
}

impl Stdio {
    /// Takes standard input and output over.
    pub fn open(options: &ChardevStdio) -> Self {
        Self {
            connection: Cell::new(Some(Connection {
                reader: Box::new(tokio::io::stdin()),
                writer: Box::new(tokio::io::stdout()),
            })),
            terminal: set_terminal(options.signal.unwrap_or(true)),
        }
    }
}

impl Backend for Stdio {
    fn kind(&self) -> &'static str {
        "stdio"
    }

    fn connect(&self, _: usize) -> Connecting<'_> {
        Box::pin(once(&self.connection))
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        if let Some(found) = &self.terminal {
            // The terminal may be gone.
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, found);
        }
    }
}

/// Switches the terminal that standard input may be, and returns the mode it had.
fn set_terminal(signal: bool) -> Option<Termios> {
    let found = tcgetattr(io::stdin()).ok()?;
    let mut raw = found.clone();
    raw.input_flags -= InputFlags::IGNBRK
        | InputFlags::BRKINT
        | InputFlags::PARMRK
        | InputFlags::ISTRIP
        | InputFlags::INLCR
        | InputFlags::IGNCR
        | InputFlags::ICRNL
        | InputFlags::IXON;
    raw.output_flags |= OutputFlags::OPOST;
    raw.local_flags -=
        LocalFlags::ECHO | LocalFlags::ECHONL | LocalFlags::ICANON | LocalFlags::IEXTEN;
    if !signal {
        raw.local_flags -= LocalFlags::ISIG;
    }
    raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
    raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
    tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).ok()?;
    Some(found)
}
