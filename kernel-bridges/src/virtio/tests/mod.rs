//! A queue between a driver written for the test and a real image.

mod driver;
mod fuzz;
mod hostile;
mod recovery;
mod requests;
mod service;

use std::rc::Rc;
use std::sync::Arc;

use serde_json::{Value, json};
use stord_block::graph::Claim;
use stord_block::{Contexts, Graph, Permissions};
use stord_qmp::from_json;
use tempfile::NamedTempFile;
use tokio::sync::mpsc;

use self::driver::Guest;
use super::blk::disk::{Disk, DiskOptions};
use super::blk::queue::{Queue, QueueSetup};
use super::in_flight::InFlight;
use super::ring::Broken;

const MIB: u64 = 1 << 20;
const SECTOR: usize = 512;

/// A disk over an image.
struct World {
    image: NamedTempFile,
    graph: Graph,
    contexts: Rc<Contexts>,
    disk: Arc<Disk>,
}

/// A queue that is being served, and what it said of its driver.
struct Served {
    queue: Queue,
    broken: mpsc::UnboundedReceiver<Broken>,
}

fn options() -> DiskOptions {
    DiskOptions {
        writable: true,
        writethrough: false,
        logical_block_size: 512,
        serial: "the serial".to_owned(),
        queues: 1,
        seg_max: 126,
    }
}

impl World {
    /// A raw image of zeroes.
    async fn new(size: u64) -> Self {
        Self::with(size, options()).await
    }

    async fn with(size: u64, options: DiskOptions) -> Self {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(size).unwrap();
        let node = json!({
            "driver": "file", "node-name": "n", "filename": image.path(), "discard": "unmap",
            "read-only": !options.writable,
        });
        Self::over(image, node, options).await
    }

    /// A disk without content, where every request takes a moment.
    async fn slow() -> Self {
        let node = json!({
            "driver": "null-co", "node-name": "n", "size": MIB, "latency-ns": 200_000_000,
            "read-zeroes": true,
        });
        Self::over(NamedTempFile::new().unwrap(), node, options()).await
    }

    async fn over(image: NamedTempFile, node: Value, options: DiskOptions) -> Self {
        let contexts = Rc::new(Contexts::start().unwrap());
        let graph = Graph::new(Rc::clone(&contexts));
        graph.blockdev_add(from_json(node).unwrap()).await.unwrap();
        let mut permissions = Permissions::CONSISTENT_READ;
        if options.writable {
            permissions |= Permissions::WRITE;
        }
        let claim = Claim {
            permissions,
            shared: Permissions::all(),
        };
        let backend = graph.attach("n", "test", claim).await.unwrap();
        Self {
            image,
            graph,
            contexts,
            disk: Disk::new(backend, options),
        }
    }

    /// Serves a driver's queue from an entry of its available ring on.
    fn serve_from(&self, guest: &Guest, next: u16, in_flight: Option<InFlight>) -> Served {
        let map = Arc::clone(&guest.map);
        let (sender, broken) = mpsc::unbounded_channel();
        let setup = QueueSetup {
            index: 0,
            disk: Arc::clone(&self.disk),
            memory: move || map.local(),
            place: guest.place,
            next_available: next,
            features: guest.features,
            kick: guest.kick_fd(),
            call: guest.call(),
            in_flight,
            on_broken: Box::new(move |broken| {
                // The test may be over.
                let _ = sender.send(broken);
            }),
        };
        let queue = Queue::start(&self.contexts.main(), setup);
        Served { queue, broken }
    }

    fn serve(&self, guest: &Guest) -> Served {
        self.serve_from(guest, guest.available, None)
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.image.path()).unwrap()
    }
}

impl Served {
    /// Stops, and expects that the driver kept to the rules.
    async fn stop(mut self) -> u16 {
        let next = self.queue.stop().await;
        assert_eq!(self.broken.try_recv().ok(), None);
        next
    }

    /// The rule that the driver broke.
    async fn broken(mut self) -> Broken {
        let broken = self.broken.recv().await.expect("the queue breaks");
        self.queue.stop().await;
        broken
    }
}
