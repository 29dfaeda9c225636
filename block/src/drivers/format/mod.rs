//! Formats: maps from guest offsets to extents, and the guess which format an image has.

pub mod qcow2;
pub mod raw;

use std::sync::Arc;

use stord_aio::{Errno, IoBuffer};

use crate::graph::Node;
use crate::io;

/// Formats that can be told by their first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probed {
    /// The bytes are those of no format known here: a raw image, for all that can be told.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

impl Probed {
    /// The driver's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// Tells the format by the image's first bytes.
    pub fn of(first: &[u8]) -> Self {
        match first {
            [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 2..=3, ..] => Self::Qcow2,
            _ => Self::Raw,
        }
    }
}

/// Guesses the format of what `node` holds. Whoever can write to a raw image can make it look like another format, so a guess is good
/// for images that are only read, and otherwise needs a word to the user.
pub(crate) async fn probe(node: &Arc<Node>) -> Result<Probed, Errno> {
    let buffer = IoBuffer::zeroed(512);
    io::read(node, 0, buffer.clone().into()).await?;
    Ok(Probed::of(&buffer.to_vec()))
}
