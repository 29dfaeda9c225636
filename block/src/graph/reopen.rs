//! Reopening: other options for nodes that are open, all of a command's nodes together or none.
//!
//! A node is not changed, it is replaced: a second node of the same name opens on the same storage while no request is in flight, and
//! takes the first one's place everywhere. Files are not opened by name again but through their descriptors, and keep their locks.
//! Nodes are replaced from the bottom up; when one fails, those replaced before it are put back.

use std::sync::Arc;

use serde_json::Value;
use stord_aio::Errno;
use stord_qmp::schema::block::{BlockdevDriver, BlockdevOptions, BlockdevRef, BlockdevRefOrNull};
use stord_qmp::{Error, to_json};

use super::claims::{Plan, top_down};
use super::open::{Opening, Place, driver_options, inherit, node_options};
use super::{Children, Claim, Graph, Node, Permissions};
use crate::driver::{BACKING, ChildId, DATA_FILE, Driver, FILE};
use crate::drivers::filter::compress::Compress;
use crate::drivers::format::{qcow2, raw};

/// A node and what it is to become.
pub(super) struct Target {
    node: Arc<Node>,
    options: BlockdevOptions,
    /// The children it is to have: its present ones where the options do not name others.
    children: Vec<Option<Arc<Node>>>,
    /// Whether it is to be active.
    active: bool,
}

impl Target {
    /// The node as it was opened, active or not.
    ///
    /// # Errors
    /// Nobody knows how it was opened.
    pub(super) fn same(node: &Arc<Node>, active: bool) -> Result<Self, Error> {
        let options = node.definition();
        let options = options.ok_or_else(|| Error::generic("The node cannot be opened again"))?;
        let edges = node.children().edges();
        Ok(Self {
            node: Arc::clone(node),
            options: options.clone(),
            children: edges.iter().map(super::Edge::node).collect(),
            active,
        })
    }
}

impl Target {
    /// Whether bytes of a node that a bypass may go through will be at other places.
    fn moves_bytes(&self) -> bool {
        let BlockdevDriver::Raw(raw) = &self.options.driver else {
            return false;
        };
        let old = self.node.children().node(FILE);
        let new = self.children.first().and_then(Option::as_ref);
        let keeps_file = matches!((&old, new), (Some(old), Some(new)) if Arc::ptr_eq(old, new));
        let is_plain = raw.offset.unwrap_or(0) == 0 && raw.size.is_none();
        !(keeps_file && is_plain)
    }
}

/// A node that has taken another's place, and what it takes to put that one back.
pub(super) struct Replacement {
    pub(super) old: Arc<Node>,
    pub(super) new: Arc<Node>,
    claims: Vec<Claim>,
}

impl Graph {
    /// Gives nodes new options; those left out go back to their defaults.
    ///
    /// # Errors
    /// A node is missing, an option cannot be changed, a user of a node forbids it, or a driver fails. Nothing has changed then.
    pub async fn blockdev_reopen(&self, options: Vec<BlockdevOptions>) -> Result<(), Error> {
        let _change = self.change.lock().await;
        // The reference lets no reopening be about it.
        let is_about_activity = |options: &BlockdevOptions| {
            let node = options
                .node_name
                .as_ref()
                .and_then(|name| self.lookup(name));
            node.is_some_and(|node| node.options().active.is_some())
                || options.active == Some(false)
        };
        if options.iter().any(is_about_activity) {
            return Err(Error::generic(
                "Option 'active' cannot be reset to its default value",
            ));
        }
        self.reopen(options).await
    }

