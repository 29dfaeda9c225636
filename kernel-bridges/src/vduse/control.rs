//! The kernel's messages to a device, and what a change of the disk means for it. On the control thread.
//!
//! Every message is answered at once, but those that need the queues to be at rest: a reset, and the question for a queue's position.
//! These wait for requests under way, and other messages are answered meanwhile.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use stord_aio::sync::{mpsc, watch};
use stord_sockets::Polled;
use tokio::io::Interest;
use vduse::{Device, Message, MessageId, QueueState, Request, Response, STATUS_DRIVER_OK};

use super::claim::Adopted;
use super::queues::Queues;
use super::record::{Description, Record};
use crate::virtio::blk::disk::Disk;

/// A reset that requests hold up for longer is answered as failed. The kernel waits for 30 seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// Of one device.
pub(super) struct Controller {
    device: Arc<Device>,
    disk: Arc<Disk>,
    queues: Queues,
    record: RefCell<Option<Record>>,
    description: RefCell<Description>,
    /// Resets that have not ended.
    resetting: watch::Sender<usize>,
}

impl Controller {
    pub(super) fn new(
        device: Arc<Device>,
        disk: Arc<Disk>,
        queues: Queues,
        record: Record,
        description: Description,
    ) -> Rc<Self> {
        let (resetting, _) = watch::channel(0);
        Rc::new(Self {
            device,
            disk,
            queues,
            record: RefCell::new(Some(record)),
            description: RefCell::new(description),
            resetting,
        })
    }

    pub(super) fn queues(&self) -> &Queues {
        &self.queues
    }

    /// Returns when no reset is under way.
    pub(super) async fn at_rest(&self) {
        // The sender lives as long as this.
        let _ = self
            .resetting
            .subscribe()
            .wait_for(|count| *count == 0)
            .await;
    }

    /// Gives up the record, when the device is at its end.
    pub(super) fn take_record(&self) -> Option<Record> {
        self.record.take()
    }

    /// Goes on where a dead daemon stopped: with the driver that there is, if there is one.
    ///
    /// # Errors
    /// The queues cannot be served.
    pub(super) fn resume(&self, adopted: &Adopted) -> io::Result<()> {
        if self.device.features()? == 0 {
            // No driver has chosen its features yet: it will.
            return Ok(());
        }
        self.queues.start(Some(&adopted.starts))?;
        if adopted.is_resized {
            self.update_config();
        }
        Ok(())
    }

    /// Answers messages until told to end, or until the kernel has given the device up.
    pub(super) async fn serve(
        self: Rc<Self>,
        mut resizes: mpsc::UnboundedReceiver<u64>,
        mut ending: watch::Receiver<bool>,
    ) -> io::Result<()> {
        let polled = Polled::new(Arc::clone(&self.device), Interest::READABLE)?;
        loop {
            let message = std::future::poll_fn(|cx| {
                polled.poll_read(cx, |device| match device.read_message() {
                    Ok(Some(message)) => Ok(Some(message)),
                    Ok(None) if device.is_broken()? => Ok(None),
                    Ok(None) => Err(io::ErrorKind::WouldBlock.into()),
                    Err(error) => Err(error),
                })
            });
            tokio::select! {
                biased;
                _ = ending.wait_for(|ending| *ending) => return Ok(()),
                Some(_) = resizes.recv() => self.resized(),
                message = message => match message? {
                    Some(message) => self.answer(message),
                    None => {
                        tracing::error!(
                            device = %self.device.name(),
                            "the kernel has given the device up: its users get no more answers"
                        );
                        return Ok(());
                    }
                },
            }
        }
    }

    fn answer(self: &Rc<Self>, message: Message) {
        let Message { id, request } = message;
        tracing::debug!(device = %self.device.name(), ?request, "message of the kernel");
        match request {
            Request::SetStatus(0) => self.reset(id),
            Request::SetStatus(status) => self.set_status(id, status),
            Request::UpdateIotlb { .. } => {
                self.queues.forget_memory();
                self.respond(id, Response::Done);
            }
            Request::GetQueueState { queue } => self.tell_position(id, queue),
            Request::Unknown(_) => self.respond(id, Response::Failed),
        }
    }

    fn respond(&self, id: MessageId, response: Response) {
        if let Err(error) = self.device.respond(id, response) {
            // The kernel does not wait for it any more.
            tracing::warn!(%error, device = %self.device.name(), ?response, "an answer came too late");
        }
    }

    fn set_status(self: &Rc<Self>, id: MessageId, status: u8) {
        if *self.resetting.borrow() > 0 {
            // Requests of the time before would get in the way of those of the new driver.
            self.respond(id, Response::Failed);
            return;
        }
        self.respond(id, Response::Done);
        // The kernel takes interrupts from now on, so not before the answer.
        if status & STATUS_DRIVER_OK != 0
            && let Err(error) = self.queues.start(None)
        {
            tracing::error!(%error, device = %self.device.name(), "a queue cannot be served");
        }
    }

    fn reset(self: &Rc<Self>, id: MessageId) {
        self.resetting.send_modify(|count| *count += 1);
        let this = Rc::clone(self);
        let stopped = async move {
            this.queues.stop().await;
            this.queues.reset();
            this.resetting.send_modify(|count| *count -= 1);
        };
        let this = Rc::clone(self);
        let mut stopping = tokio::task::spawn_local(stopped);
        tokio::task::spawn_local(async move {
            let response = match tokio::time::timeout(PATIENCE, &mut stopping).await {
                Ok(_) => Response::Done,
                Err(_) => {
                    tracing::error!(
                        device = %this.device.name(),
                        "a reset waits for requests that do not end: the device takes no driver until they have"
                    );
                    Response::Failed
                }
            };
            this.respond(id, response);
        });
    }

    fn tell_position(self: &Rc<Self>, id: MessageId, queue: u32) {
        let this = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let position = async {
                let index = u16::try_from(queue).map_err(|_| io::ErrorKind::InvalidInput)?;
                this.queues.position(index).await
            };
            let response = match tokio::time::timeout(PATIENCE, position).await {
                Ok(Ok(next_available)) => {
                    Response::QueueState(QueueState::Split { next_available })
                }
                _ => Response::Failed,
            };
            this.respond(id, response);
        });
    }

    /// The disk has another length.
    fn resized(&self) {
        self.update_config();
        let mut description = self.description.borrow_mut();
        description.size = self.disk.backend().size();
        if let Some(record) = &*self.record.borrow()
            && let Err(error) = record.describe(&description)
        {
            tracing::warn!(%error, device = %self.device.name(), "the new size is not noted");
        }
    }

    fn update_config(&self) {
        if let Err(error) = self.device.set_config(0, &self.disk.config()) {
            tracing::error!(%error, device = %self.device.name(), "the driver does not hear of the disk's new length");
        }
        // Refused where there is no driver: it has nothing to be told then.
        let _ = self.device.inject_config_interrupt();
    }
}
