//! Opening: from options to a node with all its children.
//!
//! Children open first, then the driver, then the node joins the graph. While a driver opens, the graph knows its children as held by
//! it, so that their permissions (and with them the locks on image files) are in force before the first byte of an image is read. An
//! error anywhere closes what was opened so far.

use std::cell::Cell;
use std::sync::Arc;

use stord_qmp::Error;
use stord_qmp::schema::block::{
    BlockdevCacheOptions, BlockdevDetectZeroesOptions, BlockdevDiscardOptions, BlockdevDriver,
    BlockdevOptions, BlockdevRef, BlockdevRefOrNull,
};

use super::claims::Plan;
use super::{
    Children, DetectZeroes, Graph, MAX_LENGTH, Node, NodeOptions, Permissions, name_error,
    storage_claim,
};
use crate::driver::{BACKING, ChildId, DATA_FILE, Driver, FILE, ImageLinks, Protocol};
use crate::drivers::filter::compress::Compress;
use crate::drivers::format::{qcow2, raw};
use crate::drivers::{description, filename, protocol};

/// A backing chain longer than this is refused.
const MAX_CHAIN: usize = 200;

/// The longest node name, in bytes.
const MAX_NODE_NAME: usize = 31;

/// The place of a child with its parent, which decides the defaults of its options.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// Holds the parent's image: as writable as the parent.
    Image,
    /// Lies behind the parent: read-only unless said otherwise.
    Backing,
}

/// The files that the images above this one are in, to find a chain that bites its tail.
struct Chain<'a> {
    above: Option<&'a Chain<'a>>,
    file: Option<(u64, u64)>,
    depth: usize,
}

impl Chain<'_> {
    fn contains(&self, file: (u64, u64)) -> bool {
        self.file == Some(file) || self.above.is_some_and(|above| above.contains(file))
    }
}

/// Children of a driver that is opening. Dropping it without `keep` leaves no trace in the graph but nodes to close.
pub(super) struct Opening<'a> {
    graph: &'a Graph,
    name: &'a str,
    /// Whether the node is to be active.
    active: bool,
    pub(super) children: Children,
    done: Cell<bool>,
}

impl<'a> Opening<'a> {
    pub(super) fn new(
        graph: &'a Graph,
        name: &'a str,
        active: bool,
        places: &[&'static str],
    ) -> Self {
        let children = Children::new(places);
        graph
            .opening
            .borrow_mut()
            .push((name.to_owned(), children.clone()));
        Self {
            graph,
            name,
            active,
            children,
            done: Cell::new(false),
        }
    }

    /// Takes the children out of the list of those that are opening.
    pub(super) fn settle(&self) {
        if !self.done.replace(true) {
            self.graph
                .opening
                .borrow_mut()
                .retain(|(_, children)| !std::ptr::eq(children.edges(), self.children.edges()));
        }
    }

    /// Puts a node into its place, with the claim that a format has on it before the format has users of its own. From then on
    /// `abandon` closes it.
    pub(super) async fn put(
        &self,
        child: ChildId,
        node: Arc<Node>,
        writable: bool,
        passes_through: bool,
    ) -> Result<(), Error> {
        let edge = &self.children.edges()[usize::from(child.0)];
        let claim = if passes_through {
            super::Claim::NONE
        } else {
            storage_claim(child, Permissions::empty(), Permissions::all(), writable)
        };
        edge.set_claim(claim);
        edge.set_node(Some(Arc::clone(&node)));
        if self.active && !node.is_active() {
            return Err(Error::generic(format!(
                "Inactive '{}' can't be a {} child of active '{}'",
                node.name(),
                edge.name(),
                self.name
            )));
        }
        let start = [node];
        // The node may be an old one with users.
        let _drained = self.graph.drain(&start).await;
        Plan::make(self.graph, &start, Vec::new())?.commit();
        Ok(())
    }

    /// Closes what was opened for a driver that failed.
    async fn abandon(self) {
        self.settle();
        for orphan in self.graph.let_go(&self.children) {
            self.graph.close_unused(orphan).await;
        }
    }
}

impl Graph {
    /// Opens a node by its options.
    pub(super) async fn open(&self, options: BlockdevOptions) -> Result<Arc<Node>, Error> {
        let chain = Chain {
            above: None,
            file: None,
            depth: 0,
        };
        self.open_node(options, &chain).await
    }

