//! The exports of the process: their names, their lives, and who is told when one ends.
//!
//! Everything here runs on the control thread. An export is in the list from the moment its name is taken until nothing of it is
//! left: its users are gone, its backend is detached, its `iothread`s are released. Only then is its end announced, so that whoever
//! hears of it can use its id, its node and its mountpoint again.

mod mount;
mod nbd;
mod vduse;
mod vhost_user;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use stord_aio::Context;
use stord_aio::sync::{mpsc, watch};
use stord_block::graph::Claim;
use stord_block::{Backend, Contexts, Graph, Permissions};
use stord_qmp::Error;
use stord_qmp::schema::block::OnOffAuto;
use stord_qmp::schema::export::{
    BlockExportInfo, BlockExportIothreads, BlockExportKind, BlockExportOptions,
    BlockExportOptionsFuse, BlockExportRemoveMode, BlockExportType, FuseExportAllowOther,
};

use crate::export::{Ended, Export, Parts};
use crate::fuse::{
    Contents, FileOptions, FuseExport, FuseOptions, ResizeRequest, check_mountpoint, serve_resizes,
};
use crate::nbd::NbdServer;

pub use mount::{DirectoryFile, MountExport, MountLayout};
pub use nbd::{NbdLink, NbdLinkOptions};

/// So many contexts serve an export that names none.
const DEFAULT_QUEUES: usize = 2;
/// The most that can be asked for.
const MOST_QUEUES: u16 = 64;
/// `del` waits so long for the export's end, then leaves it to itself.
const DELETION_PATIENCE: Duration = Duration::from_secs(5);

/// What happens to exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportEvent {
    /// Nothing is left of the export; its id is free.
    Deleted {
        /// The export's id.
        id: String,
    },
    /// The export has become a block device of this machine.
    Attached {
        /// The export's id.
        id: String,
        /// The block device's path.
        device: String,
    },
}

/// The exports of the process; lives on the control thread, inside a `tokio::task::LocalSet`.
pub struct ExportRegistry {
    graph: Rc<Graph>,
    contexts: Rc<Contexts>,
    events: Box<dyn Fn(ExportEvent)>,
    exports: RefCell<Vec<Rc<Entry>>>,
    nbd: NbdServer,
}

/// One export, from the taking of its id to its end.
struct Entry {
    id: String,
    kind: BlockExportType,
    node_name: String,
    /// The mountpoint of a FUSE export as the user wrote it; exports on the same one exclude each other.
    mountpoint: Option<String>,
    shutting_down: Cell<bool>,
    /// It ends here and goes on in another process.
    left: Cell<bool>,
    /// `None` while it is being set up.
    export: RefCell<Option<Rc<dyn Export>>>,
    stage: watch::Sender<Stage>,
}

/// How far an export has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Starting,
    Running,
    Gone,
}

/// The contexts that serve an export.
struct Placement {
    contexts: Vec<Context>,
    /// The `iothread` objects among them, to be released at the end.
    iothreads: Vec<String>,
}

impl ExportRegistry {
    /// A registry without exports. `events` hears of what happens to them.
    pub fn new(
        graph: Rc<Graph>,
        contexts: Rc<Contexts>,
        events: impl Fn(ExportEvent) + 'static,
    ) -> Rc<Self> {
        Rc::new(Self {
            graph,
            contexts,
            events: Box::new(events),
            exports: RefCell::default(),
            nbd: NbdServer::default(),
        })
    }

    /// Creates an export; it can be used when this returns.
    ///
    /// # Errors
    /// The id or the mountpoint is taken, the node cannot be exported so, or the kernel refuses. Nothing is left then.
    pub async fn add(self: &Rc<Self>, options: BlockExportOptions) -> Result<(), Error> {
        let (kind, mountpoint) = match &options.kind {
            BlockExportKind::Nbd(_) => (BlockExportType::Nbd, None),
            BlockExportKind::VhostUserBlk(_) => (BlockExportType::VhostUserBlk, None),
            BlockExportKind::Fuse(fuse) => (BlockExportType::Fuse, Some(fuse.mountpoint.clone())),
            BlockExportKind::VduseBlk(_) => (BlockExportType::VduseBlk, None),
        };
        let entry = self.enter(&options.id, kind, &options.node_name, mountpoint)?;
        let started = self.start(&entry, &options).await;
        if started.is_err() {
            self.forget(&entry);
        }
        started
    }

