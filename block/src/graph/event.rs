//! What the block layer has to tell the user by itself, from whatever thread.

use std::ops::Range;

use stord_aio::sync::mpsc;

use crate::backend::Failures;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockEvent {
    /// A write passed a node's threshold, which is off now.
    WriteThreshold {
        /// The node.
        node_name: String,
        /// The threshold, in bytes.
        threshold: u64,
        /// By how many bytes the write passed it.
        exceeded: u64,
    },
    /// An image was found to be corrupt.
    ImageCorrupted {
        /// The node.
        node_name: String,
        /// What was found.
        message: String,
        /// The bytes of the image file that it is about.
        place: Option<Range<u64>>,
        /// The image is of no more use.
        fatal: bool,
    },
    /// A request failed whose user wants that told.
    Failed(Failures),
}

/// Where events go; clones lead to the same receiver.
#[derive(Clone, Default)]
pub(crate) struct Events(Option<mpsc::UnboundedSender<BlockEvent>>);

impl Events {
    pub(super) fn channel() -> (Self, mpsc::UnboundedReceiver<BlockEvent>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(Some(sender)), receiver)
    }

    /// Tells of an event. Without anybody to hear it, it is lost.
    pub(crate) fn send(&self, event: BlockEvent) {
        if let Some(sender) = &self.0 {
            let _ = sender.send(event);
        }
    }
}

/// With this a driver tells of what it finds in its node's image.
#[derive(Clone, Default)]
pub struct Reporter {
    node_name: String,
    events: Events,
}

impl Reporter {
    pub(super) fn new(node_name: &str, events: Events) -> Self {
        Self {
            node_name: node_name.to_owned(),
            events,
        }
    }

    /// The image is corrupt.
    pub(crate) fn image_corrupted(&self, message: &str, place: Option<Range<u64>>, fatal: bool) {
        self.events.send(BlockEvent::ImageCorrupted {
            node_name: self.node_name.clone(),
            message: message.to_owned(),
            place,
            fatal,
        });
    }
}
