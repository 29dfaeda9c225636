//! The commands that look at block nodes, watch them and change them.

use std::rc::Rc;

use nix::errno::Errno;
use stord_block::graph::BlockEvent;
use stord_block::{Failure, Failures};
use stord_qmp::command::Registry;
use stord_qmp::schema::block::{
    BlockdevReopen, BlockdevSetActive, BlockdevSetIothread, ChangeBackingFile, StrOrNull,
};
use stord_qmp::schema::statistics::{
    BlockErrorAction, BlockImageCorrupted, BlockInfo, BlockIoError, BlockSetWriteThreshold,
    BlockWriteThreshold, IoOperationType, QueryBlockstats,
};
use stord_qmp::{Error, Event};

use crate::daemon::Daemon;
use crate::report::reason;

/// Adds the commands and the events.
pub fn add(registry: &mut Registry<Daemon>) {
    // Guests' devices, of which there are none.
    registry.add("query-block", |_: Rc<Daemon>, (): ()| async {
        Ok(Vec::<BlockInfo>::new())
    });
    registry.add_event::<BlockWriteThreshold>();
    registry.add_event::<BlockImageCorrupted>();
    registry.add_event::<BlockIoError>();
    registry.add(
        "blockdev-set-active",
        |daemon: Rc<Daemon>, arguments: BlockdevSetActive| async move {
            let BlockdevSetActive { node_name, active } = arguments;
            daemon.graph.set_active(node_name.as_deref(), active).await
        },
    );
    registry
        .add(
            "x-blockdev-set-iothread",
            |daemon: Rc<Daemon>, arguments: BlockdevSetIothread| async move {
                let BlockdevSetIothread {
                    node_name,
                    iothread,
                    force,
                } = arguments;
                let iothread = match &iothread {
                    StrOrNull::S(id) => Some(id.as_str()),
                    StrOrNull::Null => None,
                };
                let force = force.unwrap_or(false);
                daemon.graph.set_iothread(&node_name, iothread, force)
            },
        )
        .features(&["unstable"]);
    registry.add(
        "change-backing-file",
        |daemon: Rc<Daemon>, arguments: ChangeBackingFile| async move {
            daemon.graph.change_backing_file(&arguments).await
        },
    );
    registry.add(
        "blockdev-reopen",
        |daemon: Rc<Daemon>, BlockdevReopen { options }| async move {
            daemon.graph.blockdev_reopen(options).await
        },
    );
    registry.add(
        "query-blockstats",
        |daemon: Rc<Daemon>, QueryBlockstats { query_nodes }| async move {
            // Without nodes the question is for guests' devices, of which there are none.
            let nodes = query_nodes.unwrap_or(false);
            Ok(if nodes {
                daemon.graph.query_blockstats()
            } else {
                Vec::new()
            })
        },
    );
    registry
        .add(
            "x-debug-query-block-graph",
            |daemon: Rc<Daemon>, (): ()| async move { Ok(daemon.graph.query_block_graph()) },
        )
        .features(&["unstable"]);
    registry.add(
        "block-set-write-threshold",
        |daemon: Rc<Daemon>, arguments: BlockSetWriteThreshold| async move {
            let BlockSetWriteThreshold {
                node_name,
                write_threshold,
            } = arguments;
            daemon
                .graph
                .set_write_threshold(&node_name, write_threshold)
        },
    );
}

fn failed(failures: &Failures, failure: Failure) -> Event {
    let is_full = failure.errno == Errno::ENOSPC;
    Event::new(&BlockIoError {
        qom_path: String::new(),
        device: failures.id().to_owned(),
        node_name: Some(failures.node_name().to_owned()),
        operation: match failure.is_write {
            true => IoOperationType::Write,
            false => IoOperationType::Read,
        },
        action: BlockErrorAction::Report,
        nospace: Some(is_full),
        reason: reason(&failure.errno.into()),
    })
}

/// Tells the monitors what happens in the graph by itself. Needs a tokio `LocalSet`.
///
/// # Errors
/// Somebody else listens already.
pub fn report_events(daemon: &Daemon) -> Result<(), Error> {
    let happenings = daemon.graph.take_events();
    let mut happenings = happenings.ok_or_else(|| Error::generic("events are taken"))?;
    let events = daemon.events.clone();
    tokio::task::spawn_local(async move {
        while let Some(event) = happenings.recv().await {
            events.send(match event {
                BlockEvent::ImageCorrupted {
                    node_name,
                    message,
                    place,
                    fatal,
                } => Event::new(&BlockImageCorrupted {
                    device: String::new(),
                    node_name: Some(node_name),
                    msg: message,
                    offset: place
                        .as_ref()
                        .and_then(|place| i64::try_from(place.start).ok()),
                    size: place.and_then(|place| i64::try_from(place.end - place.start).ok()),
                    fatal,
                }),
                BlockEvent::WriteThreshold {
                    node_name,
                    threshold,
                    exceeded,
                } => Event::new(&BlockWriteThreshold {
                    node_name,
                    amount_exceeded: exceeded,
                    write_threshold: threshold,
                }),
                BlockEvent::Failed(failures) => match failures.take() {
                    Some(failure) => failed(&failures, failure),
                    None => continue,
                },
            });
        }
    });
    Ok(())
}
