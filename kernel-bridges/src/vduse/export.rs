//! The life of a VDUSE export.
//!
//! Down: off the vdpa bus while the device is still served, so that its driver can write out what it has; then the queues stop, the
//! device is closed and removed. Where the kernel keeps using the device, it stays, with its users waiting, for the next daemon that
//! exports the same image under the same name; and so it does when this process dies.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use stord_aio::pool;
use stord_aio::sync::{mpsc, watch};
use stord_qmp::Error;
use vduse::{Control, DeviceName, vdpa};

use super::bus;
use super::claim::{Claim, claim};
use super::control::Controller;
use super::queues::Queues;
use super::record::Description;
use crate::export::{Ended, Export, LocalFuture, Parts};
use crate::virtio::blk::disk::{Disk, DiskOptions};

/// A queue's thread may keep the device open for so long after the queue has ended.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(10);

/// What a VDUSE export is to be.
pub(crate) struct VduseOptions {
    pub(crate) name: DeviceName,
    /// What the image is called, to know it again.
    pub(crate) image: String,
    pub(crate) queues: u16,
    /// A power of two.
    pub(crate) queue_size: u16,
    /// In bytes, a power of two from 512.
    pub(crate) logical_block_size: u32,
    pub(crate) serial: String,
    /// Whether the device goes on the vdpa bus, and off it at the end.
    pub(crate) attach: bool,
}

/// A VDUSE export.
pub(crate) struct VduseExport {
    name: DeviceName,
    attach: bool,
    /// `None` at its end.
    controller: RefCell<Option<Rc<Controller>>>,
    /// True when messages are answered no more.
    ending: watch::Sender<bool>,
    /// True when the export has ended.
    ended: watch::Sender<bool>,
    /// Users are to be cut off.
    forced: Cell<bool>,
}

impl VduseExport {
    /// Makes the device, or adopts it, and serves it. The second result resolves when the export has been shut down.
    ///
    /// # Errors
    /// The kernel has no VDUSE, the device is another's, or is not what is asked for.
    pub(crate) async fn start(
        options: VduseOptions,
        parts: Parts,
    ) -> Result<(Rc<Self>, Ended), Error> {
        let description = Description {
            image: options.image,
            size: parts.backend.size(),
            queues: options.queues,
            queue_size: options.queue_size,
            logical_block_size: options.logical_block_size,
            serial: options.serial.clone(),
            writable: parts.writable,
        };
        let disk = Disk::new(
            parts.backend,
            DiskOptions {
                writable: parts.writable,
                writethrough: parts.writethrough,
                logical_block_size: options.logical_block_size,
                serial: options.serial,
                queues: options.queues,
                // A request has a header and a status besides.
                seg_max: u32::from(options.queue_size).saturating_sub(2).max(1),
            },
        );
        let claimed = {
            let (name, disk) = (options.name.clone(), Arc::clone(&disk));
            let description = description.clone();
            pool::run(move || claim(&name, &description, &disk)).await?
        };
        let Claim {
            device,
            record,
            queues,
            adopted,
        } = claimed;
        let (resized, resizes) = mpsc::unbounded_channel();
        disk.on_resize(move |size| {
            // Nobody hears of it at the end.
            let _ = resized.send(size);
        });
        let queues = Queues::new(
            Arc::clone(&device),
            Arc::clone(&disk),
            parts.contexts,
            queues,
            options.queue_size,
        );
        let controller = Controller::new(device, disk, queues, record, description);
        let (ending, _) = watch::channel(false);
        let (ended, _) = watch::channel(false);
        let export = Rc::new(Self {
            name: options.name,
            attach: options.attach,
            controller: RefCell::new(Some(Rc::clone(&controller))),
            ending,
            ended,
            forced: Cell::new(false),
        });
        let resumed = match &adopted {
            Some(adopted) => controller.resume(adopted),
            None => Ok(()),
        };
        let ended = export.serve(controller, resizes);
        let started = match resumed {
            Err(error) => Err(super::claim::failed(Error::reason(&error))),
            Ok(()) if adopted.is_some() => {
                tracing::info!(device = %export.name, "goes on where a daemon stopped");
                Ok(())
            }
            Ok(()) => Ok(()),
        };
        let started = match started {
            Ok(()) if export.attach => bus::attach(&export.name).await.map(drop),
            started => started,
        };
        if let Err(error) = started {
            export.shut_down().await;
            ended.await;
            export.finish().await;
            return Err(error);
        }
        Ok((export, ended))
    }

    /// Answers messages from now on, and gives what resolves at the end.
    fn serve(&self, controller: Rc<Controller>, resizes: mpsc::UnboundedReceiver<u64>) -> Ended {
        let service = controller.serve(resizes, self.ending.subscribe());
        let name = self.name.clone();
        let service = tokio::task::spawn_local(async move {
            if let Err(error) = service.await {
                tracing::error!(%error, device = %name, "the device's messages cannot be read");
            }
        });
        let mut ended = self.ended.subscribe();
        Box::pin(async move {
            let _ = ended.wait_for(|ended| *ended).await;
            let _ = service.await;
        })
    }

    /// Whether the device is to go off the bus.
    async fn is_to_be_detached(&self) -> bool {
        if !vdpa::is_present(&self.name) {
            return false;
        }
        if self.forced.get() {
            return true;
        }
        self.attach && !bus::is_disk_in_use(&self.name).await
    }
}

impl Export for VduseExport {
    fn device(&self) -> Option<String> {
        bus::disk(&self.name)
    }

    /// As long as the device is on the bus, unless it was put there by us and nobody has mounted it.
    fn is_in_use(&self) -> LocalFuture<'_, bool> {
        Box::pin(async {
            vdpa::is_present(&self.name) && (!self.attach || bus::is_disk_in_use(&self.name).await)
        })
    }

    fn force(&self) {
        self.forced.set(true);
    }

    fn shut_down(&self) -> LocalFuture<'_> {
        Box::pin(async {
            if self.is_to_be_detached().await
                && let Err(error) = bus::detach(&self.name).await
            {
                tracing::warn!(%error, device = %self.name, "the device stays on the vdpa bus");
            }
            let controller = self.controller.borrow().clone();
            if let Some(controller) = controller {
                controller.queues().keep_kicks();
                controller.queues().stop().await;
                controller.at_rest().await;
            }
            self.ending.send_replace(true);
            self.ended.send_replace(true);
        })
    }

    fn finish(&self) -> LocalFuture<'_> {
        Box::pin(async {
            let Some(controller) = self.controller.take() else {
                return;
            };
            let record = controller.take_record();
            // Closes the device, unless a reset still waits for requests.
            drop(controller);
            let name = self.name.clone();
            pool::run(move || {
                match (destroy(&name), record) {
                    (Ok(()), Some(record)) => record.remove(),
                    (Ok(()), None) => {}
                    (Err(_), _) => tracing::warn!(
                        device = %name,
                        "the kernel still uses the device: whoever uses it waits for a daemon that exports the image again; 'vdpa dev del' needs one, too"
                    ),
                }
            })
            .await;
        })
    }
}

/// Removes the device, which nobody here has open any more, or will not in a moment.
fn destroy(name: &DeviceName) -> io::Result<()> {
    let control = Control::open()?;
    let mut left = PATIENCE.as_millis() / PAUSE.as_millis();
    loop {
        match control.destroy(name) {
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy
                    && left > 0
                    && !vdpa::is_present(name) =>
            {
                left -= 1;
                std::thread::sleep(PAUSE);
            }
            destroyed => return destroyed,
        }
    }
}
