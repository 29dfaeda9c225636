//! The commands that this daemon executes: each one a line of wiring to the library that does it.

use std::rc::Rc;

use stord_qmp::Error;
use stord_qmp::command::Registry;
use stord_qmp::schema::block::{BlockResize, BlockdevDel, BlockdevOptions, QueryNamedBlockNodes};
use stord_qmp::schema::control::{VersionInfo, VersionTriple};
use stord_qmp::schema::export::{
    BlockExportDel, BlockExportDeleted, BlockExportOptions, BlockExportRemoveMode,
};
use stord_qmp::schema::nbd::{NbdServerAddOptions, NbdServerOptionsLegacy, NbdServerRemove};

use super::{bitmaps, chardevs, jobs, nodes, objects, snapshots};
use crate::daemon::Daemon;

/// What the greeting and `query-version` report: the version of the interface, not ours, since
/// clients decide by it what they may ask for.
pub fn version() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple {
            major: 10,
            minor: 0,
            micro: 2,
        },
        package: format!("stord {}", env!("CARGO_PKG_VERSION")),
    }
}

/// The table of commands and events.
pub fn registry() -> Registry<Daemon> {
    let mut registry = Registry::new();
    add_control(&mut registry);
    add_nodes(&mut registry);
    add_exports(&mut registry);
    add_nbd(&mut registry);
    objects::add(&mut registry);
    chardevs::add(&mut registry);
    jobs::add(&mut registry);
    nodes::add(&mut registry);
    snapshots::add(&mut registry);
    bitmaps::add(&mut registry);
    registry
}

fn add_control(registry: &mut Registry<Daemon>) {
    registry.add("query-version", |_: Rc<Daemon>, (): ()| async {
        Ok(version())
    });
    registry.add("quit", |daemon: Rc<Daemon>, (): ()| async move {
        daemon.shutdown.request();
        Ok(())
    });
}

fn add_nodes(registry: &mut Registry<Daemon>) {
    registry.add(
        "blockdev-add",
        |daemon: Rc<Daemon>, options: BlockdevOptions| async move {
            daemon.graph.blockdev_add(options).await
        },
    );
    registry.add(
        "blockdev-del",
        |daemon: Rc<Daemon>, BlockdevDel { node_name }| async move {
            daemon.graph.blockdev_del(&node_name).await
        },
    );
    registry.add(
        "query-named-block-nodes",
        |daemon: Rc<Daemon>, QueryNamedBlockNodes { flat }| async move {
            daemon
                .graph
                .query_named_block_nodes(flat.unwrap_or(false))
                .await
        },
    );
    registry.add(
        "block_resize",
        |daemon: Rc<Daemon>, arguments: BlockResize| async move {
            resize(&daemon, arguments).await
        },
    );
}

async fn resize(daemon: &Daemon, arguments: BlockResize) -> Result<(), Error> {
    let BlockResize {
        device,
        node_name,
        size,
    } = arguments;
    // Devices are what QEMU's guests have; only their nodes exist here, under another name.
    let device = device.unwrap_or_default();
    let node = node_name.unwrap_or_default();
    if daemon.graph.find(&node).is_err() {
        return Err(Error::generic(format!(
            "Cannot find device='{device}' nor node-name='{node}'"
        )));
    }
    let size =
        u64::try_from(size).map_err(|_| Error::generic("Parameter 'size' expects a >0 size"))?;
    daemon.graph.resize(&node, size).await
}

fn add_nbd(registry: &mut Registry<Daemon>) {
    registry.add(
        "nbd-server-start",
        |daemon: Rc<Daemon>, options: NbdServerOptionsLegacy| async move {
            let credentials = daemon.objects.credentials().clone();
            daemon
                .exports
                .nbd_server_start(options.into(), credentials)
                .await
        },
    );
    registry
        .add(
            "nbd-server-add",
            |daemon: Rc<Daemon>, options: NbdServerAddOptions| async move {
                daemon.exports.nbd_server_add(options).await
            },
        )
        .features(&["deprecated"]);
    registry
        .add(
            "nbd-server-remove",
            |daemon: Rc<Daemon>, NbdServerRemove { name, mode }| async move {
                let mode = mode.unwrap_or(BlockExportRemoveMode::Safe);
                daemon.exports.nbd_server_remove(&name, mode).await
            },
        )
        .features(&["deprecated"]);
    registry.add("nbd-server-stop", |daemon: Rc<Daemon>, (): ()| async move {
        daemon.exports.nbd_server_stop().await
    });
}

fn add_exports(registry: &mut Registry<Daemon>) {
    registry.add_event::<BlockExportDeleted>();
    registry.add(
        "block-export-add",
        |daemon: Rc<Daemon>, options: BlockExportOptions| async move {
            daemon.exports.add(options).await
        },
    );
    registry.add(
        "block-export-del",
        |daemon: Rc<Daemon>, BlockExportDel { id, mode }| async move {
            let mode = mode.unwrap_or(BlockExportRemoveMode::Safe);
            daemon.exports.del(&id, mode).await
        },
    );
    registry.add(
        "query-block-exports",
        |daemon: Rc<Daemon>, (): ()| async move { Ok(daemon.exports.query()) },
    );
}