    /// The same for whoever holds the lock on changes.
    pub(super) async fn reopen(&self, options: Vec<BlockdevOptions>) -> Result<(), Error> {
        let mut targets = Vec::new();
        let mut turning_read_only = names_turning_read_only(&options);
        for options in options {
            let Some(name) = &options.node_name else {
                return Err(Error::generic("node-name not specified"));
            };
            let node = self.named(name)?;
            self.add_target(node, options, &mut targets, &mut turning_read_only)?;
        }
        let nodes: Vec<Arc<Node>> = targets
            .iter()
            .map(|target| Arc::clone(&target.node))
            .collect();
        let _drained = self.drain(&nodes).await;
        for target in targets.iter().filter(|target| target.moves_bytes()) {
            for root in self.roots_above(std::slice::from_ref(&target.node)) {
                root.check_no_bypass(&target.node)?;
            }
        }
        let mut replaced = Vec::new();
        let result = self.replace_all(&targets, &mut replaced).await;
        if result.is_err() {
            for replacement in replaced.into_iter().rev() {
                self.put_back(replacement);
            }
            return result;
        }
        for Replacement { old, .. } in replaced {
            for orphan in self.let_go(old.children()) {
                self.close_unused(orphan).await;
            }
        }
        Ok(())
    }

    /// Checks what can be checked beforehand, and adds the node after those of its children that are described with it.
    fn add_target(
        &self,
        node: Arc<Node>,
        mut options: BlockdevOptions,
        targets: &mut Vec<Target>,
        turning_read_only: &mut Vec<String>,
    ) -> Result<(), Error> {
        if options.driver.name() != node.driver_name() {
            return Err(cannot_change("driver"));
        }
        if let Some(present) = node.definition() {
            take_own_children(&node, present, &mut options)?;
        }
        if let (Driver::Protocol(_), Some(present)) = (node.driver(), node.definition()) {
            check_fixed_options(present, &options)?;
        }
        if options.force_share.unwrap_or(false) != node.options().force_share {
            return Err(cannot_change("force-share"));
        }
        if options.read_only == Some(true) && self.has_writers(&node, turning_read_only) {
            return Err(Error::generic(format!(
                "Read-only block node '{}' cannot support read-write users",
                node.name()
            )));
        }
        let mut children: Vec<Option<Arc<Node>>> = node
            .children()
            .edges()
            .iter()
            .map(super::Edge::node)
            .collect();
        let mut place = |child: ChildId, reference: Option<&BlockdevRef>| -> Result<(), Error> {
            let Some(reference) = reference else {
                return Ok(());
            };
            let Some(place) = children.get_mut(usize::from(child.0)) else {
                return Ok(());
            };
            match reference {
                BlockdevRef::Reference(name) => *place = Some(self.find(name)?),
                BlockdevRef::Definition(definition) => {
                    let present = place
                        .clone()
                        .ok_or_else(|| cannot_change(child_name(child)))?;
                    let mut definition = (**definition).clone();
                    inherit(
                        &mut definition,
                        &options,
                        if child == BACKING {
                            Place::Backing
                        } else {
                            Place::Image
                        },
                    );
                    definition.node_name = Some(present.name().to_owned());
                    turning_read_only
                        .extend(names_turning_read_only(std::slice::from_ref(&definition)));
                    self.add_target(present, definition, targets, turning_read_only)?;
                }
            }
            Ok(())
        };
        match &options.driver {
            BlockdevDriver::Compress(compress) => place(FILE, Some(&compress.file))?,
            BlockdevDriver::Raw(raw) => place(FILE, Some(&raw.file))?,
            BlockdevDriver::Qcow2(qcow2) => {
                place(FILE, Some(&qcow2.file))?;
                place(DATA_FILE, qcow2.data_file.as_ref())?;
                match &qcow2.backing {
                    Some(BlockdevRefOrNull::Reference(name)) => {
                        place(BACKING, Some(&BlockdevRef::Reference(name.clone())))?;
                    }
                    Some(BlockdevRefOrNull::Definition(definition)) => {
                        place(BACKING, Some(&BlockdevRef::Definition(definition.clone())))?;
                    }
                    Some(BlockdevRefOrNull::Null) => {
                        if let Some(place) = children.get_mut(usize::from(BACKING.0)) {
                            *place = None;
                        }
                    }
                    None if node.children().node(BACKING).is_some() => {
                        return Err(Error::generic(format!(
                            "backing is missing for '{}'",
                            node.name()
                        )));
                    }
                    None => {}
                }
            }
            BlockdevDriver::File(_)
            | BlockdevDriver::HostDevice(_)
            | BlockdevDriver::IoUring(_)
            | BlockdevDriver::Nbd(_)
            | BlockdevDriver::NullCo(_)
            | BlockdevDriver::NullAio(_)
            | BlockdevDriver::VirtioBlkVhostUser(_) => {}
        }
        let named = node.children().edges().iter().zip(&children);
        for (edge, child) in named.filter_map(|(edge, child)| Some((edge, child.as_ref()?))) {
            if top_down(std::slice::from_ref(child))
                .iter()
                .any(|below| Arc::ptr_eq(below, &node))
            {
                return Err(Error::generic(format!(
                    "Making '{}' a {} child of '{}' would create a cycle",
                    child.name(),
                    edge.name(),
                    node.name()
                )));
            }
        }
        let active = node.is_active();
        targets.push(Target {
            node,
            options,
            children,
            active,
        });
        Ok(())
    }