    fn open_node<'a>(
        &'a self,
        options: BlockdevOptions,
        chain: &'a Chain<'a>,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Arc<Node>, Error>> + 'a>> {
        Box::pin(async move {
            let name = self.node_name(options.node_name.as_deref())?;
            let node_options = node_options(&options)?;
            let driver_name = options.driver.name();
            match &options.driver {
                BlockdevDriver::File(file) | BlockdevDriver::HostDevice(file) => {
                    let opened = protocol::file::open(
                        &self.contexts,
                        driver_name,
                        file.clone(),
                        node_options.clone(),
                    )
                    .await?;
                    let read_only = opened.is_read_only();
                    let driver = Driver::Protocol(Box::new(opened));
                    Ok(self.add_leaf(name, driver, node_options, read_only, &options))
                }
                BlockdevDriver::Nbd(nbd) => {
                    let driver = protocol::nbd::Nbd::open(nbd, &self.credentials).await?;
                    if driver.is_read_only()
                        && !node_options.read_only
                        && !node_options.auto_read_only
                    {
                        return Err(Error::generic(
                            "request on write denied without write permission",
                        )
                        .with_hint("the export is read-only: open it with 'read-only=on'"));
                    }
                    let read_only = node_options.read_only || driver.is_read_only();
                    let driver = Driver::Protocol(Box::new(driver));
                    Ok(self.add_leaf(name, driver, node_options, read_only, &options))
                }
                BlockdevDriver::IoUring(uring) => {
                    let opened = protocol::file::open(
                        &self.contexts,
                        driver_name,
                        protocol::file::by_io_uring(uring),
                        node_options.clone(),
                    )
                    .await?;
                    let read_only = opened.is_read_only();
                    let driver = Driver::Protocol(Box::new(opened));
                    Ok(self.add_leaf(name, driver, node_options, read_only, &options))
                }
                BlockdevDriver::VirtioBlkVhostUser(device) => {
                    let main = self.contexts.main();
                    let driver =
                        protocol::blkio::VirtioBlk::open(device, &node_options, &main).await?;
                    let read_only = node_options.read_only || driver.is_read_only();
                    let driver = Driver::Protocol(Box::new(driver));
                    Ok(self.add_leaf(name, driver, node_options, read_only, &options))
                }
                BlockdevDriver::NullCo(null) | BlockdevDriver::NullAio(null) => {
                    let read_only = node_options.read_only;
                    let driver = protocol::null::Null::open(null)?;
                    if driver.length() > MAX_LENGTH {
                        return Err(Error::generic(
                            "Could not refresh total sector count: File too large",
                        ));
                    }
                    let driver = Driver::Protocol(Box::new(driver));
                    Ok(self.add_leaf(name, driver, node_options, read_only, &options))
                }
                BlockdevDriver::Compress(_) | BlockdevDriver::Raw(_) | BlockdevDriver::Qcow2(_) => {
                    self.open_format(name, options, node_options, chain).await
                }
            }
        })
    }

    fn add_leaf(
        &self,
        name: String,
        driver: Driver,
        options: NodeOptions,
        read_only: bool,
        definition: &BlockdevOptions,
    ) -> Arc<Node> {
        let node = Arc::new(
            Node::new(
                name,
                definition.driver.name(),
                driver,
                Children::new(&[]),
                options,
                read_only,
            )
            .with_events(self.events.clone())
            .defined_by(definition),
        );
        self.nodes.borrow_mut().push(Arc::clone(&node));
        node
    }

    async fn open_format(
        &self,
        name: String,
        options: BlockdevOptions,
        node_options: NodeOptions,
        chain: &Chain<'_>,
    ) -> Result<Arc<Node>, Error> {
        let places: &[&'static str] = match options.driver {
            BlockdevDriver::Qcow2(_) => &["file", "backing", "data-file"],
            _ => &["file"],
        };
        let active = node_options.active.unwrap_or(true);
        let opening = Opening::new(self, &name, active, places);
        match self
            .open_format_children(&opening, &name, &options, node_options, chain)
            .await
        {
            Ok(node) => {
                opening.settle();
                Ok(node)
            }
            Err(error) => {
                opening.abandon().await;
                Err(error)
            }
        }
    }