    /// Puts a new export into the list.
    fn enter(
        &self,
        id: &str,
        kind: BlockExportType,
        node_name: &str,
        mountpoint: Option<String>,
    ) -> Result<Rc<Entry>, Error> {
        if !is_wellformed(id) {
            return Err(Error::generic("Invalid block export id"));
        }
        if self.find(id).is_some() {
            return Err(Error::generic(format!(
                "Block export id '{id}' is already in use"
            )));
        }
        let node = self.graph.find(node_name)?;
        let (stage, _) = watch::channel(Stage::Starting);
        let entry = Rc::new(Entry {
            id: id.to_owned(),
            kind,
            node_name: node.name().to_owned(),
            mountpoint,
            shutting_down: Cell::new(false),
            left: Cell::new(false),
            export: RefCell::new(None),
            stage,
        });
        self.exports.borrow_mut().push(Rc::clone(&entry));
        Ok(entry)
    }

    async fn start(
        self: &Rc<Self>,
        entry: &Rc<Entry>,
        options: &BlockExportOptions,
    ) -> Result<(), Error> {
        if let BlockExportKind::Nbd(nbd) = &options.kind {
            self.check_nbd(nbd, &entry.node_name)?;
        }
        let allow_inactive = options.allow_inactive.unwrap_or(false);
        match &options.kind {
            BlockExportKind::Fuse(_)
            | BlockExportKind::VhostUserBlk(_)
            | BlockExportKind::VduseBlk(_)
                if allow_inactive =>
            {
                return Err(Error::generic(
                    "Export type does not support inactive exports",
                ));
            }
            _ => {}
        }
        let queues = match &options.kind {
            BlockExportKind::Fuse(fuse) => fuse.num_queues,
            // There are no more contexts than that; further queues share them.
            BlockExportKind::VhostUserBlk(disk) => Some(vhost_user::check(disk)?.min(MOST_QUEUES)),
            BlockExportKind::VduseBlk(disk) => Some(vduse::check(disk)?.min(MOST_QUEUES)),
            BlockExportKind::Nbd(_) => None,
        };
        let iothreads = self.iothreads_of(options)?;
        let placement = self.place(iothreads.as_ref(), queues)?;
        let writable = options.writable.unwrap_or(false);
        let growable = match &options.kind {
            BlockExportKind::Nbd(_)
            | BlockExportKind::VhostUserBlk(_)
            | BlockExportKind::VduseBlk(_) => false,
            BlockExportKind::Fuse(fuse) => writable && fuse.growable.unwrap_or(false),
        };
        let attached = self.attach(options, writable, growable);
        let backend = match attached.await {
            Ok(backend) => backend,
            Err(error) => {
                self.release(&placement);
                return Err(error);
            }
        };
        let parts = Parts {
            backend: backend.clone(),
            contexts: placement.contexts.clone(),
            writable,
            writethrough: options.writethrough.unwrap_or(false),
        };
        let started = match &options.kind {
            BlockExportKind::Nbd(nbd) => self.start_nbd(entry, nbd, parts),
            BlockExportKind::VhostUserBlk(disk) => vhost_user::start(entry, disk, parts).await,
            BlockExportKind::Fuse(fuse) => self.start_fuse(entry, fuse, parts).await,
            BlockExportKind::VduseBlk(disk) => self.start_vduse(entry, disk, parts).await,
        };
        match started {
            Ok((export, ended)) => {
                if let Some(device) = export.device() {
                    let id = entry.id.clone();
                    (self.events)(ExportEvent::Attached { id, device });
                }
                self.supervise(entry, export, ended, vec![backend], placement);
                Ok(())
            }
            Err(error) => {
                self.graph.detach(backend).await;
                self.release(&placement);
                Err(error)
            }
        }
    }