    /// Whether anybody writes to the node who will go on to.
    fn has_writers(&self, node: &Arc<Node>, turning_read_only: &[String]) -> bool {
        let writes = |claim: Claim| claim.permissions.intersects(Permissions::WRITABLE);
        let goes_on =
            |parent: &&Arc<Node>| !turning_read_only.iter().any(|name| name == parent.name());
        let by_nodes = self.nodes.borrow().iter().filter(goes_on).any(|parent| {
            let is_node =
                |edge: &super::Edge| edge.node().is_some_and(|child| Arc::ptr_eq(&child, node));
            parent
                .children()
                .edges()
                .iter()
                .any(|edge| is_node(edge) && writes(edge.claim()))
        });
        by_nodes && self.roots_of(node).next().is_none()
            || self.roots_of(node).any(|root| writes(root.claim()))
    }

    async fn replace_all(
        &self,
        targets: &[Target],
        replaced: &mut Vec<Replacement>,
    ) -> Result<(), Error> {
        for target in targets {
            let replacement = self.replacement(target).await?;
            self.swap(&replacement.old, &replacement.new);
            replaced.push(replacement);
        }
        let news: Vec<Arc<Node>> = replaced
            .iter()
            .map(|replacement| Arc::clone(&replacement.new))
            .collect();
        Plan::make(self, &news, Vec::new())?.commit();
        Ok(())
    }

    /// Opens the node that is to take the target's place. On failure the target is as it was.
    pub(super) async fn replacement(&self, target: &Target) -> Result<Replacement, Error> {
        let old = &target.node;
        let options = node_options(&target.options)?;
        if old.is_active() && !old.is_read_only() {
            self.flush(old).await;
        }
        let claims = old
            .children()
            .edges()
            .iter()
            .map(super::Edge::claim)
            .collect();
        if let Driver::Protocol(leaf) = old.driver() {
            let driver = leaf.reopened(&target.options.driver, &options)?;
            let read_only = options.read_only;
            let new = Node::new(
                old.name().to_owned(),
                old.driver_name(),
                Driver::Protocol(driver),
                Children::new(&[]),
                options,
                read_only,
            );
            let new = new
                .with_events(self.events.clone())
                .defined_by(&target.options)
                .continuing(old);
            new.set_active(target.active);
            let new = Arc::new(new);
            return Ok(Replacement {
                old: Arc::clone(old),
                new,
                claims,
            });
        }
        let names: Vec<&'static str> = old
            .children()
            .edges()
            .iter()
            .map(super::Edge::name)
            .collect();
        let opening = Opening::new(self, old.name(), target.active, &names);
        for edge in old.children().edges() {
            edge.set_claim(Claim::NONE);
        }
        match self.open_again(target, &opening, options).await {
            Ok(new) => {
                opening.settle();
                Ok(Replacement {
                    old: Arc::clone(old),
                    new,
                    claims,
                })
            }
            Err(error) => {
                opening.settle();
                self.let_go(&opening.children);
                self.restore(old, &claims);
                Err(error)
            }
        }
    }