    async fn open_format_children(
        &self,
        opening: &Opening<'_>,
        name: &str,
        options: &BlockdevOptions,
        mut node_options: NodeOptions,
        chain: &Chain<'_>,
    ) -> Result<Arc<Node>, Error> {
        let file_ref = match &options.driver {
            BlockdevDriver::Compress(compress) => &compress.file,
            BlockdevDriver::Raw(raw) => &raw.file,
            BlockdevDriver::Qcow2(qcow2) => &qcow2.file,
            other => {
                return Err(Error::generic(format!(
                    "'{}' is not a format",
                    other.name()
                )));
            }
        };
        let file = self
            .open_ref(file_ref.clone(), options, Place::Image, chain)
            .await?;
        // As in the reference, a node comes after its file and before what lies behind it.
        let position = self.nodes.borrow().len();
        let identity = identity(&file);
        if let Some(identity) = identity
            && chain.contains(identity)
        {
            let image = description::of_leaf(&file);
            self.close_if_unused(file).await;
            return Err(Error::generic(format!(
                "Backing file '{image}' creates an infinite loop."
            )));
        }
        if file.is_read_only() && node_options.auto_read_only {
            node_options.read_only = true;
        }
        let active = node_options.active.unwrap_or(true);
        let writable = !node_options.read_only && active;
        let passes_through = matches!(
            options.driver,
            BlockdevDriver::Compress(_) | BlockdevDriver::Raw(_)
        );
        opening.put(FILE, file, writable, passes_through).await?;

        let driver: Driver = match &options.driver {
            BlockdevDriver::Compress(_) => {
                Driver::Format(Box::new(Compress::open(opening.children.clone())?))
            }
            BlockdevDriver::Raw(raw) => {
                Driver::Format(Box::new(raw::Raw::open(opening.children.clone(), raw)?))
            }
            BlockdevDriver::Qcow2(qcow2) => {
                let children = opening.children.clone();
                let links = self
                    .on_main(move || async move { qcow2::links(&children).await })
                    .await??;
                let chain = Chain {
                    above: Some(chain),
                    file: identity,
                    depth: chain.depth + 1,
                };
                self.open_data_file(opening, options, &links, writable, &chain)
                    .await?;
                self.open_backing(opening, options, &links, &chain).await?;
                let (children, own, common) = (
                    opening.children.clone(),
                    qcow2.clone(),
                    driver_options(&node_options, active),
                );
                let driver = self
                    .on_main(move || async move { qcow2::open(children, own, common).await })
                    .await??;
                Driver::Format(Box::new(driver))
            }
            other => {
                return Err(Error::generic(format!(
                    "'{}' is not a format",
                    other.name()
                )));
            }
        };
        let read_only = node_options.read_only;
        let node = Arc::new(
            Node::new(
                name.to_owned(),
                options.driver.name(),
                driver,
                opening.children.clone(),
                node_options,
                read_only,
            )
            .with_events(self.events.clone())
            .defined_by(options),
        );
        opening.settle();
        let position = position.min(self.nodes.borrow().len());
        self.nodes.borrow_mut().insert(position, Arc::clone(&node));
        if let Err(error) =
            Plan::make(self, std::slice::from_ref(&node), Vec::new()).map(Plan::commit)
        {
            self.close_unused(node).await;
            return Err(error);
        }
        Ok(node)
    }

    async fn close_if_unused(&self, node: Arc<Node>) {
        if !self.is_used(&node) {
            self.close_unused(node).await;
        }
    }

