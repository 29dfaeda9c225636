//! Dirty bitmaps as users see them: added, removed, switched on and off, cleared, merged. All of it happens while the node is drained,
//! so that a bitmap holds the writes of before or after a command, never half of one.

use std::sync::Arc;

use stord_aio::Errno;
use stord_qmp::Error;

use super::{DrainedSection, Graph, Node};
use crate::bitmap::{BitmapState, DirtyBitmap, Use, check};
use crate::driver::{BACKING, BitmapStore, Driver};

/// The longest name in bytes.
const MAX_NAME: usize = 1023;
/// The least bytes that a bit stands for.
const MIN_GRANULARITY: u32 = 512;
/// Bytes that a bit stands for if neither the user nor the image says otherwise, at most, and at least.
const DEFAULT_GRANULARITY: std::ops::RangeInclusive<u64> = 4096..=65_536;

/// What a new bitmap is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewBitmap {
    /// The name.
    pub name: String,
    /// Bytes that a bit stands for; the image decides if it is not given.
    pub granularity: Option<u32>,
    /// It is stored with the image.
    pub persistent: bool,
    /// It does not record yet.
    pub disabled: bool,
}

/// A bitmap to merge from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapSource {
    /// The node; that of the target if it is not given.
    pub node: Option<String>,
    /// The bitmap's name.
    pub name: String,
}

/// A bitmap and its drained node.
struct Found {
    node: Arc<Node>,
    bitmap: Arc<DirtyBitmap>,
    _drained: DrainedSection,
}

fn store_of(node: &Node) -> Option<&dyn BitmapStore> {
    match node.driver() {
        Driver::Format(format) => format.bitmap_store(),
        Driver::Protocol(_) => None,
    }
}

/// Bytes that a bit stands for if the user does not say.
fn default_granularity(node: &Node) -> u64 {
    let cluster = match node.driver() {
        Driver::Format(format) => format.info().cluster_size,
        Driver::Protocol(_) => None,
    };
    let (least, most) = DEFAULT_GRANULARITY.into_inner();
    cluster.map_or(most, |cluster| cluster.clamp(least, most))
}

impl Graph {
    async fn find_bitmap(&self, node: &str, name: &str) -> Result<Found, Error> {
        let node = self
            .lookup(node)
            .ok_or_else(|| Error::generic(format!("Node '{node}' not found")))?;
        let drained = self.drain(std::slice::from_ref(&node)).await;
        let bitmap = node
            .bitmaps()
            .find(name)
            .ok_or_else(|| Error::generic(format!("Dirty bitmap '{name}' not found")))?;
        Ok(Found {
            node,
            bitmap,
            _drained: drained,
        })
    }