    async fn open_again(
        &self,
        target: &Target,
        opening: &Opening<'_>,
        mut options: super::NodeOptions,
    ) -> Result<Arc<Node>, Error> {
        let old = &target.node;
        if old.is_active() {
            self.close_image(old).await;
        }
        let file = target.children.first().and_then(Option::as_ref);
        let file = file.and_then(|file| self.lookup(file.name()));
        if options.auto_read_only && file.is_some_and(|file| file.is_read_only()) {
            options.read_only = true;
        }
        let writable = !options.read_only && target.active;
        let passes_through = matches!(
            target.options.driver,
            BlockdevDriver::Compress(_) | BlockdevDriver::Raw(_)
        );
        for (id, child) in (0u8..).map(ChildId).zip(&target.children) {
            if let Some(child) = child {
                // It may have been replaced just now.
                let child = self.lookup(child.name()).unwrap_or(Arc::clone(child));
                opening
                    .put(id, child, writable && id != BACKING, passes_through)
                    .await?;
            }
        }
        let children = opening.children.clone();
        let driver: Driver = match &target.options.driver {
            BlockdevDriver::Compress(_) => Driver::Format(Box::new(Compress::open(children)?)),
            BlockdevDriver::Raw(raw) => Driver::Format(Box::new(raw::Raw::open(children, raw)?)),
            BlockdevDriver::Qcow2(qcow2) => {
                let (own, common) = (qcow2.clone(), driver_options(&options, target.active));
                let opened = self
                    .on_main(move || async move { qcow2::open(children, own, common).await })
                    .await?;
                let driver = match target.active && !old.is_active() {
                    true => {
                        opened.map_err(|error| error.context("Could not reopen qcow2 layer"))?
                    }
                    false => opened?,
                };
                Driver::Format(Box::new(driver))
            }
            other => {
                return Err(Error::generic(format!(
                    "'{}' is not a format",
                    other.name()
                )));
            }
        };
        let read_only = options.read_only;
        let new = Node::new(
            old.name().to_owned(),
            old.driver_name(),
            driver,
            opening.children.clone(),
            options,
            read_only,
        );
        let new = new
            .with_events(self.events.clone())
            .defined_by(&target.options)
            .continuing(old);
        new.set_active(target.active);
        Ok(Arc::new(new))
    }

    /// Puts `new` everywhere `old` was.
    pub(super) fn swap(&self, old: &Arc<Node>, new: &Arc<Node>) {
        for list in [&self.nodes, &self.monitor_owned] {
            for node in list
                .borrow_mut()
                .iter_mut()
                .filter(|node| Arc::ptr_eq(node, old))
            {
                *node = Arc::clone(new);
            }
        }
        for parent in self.nodes.borrow().iter() {
            for edge in parent.children().edges() {
                if edge.node().is_some_and(|child| Arc::ptr_eq(&child, old)) {
                    edge.set_node(Some(Arc::clone(new)));
                }
            }
        }
        for root in self.roots_of(old) {
            root.set_node(Some(Arc::clone(new)));
        }
    }

    pub(super) fn put_back(&self, replacement: Replacement) {
        let Replacement { old, new, claims } = replacement;
        self.swap(&new, &old);
        self.let_go(new.children());
        self.restore(&old, &claims);
    }

    /// Gives a node's claims back to it.
    fn restore(&self, node: &Arc<Node>, claims: &[Claim]) {
        for (edge, claim) in node.children().edges().iter().zip(claims) {
            edge.set_claim(*claim);
        }
        self.release_claims(std::slice::from_ref(node));
    }

