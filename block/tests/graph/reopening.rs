//! Options and children of nodes that change while they are used.

use serde_json::{Value, json};
use stord_aio::IoBuffer;
use stord_block::Permissions;
use stord_block::graph::Claim;
use stord_qmp::schema::block::BlockdevReopen;
use stord_qmp::{Error, from_json};

use super::{MIB, WRITER, World, file, image, message};

impl World {
    async fn reopen(&self, options: Value) -> Result<(), Error> {
        let arguments: BlockdevReopen = from_json(json!({"options": options}))?;
        self.graph.blockdev_reopen(arguments.options).await
    }
}

#[tokio::test(flavor = "current_thread")]
async fn reopened_nodes_have_their_new_options_and_keep_their_users() {
    let world = World::new();
    let image = image(MIB);
    world.add(file("f", &image)).await.unwrap();
    world
        .add(json!({"driver": "raw", "node-name": "r", "file": "f"}))
        .await
        .unwrap();
    let backend = world.graph.attach("r", "test", WRITER).await.unwrap();
    world.write(&backend, 0, vec![1; 100]).await.unwrap();
    world.graph.set_write_threshold("f", 99_999).unwrap();
    let mut direct = file("f", &image);
    direct["cache"] = json!({"direct": true});
    let window = json!({"driver": "raw", "node-name": "r", "file": "f", "size": 65536, "detect-zeroes": "on"});
    world.reopen(json!([direct, window])).await.unwrap();
    assert_eq!(backend.size(), 65536);
    assert_eq!(world.read(&backend, 99, 2).await.unwrap(), [1, 0]);
    world.write(&backend, 50, vec![2; 5000]).await.unwrap();
    let infos = world.graph.query_named_block_nodes(true).await.unwrap();
    assert!(infos[1].cache.direct && infos[1].write_threshold == 99_999);
    // Only read now, and the lock goes with the writer.
    world.graph.detach(backend).await;
    let read_only = json!({"driver": "raw", "node-name": "r", "read-only": true, "file": "f"});
    world.reopen(json!([read_only])).await.unwrap();
    assert_eq!(
        message(world.graph.attach("r", "test", WRITER).await),
        "Block node is read-only"
    );
    let other = World::new();
    other.add(file("f", &image)).await.unwrap();
    other.graph.attach("f", "test", WRITER).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_reopening_that_fails_changes_nothing() {
    let world = World::new();
    let image = image(MIB);
    world.add(file("f", &image)).await.unwrap();
    world
        .add(json!({"driver": "raw", "node-name": "r", "file": "f"}))
        .await
        .unwrap();
    let backend = world.graph.attach("r", "test", WRITER).await.unwrap();
    let mut direct = file("f", &image);
    direct["cache"] = json!({"direct": true});
    let too_far = json!({"driver": "raw", "node-name": "r", "file": "f", "offset": 2 * MIB});
    let failed = world.reopen(json!([direct, too_far])).await;
    assert!(message(failed).starts_with("Offset (2097152) cannot be greater"));
    world.write(&backend, MIB - 10, vec![3; 10]).await.unwrap();
    let infos = world.graph.query_named_block_nodes(true).await.unwrap();
    assert!(!infos[1].cache.direct);
    for (options, text) in [
        (
            json!({"driver": "raw", "file": "f"}),
            "node-name not specified",
        ),
        (
            json!({"driver": "raw", "file": "f", "node-name": "x"}),
            "Failed to find node with node-name='x'",
        ),
        (
            json!({"driver": "null-co", "node-name": "r"}),
            "Cannot change the option 'driver'",
        ),
        (
            json!({"driver": "file", "filename": "/x", "node-name": "f"}),
            "Cannot change the option 'filename'",
        ),
        (
            json!({"driver": "raw", "node-name": "r", "file": "f", "read-only": true}),
            "Read-only block node 'r' cannot support read-write users",
        ),
        (
            json!({"driver": "raw", "node-name": "r", "file": "r"}),
            "Making 'r' a file child of 'r' would create a cycle",
        ),
    ] {
        assert_eq!(message(world.reopen(json!([options])).await), text);
    }
    let jealous = Claim {
        permissions: Permissions::CONSISTENT_READ,
        shared: Permissions::CONSISTENT_READ,
    };
    assert!(
        message(world.graph.attach("f", "other", jealous).await).contains("Permission conflict")
    );
    world.graph.detach(backend).await;
    world.graph.attach("f", "other", jealous).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn requests_go_on_while_their_node_is_reopened() {
    let world = World::new();
    let image = image(MIB);
    world.add(file("f", &image)).await.unwrap();
    let backend = world.graph.attach("f", "test", WRITER).await.unwrap();
    let load = {
        let backend = backend.clone();
        world
            .contexts
            .shared(2)
            .unwrap()
            .pop()
            .unwrap()
            .run(move || async move {
                for i in 0..2048u64 {
                    let at = i * 512 % MIB;
                    backend
                        .write(at, IoBuffer::copy_of(&[1; 512]).into(), false)
                        .await
                        .unwrap();
                }
            })
    };
    let edits = async {
        for i in 0..50 {
            let mut options = file("f", &image);
            options["cache"] = json!({"direct": i % 2 == 0});
            world.reopen(json!([options])).await.unwrap();
        }
    };
    let (loaded, ()) = tokio::join!(load, edits);
    loaded.unwrap();
    assert!(
        world
            .read(&backend, 0, 1 << 20)
            .await
            .unwrap()
            .iter()
            .all(|byte| *byte == 1)
    );
}

#[tokio::test(flavor = "current_thread")]
async fn a_child_can_be_exchanged() {
    let world = World::new();
    let (first, second) = (image(MIB), image(2 * MIB));
    world.add(file("a", &first)).await.unwrap();
    world.add(file("b", &second)).await.unwrap();
    world
        .add(json!({"driver": "raw", "node-name": "r", "file": "a"}))
        .await
        .unwrap();
    let backend = world.graph.attach("r", "test", WRITER).await.unwrap();
    world
        .reopen(json!([{"driver": "raw", "node-name": "r", "file": "b"}]))
        .await
        .unwrap();
    world.write(&backend, MIB, vec![9]).await.unwrap();
    assert_eq!(
        std::fs::read(second.path()).unwrap()[usize::try_from(MIB).unwrap()],
        9
    );
    world.graph.blockdev_del("a").await.unwrap();
    assert_eq!(
        message(world.graph.blockdev_del("b").await),
        "Block device b is in use"
    );
}