    /// Adds a bitmap to a node.
    ///
    /// # Errors
    /// There is no such node, the name or the granularity cannot be, or the bitmap cannot be stored.
    pub async fn add_bitmap(&self, node: &str, new: NewBitmap) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let NewBitmap { name, .. } = &new;
        if name.is_empty() {
            return Err(Error::generic("Bitmap name cannot be empty"));
        }
        let node = self.lookup(node).ok_or_else(|| {
            Error::generic(format!(
                "Cannot find device='{node}' nor node-name='{node}'"
            ))
        })?;
        let granularity = match new.granularity {
            Some(granularity)
                if granularity < MIN_GRANULARITY || !granularity.is_power_of_two() =>
            {
                return Err(Error::generic(
                    "Granularity must be power of 2 and at least 512",
                ));
            }
            Some(granularity) => u64::from(granularity),
            None => default_granularity(&node),
        };
        let granularity_bits = granularity.trailing_zeros();
        if new.persistent {
            let Some(store) = store_of(&node) else {
                let what = format!("Can't store persistent bitmaps to {}", node.name());
                return Err(Error::os(what, Errno::ENOTSUP));
            };
            store.check_new(name, granularity_bits).map_err(|error| {
                let node = node.name();
                error.context(format!("Can't make bitmap '{name}' persistent in '{node}'"))
            })?;
        }
        let _drained = self.drain(std::slice::from_ref(&node)).await;
        if node.bitmaps().find(name).is_some() {
            return Err(Error::generic(format!("Bitmap already exists: {name}")));
        }
        if name.len() > MAX_NAME {
            return Err(Error::generic(format!("Bitmap name too long: {name}")));
        }
        let mut state = BitmapState::empty();
        state.set(BitmapState::PERSISTENT, new.persistent);
        state.set(BitmapState::ENABLED, !new.disabled);
        let bitmap = DirtyBitmap::new(new.name, granularity_bits, node.size(), state);
        node.bitmaps().add(Arc::new(bitmap));
        Ok(())
    }

    /// Removes a bitmap from its node, and from the image that stores it.
    ///
    /// # Errors
    /// There is no such bitmap, it is in use, or the image cannot be written.
    pub async fn remove_bitmap(&self, node: &str, name: &str) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let found = self.find_bitmap(node, name).await?;
        check(&found.bitmap, Use::Remove)?;
        if found.bitmap.is(BitmapState::PERSISTENT) {
            let (node, name) = (Arc::clone(&found.node), name.to_owned());
            self.on_main(move || async move {
                match store_of(&node) {
                    Some(store) => store.remove(&name).await,
                    None => Ok(()),
                }
            })
            .await??;
        }
        found.node.bitmaps().remove(name);
        Ok(())
    }

    /// Clears a bitmap.
    ///
    /// # Errors
    /// There is no such bitmap, or it cannot be changed.
    pub async fn clear_bitmap(&self, node: &str, name: &str) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let found = self.find_bitmap(node, name).await?;
        check(&found.bitmap, Use::Change)?;
        found.bitmap.clear();
        Ok(())
    }

    /// Has a bitmap record writes from now on, or no longer.
    ///
    /// # Errors
    /// There is no such bitmap, or it cannot be used.
    pub async fn enable_bitmap(&self, node: &str, name: &str, enabled: bool) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let found = self.find_bitmap(node, name).await?;
        check(&found.bitmap, Use::Read)?;
        found.bitmap.set_state(BitmapState::ENABLED, enabled);
        found.node.bitmaps().refresh();
        Ok(())
    }

    /// Marks in `target` what any of `sources` has marked.
    ///
    /// # Errors
    /// There is no such bitmap, one of them cannot be used, or their disks have different lengths. Nothing has changed then.
    pub async fn merge_bitmaps(
        &self,
        node: &str,
        target: &str,
        sources: Vec<BitmapSource>,
    ) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let found = self.find_bitmap(node, target).await?;
        check(&found.bitmap, Use::Change)?;
        let mut merged = Vec::new();
        for source in sources {
            let from = source.node.as_deref().unwrap_or(node);
            let source = self.find_bitmap(from, &source.name).await?;
            check(&source.bitmap, Use::Read)?;
            let (to, from) = (found.bitmap.size(), source.bitmap.size());
            if to != from {
                return Err(Error::generic(format!(
                    "Bitmaps are of different sizes (destination size is {to}, source size is {from}) and can't be merged"
                )));
            }
            merged.push(source);
        }
        for source in merged {
            found.bitmap.merge(&source.bitmap);
        }
        Ok(())
    }

    /// The bitmap of that name of a node or what lies behind it, busy from now on: [`DirtyBitmap::set_busy`] gives it back. A reader
    /// who may not see writes cannot have one that still records.
    ///
    /// # Errors
    /// There is no such bitmap, or it cannot be used.
    pub fn borrow_bitmap(
        &self,
        node: &str,
        name: &str,
        is_reader: bool,
    ) -> Result<Arc<DirtyBitmap>, Error> {
        let mut node = Some(self.find(node)?);
        while let Some(layer) = node {
            if let Some(bitmap) = layer.bitmaps().find(name) {
                check(&bitmap, Use::Read)?;
                if is_reader && !layer.is_read_only() && bitmap.is(BitmapState::ENABLED) {
                    return Err(Error::generic(format!(
                        "Enabled bitmap '{name}' incompatible with readonly export"
                    )));
                }
                bitmap.set_busy(true);
                return Ok(bitmap);
            }
            node = layer.children().node(BACKING);
        }
        Err(Error::generic(format!("Bitmap '{name}' is not found")))
    }

    /// SHA-256 of a bitmap's bits, in hexadecimal.
    ///
    /// # Errors
    /// There is no such bitmap.
    pub async fn hash_bitmap(&self, node: &str, name: &str) -> Result<String, Error> {
        let _change = self.change.lock().await;
        Ok(self.find_bitmap(node, name).await?.bitmap.sha256())
    }
}