    /// Writes everything out that a format keeps in memory and leaves its image clean.
    pub(super) async fn close_image(&self, node: &Arc<Node>) {
        if let Err(errno) = self.finish_image(node).await {
            tracing::error!(node = node.name(), %errno, "closing the image failed");
        }
    }

    /// The same for callers who need to know how it went.
    pub(super) async fn finish_image(&self, node: &Arc<Node>) -> Result<(), Errno> {
        let closing = Arc::clone(node);
        let closed = self.on_main(move || async move {
            match closing.driver() {
                Driver::Format(format) => format.close().await,
                Driver::Protocol(_) => Ok(()),
            }
        });
        closed.await.unwrap_or(Err(Errno::EIO))
    }
}

/// The error for an option that stays as it was when the node opened.
pub(crate) fn cannot_change(option: &str) -> Error {
    Error::generic(format!("Cannot change the option '{option}'"))
}

/// Sees to those children that are defined with their parent: they are reopened with it, also where the new options only name them.
/// Other children cannot be defined anew.
fn take_own_children(
    node: &Node,
    present: &BlockdevOptions,
    wanted: &mut BlockdevOptions,
) -> Result<(), Error> {
    let take = |child: ChildId, present: &BlockdevRef, wanted: &mut BlockdevRef| {
        let held = node.children().node(child);
        match (present, &*wanted) {
            (BlockdevRef::Definition(own), BlockdevRef::Reference(name))
                if held.is_some_and(|held| held.name() == name) =>
            {
                *wanted = BlockdevRef::Definition(own.clone());
                Ok(())
            }
            (BlockdevRef::Reference(_), BlockdevRef::Definition(_)) => {
                Err(cannot_change(&format!("{}.driver", child_name(child))))
            }
            _ => Ok(()),
        }
    };
    match (&present.driver, &mut wanted.driver) {
        (BlockdevDriver::Raw(present), BlockdevDriver::Raw(wanted)) => {
            take(FILE, &present.file, &mut wanted.file)
        }
        (BlockdevDriver::Qcow2(present), BlockdevDriver::Qcow2(wanted)) => {
            take(FILE, &present.file, &mut wanted.file)?;
            if let (Some(present), Some(wanted)) = (&present.data_file, &mut wanted.data_file) {
                take(DATA_FILE, present, wanted)?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Options of leaves that can be changed, with those that every node has.
const CHANGEABLE: &[&str] = &[
    "node-name",
    "discard",
    "cache",
    "active",
    "read-only",
    "auto-read-only",
    "force-share",
    "detect-zeroes",
    "drop-cache",
    "x-check-cache-dropped",
];

/// Options that are back at their default when they are not given.
const OPTIONAL: &[&str] = &["x-check-cache-dropped"];

/// Checks that a leaf keeps those of its options that cannot be changed.
fn check_fixed_options(present: &BlockdevOptions, wanted: &BlockdevOptions) -> Result<(), Error> {
    let (Value::Object(present), Value::Object(wanted)) = (to_json(present), to_json(wanted))
    else {
        return Ok(());
    };
    let is_generic = |name: &str| name != "drop-cache" && CHANGEABLE.contains(&name);
    for name in present.keys() {
        let name = name.as_str();
        if !wanted.contains_key(name) && !is_generic(name) && !OPTIONAL.contains(&name) {
            return Err(Error::generic(format!(
                "Option '{name}' cannot be reset to its default value"
            )));
        }
    }
    for (name, value) in &wanted {
        if !CHANGEABLE.contains(&name.as_str()) && present.get(name) != Some(value) {
            return Err(cannot_change(name));
        }
    }
    Ok(())
}

fn names_turning_read_only(options: &[BlockdevOptions]) -> Vec<String> {
    let read_only = options.iter().filter(|node| node.read_only == Some(true));
    read_only
        .filter_map(|node| node.node_name.clone())
        .collect()
}

fn child_name(child: ChildId) -> &'static str {
    match child {
        BACKING => "backing",
        DATA_FILE => "data-file",
        _ => "file",
    }
}