    async fn start_fuse(
        self: &Rc<Self>,
        entry: &Rc<Entry>,
        options: &BlockExportOptionsFuse,
        parts: Parts,
    ) -> Result<(Rc<dyn Export>, Ended), Error> {
        self.check_mountpoint_is_free(entry)?;
        let path = check_mountpoint(&options.mountpoint, false).await?;
        let growable = parts.writable && options.growable.unwrap_or(false);
        let options = FuseOptions {
            path,
            allow_other: options.allow_other.unwrap_or(FuseExportAllowOther::Auto),
            io_uring: options.io_uring.unwrap_or(OnOffAuto::Auto),
            passthrough: options.passthrough.unwrap_or(OnOffAuto::Auto),
            contents: Contents::File(FileOptions {
                backend: parts.backend,
                writable: parts.writable,
                growable,
                writethrough: parts.writethrough,
                outlives: false,
                resizes: (parts.writable && !growable)
                    .then(|| self.serve_resizes(entry, &parts.contexts)),
            }),
        };
        let (export, ended) = FuseExport::start(&options, &parts.contexts).await?;
        Ok((Rc::new(export), ended))
    }

    /// The iothreads that the user wants: for this export, or for its node.
    fn iothreads_of(
        &self,
        options: &BlockExportOptions,
    ) -> Result<Option<BlockExportIothreads>, Error> {
        if options.iothread.is_some() {
            return Ok(options.iothread.clone());
        }
        let of_node = self.graph.iothread_of(&options.node_name)?;
        // The object may be gone by now.
        let of_node = of_node.filter(|id| self.contexts.has_iothread(id));
        Ok(of_node.map(BlockExportIothreads::Single))
    }

    /// Chooses the contexts of an export, one for each queue: those named, or as many as there are processors, at most the default.
    fn place(
        &self,
        iothread: Option<&BlockExportIothreads>,
        queues: Option<u16>,
    ) -> Result<Placement, Error> {
        if queues.is_some_and(|queues| !(1..=MOST_QUEUES).contains(&queues)) {
            return Err(Error::generic(format!(
                "num-queues must be between 1 and {MOST_QUEUES}"
            )));
        }
        let queues = queues.map(usize::from);
        let names: &[String] = match iothread {
            None => {
                let wanted = queues.unwrap_or(DEFAULT_QUEUES);
                let contexts = self.contexts.shared(wanted).map_err(|error| {
                    Error::generic(format!("Could not start an I/O thread: {error}"))
                })?;
                return Ok(Placement {
                    contexts: deal(contexts, queues),
                    iothreads: Vec::new(),
                });
            }
            Some(BlockExportIothreads::Single(name)) => std::slice::from_ref(name),
            Some(BlockExportIothreads::Multi(names)) => names,
        };
        if names.is_empty() {
            return Err(Error::generic("The list of I/O threads must not be empty"));
        }
        let mut placement = Placement {
            contexts: Vec::new(),
            iothreads: Vec::new(),
        };
        for name in names {
            match self.contexts.acquire(name) {
                Ok(context) => {
                    placement.contexts.push(context);
                    placement.iothreads.push(name.clone());
                }
                Err(_) => {
                    self.release(&placement);
                    return Err(Error::generic(format!("iothread \"{name}\" not found")));
                }
            }
        }
        placement.contexts = deal(placement.contexts, queues);
        Ok(placement)
    }

    fn release(&self, placement: &Placement) {
        for name in &placement.iothreads {
            self.contexts.release(name);
        }
    }

