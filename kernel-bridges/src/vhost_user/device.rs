//! The disk that an export shows, whoever its front end is. On the control thread.

use std::rc::Rc;
use std::sync::Arc;

use stord_aio::Context;
use stord_aio::sync::watch;

use crate::virtio::blk::disk::Disk;

/// A disk and where its queues are served.
pub(super) struct Device {
    id: String,
    disk: Arc<Disk>,
    queues: u16,
    /// For the queues in turn.
    contexts: Vec<Context>,
    resizes: watch::Receiver<()>,
}

impl Device {
    /// A disk for the export of that id; there is a context at least.
    pub(super) fn new(id: &str, disk: Arc<Disk>, queues: u16, contexts: Vec<Context>) -> Rc<Self> {
        let (changed, resizes) = watch::channel(());
        disk.on_resize(move |_| {
            // The device hears of it as long as it is there.
            let _ = changed.send(());
        });
        Rc::new(Self {
            id: id.to_owned(),
            disk,
            queues,
            contexts,
            resizes,
        })
    }

    /// The export's id, for messages.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    pub(super) fn queues(&self) -> u16 {
        self.queues
    }

    /// The context of a queue.
    pub(super) fn context(&self, queue: u16) -> &Context {
        let place = usize::from(queue) % self.contexts.len();
        &self.contexts[place]
    }

    /// Changes whenever the disk has another length, beginning now.
    pub(super) fn resizes(&self) -> watch::Receiver<()> {
        let mut resizes = self.resizes.clone();
        resizes.mark_unchanged();
        resizes
    }

    /// Bytes of the configuration space; those that a disk does not have are zero.
    pub(super) fn config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.disk.config();
        let bytes = config.iter().copied().chain(std::iter::repeat(0));
        let skipped = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(config.len());
        let count = usize::try_from(size).unwrap_or(0);
        bytes.skip(skipped).take(count).collect()
    }
}