    async fn open_data_file(
        &self,
        opening: &Opening<'_>,
        options: &BlockdevOptions,
        links: &ImageLinks,
        writable: bool,
        chain: &Chain<'_>,
    ) -> Result<(), Error> {
        let BlockdevDriver::Qcow2(qcow2) = &options.driver else {
            return Ok(());
        };
        let reference =
            match (&qcow2.data_file, &links.data_file) {
                (Some(_), None) => {
                    return Err(Error::generic(
                        "'data-file' can only be set for images with an external data file",
                    ));
                }
                (None, None) => return Ok(()),
                (Some(reference), Some(_)) => reference.clone(),
                (None, Some(None)) => {
                    return Err(Error::generic("'data-file' is required for this image"));
                }
                (None, Some(Some(name))) => BlockdevRef::Definition(Box::new(
                    self.options_of_name(opening, name, Some("file"))?,
                )),
            };
        let node = self
            .open_ref(reference, options, Place::Image, chain)
            .await?;
        opening.put(DATA_FILE, node, writable, false).await
    }

    async fn open_backing(
        &self,
        opening: &Opening<'_>,
        options: &BlockdevOptions,
        links: &ImageLinks,
        chain: &Chain<'_>,
    ) -> Result<(), Error> {
        let BlockdevDriver::Qcow2(qcow2) = &options.driver else {
            return Ok(());
        };
        let reference = match (&qcow2.backing, &links.backing_file) {
            (Some(BlockdevRefOrNull::Null), _) | (None, None) => return Ok(()),
            (Some(BlockdevRefOrNull::Definition(definition)), _) => {
                Ok(BlockdevRef::Definition(definition.clone()))
            }
            (Some(BlockdevRefOrNull::Reference(name)), _) => {
                Ok(BlockdevRef::Reference(name.clone()))
            }
            (None, Some(_)) if chain.depth > MAX_CHAIN => Err(Error::generic(format!(
                "The backing chain is longer than {MAX_CHAIN} images"
            ))),
            (None, Some(name)) => self
                .backing_options(opening, name, links.backing_format.as_deref())
                .await
                .map(|definition| BlockdevRef::Definition(Box::new(definition))),
        };
        let opened = match reference {
            Ok(reference) => {
                self.open_ref(reference, options, Place::Backing, chain)
                    .await
            }
            Err(error) => Err(error),
        };
        let node = opened.map_err(|error| error.context("Could not open backing file"))?;
        opening.put(BACKING, node, false, false).await
    }

    /// Options for a backing file named in an image.
    async fn backing_options(
        &self,
        opening: &Opening<'_>,
        name: &str,
        format: Option<&str>,
    ) -> Result<BlockdevOptions, Error> {
        let options = self.options_of_name(opening, name, format)?;
        match format {
            Some(_) => Ok(options),
            // Nothing says what is in it: look.
            None if matches!(
                options.driver,
                BlockdevDriver::File(_) | BlockdevDriver::HostDevice(_)
            ) =>
            {
                self.with_probed_format(options).await
            }
            None => Ok(options),
        }
    }

    fn options_of_name(
        &self,
        opening: &Opening<'_>,
        name: &str,
        format: Option<&str>,
    ) -> Result<BlockdevOptions, Error> {
        let base = opening
            .children
            .node(FILE)
            .map(|file| description::of_leaf(&file));
        filename::parse(name, base.as_deref(), format)
    }

    /// Opens the file of `options` for a look at its first bytes, and puts the format that they show above it.
    async fn with_probed_format(
        &self,
        mut options: BlockdevOptions,
    ) -> Result<BlockdevOptions, Error> {
        let mut look = options.clone();
        look.read_only = Some(true);
        look.force_share = Some(true);
        let chain = Chain {
            above: None,
            file: None,
            depth: 0,
        };
        let node = self.open_node(look, &chain).await?;
        let probed = {
            let node = Arc::clone(&node);
            self.on_main(move || async move { crate::drivers::format::probe(&node).await })
                .await?
        };
        self.close_unused(node).await;
        let format = probed
            .map_err(|errno| Error::os("Could not read image for determining its format", errno))?;
        let node_name = options.node_name.take();
        let mut above = filename::with_format(options, format);
        above.node_name = node_name;
        Ok(above)
    }

    async fn open_ref(
        &self,
        reference: BlockdevRef,
        parent: &BlockdevOptions,
        place: Place,
        chain: &Chain<'_>,
    ) -> Result<Arc<Node>, Error> {
        match reference {
            BlockdevRef::Reference(name) => self.referred(&name),
            BlockdevRef::Definition(mut child) => {
                inherit(&mut child, parent, place);
                self.open_node(*child, chain).await
            }
        }
    }