    async fn attach(
        &self,
        options: &BlockExportOptions,
        writable: bool,
        growable: bool,
    ) -> Result<Backend, Error> {
        let claim = self.claim(&options.node_name, writable, growable)?;
        if !options.allow_inactive.unwrap_or(false) {
            return self
                .attach_active(&options.node_name, &options.id, claim)
                .await;
        }
        let description = description(&options.id);
        let attached = self
            .graph
            .attach_even_inactive(&options.node_name, &description, claim);
        let backend = attached.await?;
        self.graph.report_failures(&backend, &options.id);
        Ok(backend)
    }

    /// Attaches to a node, which becomes active for that.
    async fn attach_active(
        &self,
        node_name: &str,
        id: &str,
        claim: Claim,
    ) -> Result<Backend, Error> {
        self.graph.activate(node_name).await?;
        let description = description(id);
        let attached = self.graph.attach(node_name, &description, claim);
        let backend = attached.await?;
        self.graph.report_failures(&backend, id);
        Ok(backend)
    }

    /// What an export claims of its node.
    fn claim(&self, node_name: &str, writable: bool, growable: bool) -> Result<Claim, Error> {
        let node = self.graph.find(node_name)?;
        if writable && node.is_read_only() {
            return Err(Error::generic("Cannot export read-only node as writable"));
        }
        let mut permissions = Permissions::CONSISTENT_READ;
        if writable {
            permissions |= Permissions::WRITE;
        }
        if growable {
            permissions |= Permissions::RESIZE;
        }
        Ok(Claim {
            permissions,
            shared: Permissions::all(),
        })
    }

    /// Changes the length of the export's node when its users ask for it, as long as the export lives.
    fn serve_resizes(
        &self,
        entry: &Entry,
        contexts: &[Context],
    ) -> mpsc::UnboundedSender<ResizeRequest> {
        let (sender, requests) = mpsc::unbounded_channel();
        let graph = Rc::clone(&self.graph);
        let node_name = entry.node_name.clone();
        let description = description(&entry.id);
        let context = contexts
            .first()
            .map_or_else(|| self.contexts.main(), Context::clone);
        tokio::task::spawn_local(async move {
            serve_resizes(requests, &graph, &node_name, &description, context).await;
        });
        sender
    }

    /// Sees the export to its end.
    fn supervise(
        self: &Rc<Self>,
        entry: &Rc<Entry>,
        export: Rc<dyn Export>,
        ended: Ended,
        backends: Vec<Backend>,
        placement: Placement,
    ) {
        *entry.export.borrow_mut() = Some(Rc::clone(&export));
        entry.stage.send_replace(Stage::Running);
        let (registry, entry) = (Rc::clone(self), Rc::clone(entry));
        tokio::task::spawn_local(async move {
            ended.await;
            entry.shutting_down.set(true);
            export.finish().await;
            drop(entry.export.take());
            drop(export);
            for backend in backends {
                registry.graph.detach(backend).await;
            }
            registry.release(&placement);
            registry.forget(&entry);
            if !entry.left.get() {
                let id = entry.id.clone();
                (registry.events)(ExportEvent::Deleted { id });
            }
        });
    }

    /// Removes an export. One that somebody uses stays with `Safe`. `Safe` and `Hard` are the same for FUSE: whoever has the file
    /// open finds it gone.
    ///
    /// Returns when the export is gone, or after a while in which it could not go because a request does not end.
    ///
    /// # Errors
    /// There is no such export, or it is only being set up, or somebody uses it.
    pub async fn del(self: &Rc<Self>, id: &str, mode: BlockExportRemoveMode) -> Result<(), Error> {
        let entry = self
            .find(id)
            .ok_or_else(|| Error::generic(format!("Export '{id}' is not found")))?;
        let export = entry.export.borrow().clone();
        match (export, mode) {
            (Some(export), BlockExportRemoveMode::Safe) if export.is_in_use().await => {
                return Err(Error::generic(format!("export '{id}' still in use"))
                    .with_hint("Use mode='hard' to force client disconnect"));
            }
            (Some(export), BlockExportRemoveMode::Hard) => export.force(),
            _ => {}
        }
        let stage = entry.stage.subscribe();
        if !self.request_shutdown(&entry) {
            return Err(Error::generic(format!("export '{id}' still in use")));
        }
        // Dropping the receiver stops nothing.
        if tokio::time::timeout(DELETION_PATIENCE, is_gone(stage))
            .await
            .is_err()
        {
            tracing::warn!(id, "the export waits for a request that does not end");
        }
        Ok(())
    }

