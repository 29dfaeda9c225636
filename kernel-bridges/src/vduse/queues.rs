//! The queues of a device while it has a driver that is ready: each is served on a context of its own, as far as there are so many.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use stord_aio::Context;
use vduse::{Device, QueueState};

use super::memory::DriverMemory;
use crate::virtio::blk::disk::Disk;
use crate::virtio::blk::queue::{Notify, Queue, QueueSetup};
use crate::virtio::in_flight::InFlight;
use crate::virtio::ring::split::Place;

/// What the queues are made of, and those that run.
pub(super) struct Queues {
    device: Arc<Device>,
    disk: Arc<Disk>,
    memory: Arc<DriverMemory>,
    contexts: Vec<Context>,
    records: Vec<InFlight>,
    most_entries: u16,
    /// By number; `None` where a queue does not run.
    running: RefCell<Vec<Option<Queue>>>,
}

/// The driver is notified by an interrupt of the queue.
struct Interrupt {
    device: Arc<Device>,
    queue: u16,
}

impl Notify for Interrupt {
    fn notify(&self) {
        if let Err(error) = self.device.inject_interrupt(self.queue.into()) {
            // It has been reset meanwhile.
            tracing::debug!(%error, queue = self.queue, "no interrupt");
        }
    }
}

impl Queues {
    pub(super) fn new(
        device: Arc<Device>,
        disk: Arc<Disk>,
        contexts: Vec<Context>,
        records: Vec<InFlight>,
        most_entries: u16,
    ) -> Self {
        let running = records.iter().map(|_| None).collect();
        Self {
            memory: DriverMemory::new(Arc::clone(&device)),
            device,
            disk,
            contexts,
            records,
            most_entries,
            running: RefCell::new(running),
        }
    }

    /// Forgets what is known of the driver's memory.
    pub(super) fn forget_memory(&self) {
        self.memory.forget();
    }

    /// Starts every queue that the driver has set up and that does not run. `starts` says where to go on in queues that were served
    /// before.
    ///
    /// # Errors
    /// A queue cannot work as it is set up, or there are no descriptors left. Some may run then.
    pub(super) fn start(&self, starts: Option<&[u16]>) -> io::Result<()> {
        let features = self.device.features()?;
        for index in 0..u16::try_from(self.records.len()).unwrap_or(u16::MAX) {
            let start = starts.and_then(|starts| starts.get(usize::from(index)).copied());
            self.start_one(index, features, start)?;
        }
        Ok(())
    }

    fn start_one(&self, index: u16, features: u64, start: Option<u16>) -> io::Result<()> {
        let at = usize::from(index);
        if self.running.borrow()[at].is_some() {
            return Ok(());
        }
        let info = self.device.queue_info(index.into())?;
        if !info.ready {
            return Ok(());
        }
        let size = u16::try_from(info.size).unwrap_or(0);
        let QueueState::Split { next_available } = info.state else {
            return Err(io::Error::other("a packed queue, which was not offered"));
        };
        if !size.is_power_of_two() || size > self.most_entries {
            return Err(io::Error::other("a queue of another size than was offered"));
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let kick = EventFd::from_flags(flags)?;
        let setup = QueueSetup {
            index,
            disk: Arc::clone(&self.disk),
            memory: {
                let memory = Arc::clone(&self.memory);
                move || memory.local()
            },
            place: Place {
                descriptors: info.descriptors,
                available: info.driver_area,
                used: info.device_area,
                size,
            },
            next_available: start.unwrap_or(next_available),
            features,
            call: Box::new(Interrupt {
                device: Arc::clone(&self.device),
                queue: index,
            }),
            in_flight: Some(self.records[at].clone()),
            // It is in the log, and there is nobody else to tell.
            on_broken: Box::new(|_| {}),
            kick: {
                use std::os::fd::AsFd as _;
                self.device.set_kick(index.into(), Some(kick.as_fd()))?;
                kick.into()
            },
        };
        let context = &self.contexts[at % self.contexts.len()];
        let queue = Queue::start(context, setup);
        self.running.borrow_mut()[at] = Some(queue);
        if start.is_some() {
            // What the daemon before gave back it may not have told.
            let _ = self.device.inject_interrupt(index.into());
        }
        Ok(())
    }

    /// Stops every queue, and returns when everything that was taken has been given back.
    pub(super) async fn stop(&self) {
        let running: Vec<Queue> = {
            let mut running = self.running.borrow_mut();
            running.iter_mut().filter_map(Option::take).collect()
        };
        // All of them first, so that none takes more while another is waited for.
        let stopping: Vec<_> = running
            .into_iter()
            .map(|queue| tokio::task::spawn_local(queue.stop()))
            .collect();
        for stopped in stopping {
            let _ = stopped.await;
        }
    }

    /// Stops a queue, gives the number of the next entry of its available ring, and goes on from there.
    pub(super) async fn position(&self, index: u16) -> io::Result<u16> {
        let at = usize::from(index);
        let running = self.running.borrow_mut().get_mut(at).map(Option::take);
        match running {
            None => Err(io::ErrorKind::InvalidInput.into()),
            Some(None) => {
                let info = self.device.queue_info(index.into())?;
                match info.state {
                    QueueState::Split { next_available } => Ok(next_available),
                    QueueState::Packed { .. } => Err(io::ErrorKind::InvalidInput.into()),
                }
            }
            Some(Some(queue)) => {
                let next = queue.stop().await;
                self.start_one(index, self.device.features()?, Some(next))?;
                Ok(next)
            }
        }
    }

    /// Puts everything back as it was before there was a driver, after a reset. The queues have been stopped.
    pub(super) fn reset(&self) {
        self.memory.forget();
        for record in &self.records {
            record.clear();
        }
        self.disk.reset();
    }

    /// Has the kernel keep kicks for whoever serves the device next.
    pub(super) fn keep_kicks(&self) {
        for index in 0..u32::try_from(self.records.len()).unwrap_or(0) {
            let _ = self.device.set_kick(index, None);
        }
    }
}
