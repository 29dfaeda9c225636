//! `cache-clean-interval`: what nobody uses is given back, what is used or not yet written stays.

use std::sync::Weak;
use std::time::Duration;

use stord_aio::{sim, time};

use super::super::cache::Slice;
use super::super::{Qcow2, open};
use super::harness::{created, defaults};
use crate::driver::{ExtentKind, FILE, Format, Lookup};
use crate::graph::Children;
use crate::testing::{MemoryDisk, leaf, node_options};

const INTERVAL: u64 = 60;
/// Guest bytes that a slice of 512 bytes maps with clusters of 64 KiB.
const PER_SLICE: u64 = 64 << 16;

async fn opened(disk: &MemoryDisk, interval: u64) -> Qcow2 {
    let children = Children::new(&["file", "backing", "data-file"]);
    children.edges()[usize::from(FILE.0)].set_node(Some(leaf(disk)));
    let mut options = defaults();
    options.cache_clean_interval = i64::try_from(interval).ok();
    options.l2_cache_entry_size = Some(512);
    open(children, options, node_options())
        .await
        .expect("the image opens")
}

fn mapped() -> MemoryDisk {
    MemoryDisk::new(created("preallocation=metadata", "64M"))
}

async fn look_up(image: &Qcow2, offset: u64) -> Weak<Slice> {
    loop {
        if let Lookup::Ready(extent) = image.map_read(offset, 1).expect("a sound image") {
            assert!(matches!(extent.kind, ExtentKind::Data { .. }));
            let slice = image.0.slices.get(offset / PER_SLICE);
            return slice
                .as_ref()
                .map_or_else(Weak::new, std::sync::Arc::downgrade);
        }
        image.load(offset).await.expect("a sound image");
    }
}

async fn pass(intervals: u64) {
    time::sleep(Duration::from_secs(intervals * INTERVAL)).await;
}

#[test]
fn unused_slices_are_freed_and_used_ones_stay() {
    let disk = mapped();
    sim::run(1, || async move {
        let image = opened(&disk, INTERVAL).await;
        let idle = look_up(&image, 0).await;
        let busy = look_up(&image, 5 * PER_SLICE).await;
        // Both have been used since the image opened.
        time::sleep(Duration::from_secs(INTERVAL + 1)).await;
        assert!(idle.upgrade().is_some() && busy.upgrade().is_some());
        look_up(&image, 5 * PER_SLICE).await;
        pass(1).await;
        assert!(
            idle.upgrade().is_none(),
            "nobody has used it for an interval"
        );
        assert!(busy.upgrade().is_some());
        pass(2).await;
        assert!(busy.upgrade().is_none());
        look_up(&image, 0).await;
        image.close().await.expect("it closes");
    });
}

#[test]
fn changed_metadata_stays_until_it_is_written() {
    let disk = MemoryDisk::new(created("", "64M"));
    sim::run(2, || async move {
        let image = opened(&disk, INTERVAL).await;
        let plan = image.prepare_write(0, 65536).await.expect("there is space");
        let commit = plan.commit.expect("a new cluster");
        commit.commit().await.expect("nothing fails");
        let slice = look_up(&image, 0).await;
        let refcounts = || image.0.refcount_slices();
        assert!(refcounts() > 0);
        pass(5).await;
        assert!(slice.upgrade().is_some());
        assert!(refcounts() > 0);
        image.flush().await.expect("it is written");
        pass(3).await;
        assert!(slice.upgrade().is_none());
        assert_eq!(refcounts(), 0);
        image.close().await.expect("it closes");
    });
}

#[test]
fn nothing_is_freed_where_cleaning_is_off() {
    let disk = mapped();
    sim::run(3, || async move {
        let image = opened(&disk, 0).await;
        let slice = look_up(&image, 0).await;
        pass(100).await;
        assert!(slice.upgrade().is_some());
        image.close().await.expect("it closes");
    });
}