    /// Starts to take an export down, unless that goes on already. False while it is being set up.
    fn request_shutdown(&self, entry: &Rc<Entry>) -> bool {
        let Some(export) = entry.export.borrow().clone() else {
            return entry.shutting_down.get();
        };
        if !entry.shutting_down.replace(true) {
            tokio::task::spawn_local(async move { export.shut_down().await });
        }
        true
    }

    /// The exports, the newest first.
    pub fn query(&self) -> Vec<BlockExportInfo> {
        let exports = self.exports.borrow();
        exports
            .iter()
            .rev()
            .map(|entry| BlockExportInfo {
                id: entry.id.clone(),
                r#type: entry.kind,
                node_name: entry.node_name.clone(),
                shutting_down: entry.shutting_down.get(),
                device: entry
                    .export
                    .borrow()
                    .as_ref()
                    .and_then(|export| export.device()),
            })
            .collect()
    }

    /// Where the export of that id is mounted, if it is.
    pub fn mountpoint(&self, id: &str) -> Option<String> {
        self.find(id)?.mountpoint.clone()
    }

    /// Removes all exports, and returns when the last is gone and the NBD server has stopped.
    pub async fn close_all(self: &Rc<Self>) {
        self.close(|_| true).await;
        self.nbd.stop().await;
    }

    /// Removes some exports, and returns when the last is gone.
    async fn close(self: &Rc<Self>, which: impl Fn(&Entry) -> bool) {
        loop {
            let mut entries = self.exports.borrow().clone();
            entries.retain(|entry| which(entry));
            let Some(first) = entries.first() else { return };
            for entry in &entries {
                self.request_shutdown(entry);
            }
            let mut stage = first.stage.subscribe();
            // One that is still being set up is asked again when it runs.
            let was = *stage.borrow_and_update();
            let _ = stage.wait_for(|stage| *stage != was).await;
        }
    }

    fn find(&self, id: &str) -> Option<Rc<Entry>> {
        let exports = self.exports.borrow();
        exports.iter().find(|entry| entry.id == id).cloned()
    }

    /// Whether no other export is on the mountpoint, or going there.
    fn check_mountpoint_is_free(&self, entry: &Rc<Entry>) -> Result<(), Error> {
        let exports = self.exports.borrow();
        let is_taken = exports
            .iter()
            .any(|other| !Rc::ptr_eq(other, entry) && other.mountpoint == entry.mountpoint);
        match &entry.mountpoint {
            Some(mountpoint) if is_taken => Err(Error::generic(format!(
                "There already is a FUSE export on '{mountpoint}'"
            ))),
            _ => Ok(()),
        }
    }

    fn forget(&self, entry: &Rc<Entry>) {
        self.exports
            .borrow_mut()
            .retain(|held| !Rc::ptr_eq(held, entry));
        entry.stage.send_replace(Stage::Gone);
    }
}

async fn is_gone(mut stage: watch::Receiver<Stage>) {
    // The sender is part of the entry, which says so before it goes.
    let _ = stage.wait_for(|stage| *stage == Stage::Gone).await;
}

/// What the export is called in messages of the block layer.
fn description(id: &str) -> String {
    format!("block export '{id}'")
}

/// Whether an id is a letter followed by letters, digits, '-', '.' and '_'.
fn is_wellformed(id: &str) -> bool {
    let mut bytes = id.bytes();
    bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

/// The contexts in turn, one for each queue; one queue for each context where no number is given.
fn deal(contexts: Vec<Context>, queues: Option<usize>) -> Vec<Context> {
    let Some(queues) = queues else {
        return contexts;
    };
    contexts.iter().cycle().take(queues).cloned().collect()
}