    /// Runs something on the main I/O context.
    pub(crate) async fn on_main<F, Fut, T>(&self, f: F) -> Result<T, Error>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        self.contexts
            .main()
            .run(f)
            .await
            .map_err(|gone| Error::generic(gone.to_string()))
    }

    fn node_name(&self, wanted: Option<&str>) -> Result<String, Error> {
        let Some(name) = wanted else {
            loop {
                let number = self.unnamed.get();
                self.unnamed.set(number + 1);
                let name = format!("#block{number:03}");
                if self.lookup(&name).is_none() {
                    return Ok(name);
                }
            }
        };
        let well_formed = name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        if !well_formed {
            return Err(name_error(format!("Invalid node-name: '{name}'")));
        }
        if name.len() > MAX_NODE_NAME {
            return Err(name_error("Node name too long".to_owned()));
        }
        if self.lookup(name).is_some()
            || self
                .opening
                .borrow()
                .iter()
                .any(|(opening, _)| opening == name)
        {
            return Err(name_error(format!(
                "Duplicate nodes with node-name='{name}'"
            )));
        }
        Ok(name.to_owned())
    }
}

fn identity(node: &Node) -> Option<(u64, u64)> {
    match node.driver() {
        Driver::Protocol(leaf) => leaf.identity(),
        Driver::Format(_) => node.children().node(FILE).and_then(|file| identity(&file)),
    }
}

/// Gives a child defined inside its parent the parent's options where it has none of its own.
pub(super) fn inherit(child: &mut BlockdevOptions, parent: &BlockdevOptions, place: Place) {
    let cache = parent.cache.clone().unwrap_or(BlockdevCacheOptions {
        direct: None,
        no_flush: None,
    });
    let own = child.cache.get_or_insert(BlockdevCacheOptions {
        direct: None,
        no_flush: None,
    });
    own.direct = own.direct.or(cache.direct);
    own.no_flush = own.no_flush.or(cache.no_flush);
    child.force_share = child.force_share.or(parent.force_share);
    // Formats pass on only the discards that they are allowed, so what lies below need not filter again.
    child.discard.get_or_insert(BlockdevDiscardOptions::Unmap);
    match place {
        Place::Image => {
            child.read_only = child.read_only.or(parent.read_only);
            child.auto_read_only = child.auto_read_only.or(parent.auto_read_only);
        }
        Place::Backing => {
            child.read_only.get_or_insert(true);
            child.auto_read_only.get_or_insert(false);
        }
    }
}

/// The options for the driver of a node: one that is not active must not change its image.
pub(super) fn driver_options(node: &NodeOptions, active: bool) -> NodeOptions {
    NodeOptions {
        read_only: node.read_only || !active,
        ..node.clone()
    }
}

pub(super) fn node_options(options: &BlockdevOptions) -> Result<NodeOptions, Error> {
    let cache = options.cache.as_ref();
    let node = NodeOptions {
        discard: options.discard == Some(BlockdevDiscardOptions::Unmap),
        direct: cache.and_then(|cache| cache.direct).unwrap_or(false),
        no_flush: cache.and_then(|cache| cache.no_flush).unwrap_or(false),
        read_only: options.read_only.unwrap_or(false),
        active: options.active,
        auto_read_only: options.auto_read_only.unwrap_or(false),
        force_share: options.force_share.unwrap_or(false),
        detect_zeroes: match options.detect_zeroes {
            None | Some(BlockdevDetectZeroesOptions::Off) => DetectZeroes::Off,
            Some(BlockdevDetectZeroesOptions::On) => DetectZeroes::On,
            Some(BlockdevDetectZeroesOptions::Unmap) => DetectZeroes::Unmap,
        },
    };
    if node.detect_zeroes == DetectZeroes::Unmap && !node.discard {
        return Err(Error::generic(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ));
    }
    if node.force_share && !node.read_only {
        return Err(Error::generic(
            "force-share=on can only be used with read-only images",
        ));
    }
    Ok(node)
}
