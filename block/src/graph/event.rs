//! What the block layer has to tell the user by itself, from whatever thread.

use stord_aio::sync::mpsc;

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
