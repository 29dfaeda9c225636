//! What is counted and noticed of requests.

use serde_json::json;
use stord_block::graph::BlockEvent;

use super::{MIB, WRITER, World, file, image, message};

#[tokio::test(flavor = "current_thread")]
async fn requests_are_counted_at_the_node_they_enter() {
    let world = World::new();
    let image = image(MIB);
    let mut options = file("f", &image);
    options["discard"] = json!("unmap");
    world
        .add(json!({"driver": "raw", "node-name": "r", "discard": "unmap", "file": options}))
        .await
        .unwrap();
    let backend = world.graph.attach("r", "test", WRITER).await.unwrap();
    world.write(&backend, 4096, vec![1; 1000]).await.unwrap();
    world.read(&backend, 0, 512).await.unwrap();
    world.read(&backend, MIB, 1).await.unwrap_err();
    let discarding = backend.clone();
    let context = world.contexts.main();
    context
        .run(move || async move {
            discarding.discard(0, 8192).await?;
            discarding.flush().await
        })
        .await
        .unwrap()
        .unwrap();
    let all = world.graph.query_blockstats();
    let raw = &all[1];
    let names: Vec<_> = all.iter().map(|stats| stats.node_name.as_deref()).collect();
    assert_eq!(names, [Some("f"), Some("r")]);
    let stats = &raw.stats;
    assert_eq!(
        (stats.wr_operations, stats.wr_bytes, stats.wr_highest_offset),
        (1, 1000, 5096)
    );
    assert_eq!((stats.rd_operations, stats.rd_bytes), (1, 512));
    assert_eq!(
        (
            stats.unmap_operations,
            stats.unmap_bytes,
            stats.flush_operations
        ),
        (1, 8192, 1)
    );
    assert!(stats.wr_total_time_ns > 0);
    let below = raw.parent.as_deref().unwrap();
    assert_eq!(below.stats.wr_highest_offset, 5096);
    let specific = stord_qmp::to_json(below)["driver-specific"].clone();
    assert_eq!(
        specific,
        json!({"driver": "file", "discard-nb-ok": 1, "discard-nb-failed": 0, "discard-bytes-ok": 8192})
    );
    let drawing = world.graph.query_block_graph();
    assert_eq!((drawing.nodes.len(), drawing.edges.len()), (3, 2));
}

#[tokio::test(flavor = "current_thread")]
async fn a_write_past_the_threshold_is_reported_once() {
    let world = World::new();
    let image = image(MIB);
    let window =
        json!({"driver": "raw", "node-name": "r", "offset": 4096, "file": file("f", &image)});
    world.add(window).await.unwrap();
    let mut events = world.graph.take_events().unwrap();
    assert!(world.graph.take_events().is_none());
    let backend = world.graph.attach("r", "test", WRITER).await.unwrap();
    world.graph.set_write_threshold("f", 5000).unwrap();
    assert_eq!(
        message(world.graph.set_write_threshold("none", 1)),
        "Device 'none' not found"
    );
    for at in [0, 1000, 2000] {
        world.write(&backend, at, vec![1; 500]).await.unwrap();
    }
    let event = BlockEvent::WriteThreshold {
        node_name: "f".to_owned(),
        threshold: 5000,
        exceeded: 4096 + 1500 - 5000,
    };
    assert_eq!(events.try_recv().unwrap(), event);
    assert!(events.try_recv().is_err());
}
