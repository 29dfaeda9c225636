//! The graph from outside: opening, claims, drained sections, removal, over real files.

mod counters;
mod reopening;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use stord_aio::{Errno, IoBuffer};
use stord_block::graph::Claim;
use stord_block::{Backend, BackendListener, Contexts, Graph, Permissions, ZeroFlags};
use stord_qmp::{Error, from_json};
use tempfile::NamedTempFile;

const MIB: u64 = 1 << 20;

const READER: Claim = Claim {
    permissions: Permissions::CONSISTENT_READ,
    shared: Permissions::all(),
};
const WRITER: Claim = Claim {
    permissions: Permissions::CONSISTENT_READ.union(Permissions::WRITE),
    shared: Permissions::all(),
};

struct World {
    graph: Graph,
    contexts: Rc<Contexts>,
}

impl World {
    fn new() -> Self {
        let contexts = Rc::new(Contexts::start().unwrap());
        Self {
            graph: Graph::new(Rc::clone(&contexts)),
            contexts,
        }
    }

    async fn add(&self, options: Value) -> Result<(), Error> {
        self.graph.blockdev_add(from_json(options)?).await
    }

    async fn read(&self, backend: &Backend, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let backend = backend.clone();
        self.contexts
            .main()
            .run(move || async move {
                let buffer = IoBuffer::zeroed(len);
                backend.read(offset, buffer.clone().into()).await?;
                Ok(buffer.to_vec())
            })
            .await
            .unwrap()
    }

    async fn write(&self, backend: &Backend, offset: u64, bytes: Vec<u8>) -> Result<(), Errno> {
        let backend = backend.clone();
        self.contexts
            .main()
            .run(move || async move {
                backend
                    .write(offset, IoBuffer::copy_of(&bytes).into(), false)
                    .await
            })
            .await
            .unwrap()
    }

    async fn names(&self) -> Vec<String> {
        let infos = self.graph.query_named_block_nodes(true).await.unwrap();
        infos
            .into_iter()
            .filter_map(|info| info.node_name)
            .collect()
    }
}

fn image(len: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

fn file(name: &str, image: &NamedTempFile) -> Value {
    json!({"driver": "file", "node-name": name, "filename": image.path()})
}

fn message<T>(result: Result<T, Error>) -> String {
    result
        .err()
        .map_or_else(|| "no error".to_owned(), |error| error.message)
}

#[tokio::test(flavor = "current_thread")]
async fn writes_of_any_alignment_reach_a_direct_file() {
    let world = World::new();
    let image = image(MIB + 100);
    let mut options = file("f", &image);
    options["cache"] = json!({"direct": true});
    world.add(options).await.unwrap();
    let backend = world.graph.attach("f", "test", WRITER).await.unwrap();
    let mut model = vec![0u8; usize::try_from(MIB + 100).unwrap()];
    for (at, len) in [
        (0, 4096),
        (1, 1),
        (511, 2),
        (4095, 4098),
        (70_000, 33_333),
        (MIB, 100),
    ] {
        let bytes: Vec<u8> = (0..len)
            .map(|i| u8::try_from((i * 7 + len) % 251).unwrap())
            .collect();
        model[usize::try_from(at).unwrap()..][..bytes.len()].copy_from_slice(&bytes);
        world.write(&backend, at, bytes).await.unwrap();
    }
    assert!(world.read(&backend, 0, model.len()).await.unwrap() == model);
    assert_eq!(
        world.read(&backend, 4000, 200).await.unwrap(),
        model[4000..4200]
    );
    world.graph.detach(backend).await;
    assert!(std::fs::read(image.path()).unwrap()[..model.len()] == model);
}

#[tokio::test(flavor = "current_thread")]
async fn concurrent_writes_within_one_block_are_all_kept() {
    let world = World::new();
    let image = image(64 * 1024);
    let mut options = file("f", &image);
    options["cache"] = json!({"direct": true});
    world.add(options).await.unwrap();
    let backend = world.graph.attach("f", "test", WRITER).await.unwrap();
    // 64 bytes each, so that many share a block, from two contexts at once.
    let contexts = world.contexts.shared(2).unwrap();
    let mut halves = Vec::new();
    for (half, context) in contexts
        .iter()
        .chain(&contexts[..2 - contexts.len().min(2)])
        .enumerate()
    {
        let backend = backend.clone();
        halves.push(context.run(move || async move {
            let writes = (0..512u64).map(|i| {
                let index = 2 * i + u64::try_from(half).unwrap();
                let bytes = IoBuffer::copy_of(&[u8::try_from(index % 255 + 1).unwrap(); 64]);
                let backend = backend.clone();
                async move { backend.write(index * 64, bytes.into(), false).await }
            });
            for result in stord_aio::join_all(writes.collect()).await {
                result.unwrap();
            }
        }));
    }
    for half in halves {
        half.await.unwrap();
    }
    world.graph.detach(backend).await;
    let content = std::fs::read(image.path()).unwrap();
    for index in 0..1024 {
        assert_eq!(
            content[index * 64..][..64],
            [u8::try_from(index % 255 + 1).unwrap(); 64],
            "piece {index}"
        );
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_failed_open_leaves_nothing_behind() {
    let world = World::new();
    let image = image(MIB);
    let raw =
        json!({"driver": "raw", "node-name": "r", "offset": 2 * MIB, "file": file("f", &image)});
    assert_eq!(
        message(world.add(raw).await),
        "Offset (2097152) cannot be greater than size of the containing file (1048576)"
    );
    let missing = json!({"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "/nonexistent/x"}});
    assert_eq!(
        message(world.add(missing).await),
        "Could not open '/nonexistent/x': No such file or directory"
    );
    let directory =
        json!({"driver": "file", "node-name": "d", "filename": "/tmp", "read-only": true});
    assert_eq!(
        message(world.add(directory).await),
        "'file' driver requires '/tmp' to be a regular file"
    );
    assert!(world.names().await.is_empty());
    // Not even a lock.
    world
        .add(json!({"driver": "raw", "node-name": "r", "file": file("f", &image)}))
        .await
        .unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn node_names_are_checked() {
    let world = World::new();
    let image = image(MIB);
    world.add(file("f", &image)).await.unwrap();
    assert_eq!(
        message(world.add(file("f", &image)).await),
        "Duplicate nodes with node-name='f'"
    );
    assert_eq!(
        message(world.add(file("1f", &image)).await),
        "Invalid node-name: '1f'"
    );
    assert_eq!(
        message(world.add(file(&"f".repeat(32), &image)).await),
        "Node name too long"
    );
    let unnamed = json!({"driver": "file", "filename": image.path()});
    assert_eq!(
        message(world.add(unnamed).await),
        "'node-name' must be specified for the root node"
    );
    let lost = json!({"driver": "raw", "node-name": "r", "file": "nobody"});
    assert_eq!(
        message(world.add(lost).await),
        "Cannot find device='nobody' nor node-name='nobody'"
    );
}

#[tokio::test(flavor = "current_thread")]
async fn nodes_in_use_stay() {
    let world = World::new();
    let image = image(MIB);
    world.add(file("f", &image)).await.unwrap();
    world
        .add(json!({"driver": "raw", "node-name": "r", "file": "f"}))
        .await
        .unwrap();
    world.add(json!({"driver": "raw", "node-name": "over", "file": {"driver": "null-co", "node-name": "inner"}})).await.unwrap();
    assert_eq!(
        message(world.graph.blockdev_del("f").await),
        "Block device f is in use"
    );
    assert_eq!(
        message(world.graph.blockdev_del("inner").await),
        "Node inner is not owned by the monitor"
    );
    assert_eq!(
        message(world.graph.blockdev_del("none").await),
        "Failed to find node with node-name='none'"
    );
    let backend = world.graph.attach("r", "test", READER).await.unwrap();
    assert_eq!(
        message(world.graph.blockdev_del("r").await),
        "Node r is in use"
    );
    world.graph.detach(backend).await;
    for name in ["r", "f", "over"] {
        world.graph.blockdev_del(name).await.unwrap();
    }
    assert!(world.names().await.is_empty());
}

#[tokio::test(flavor = "current_thread")]
async fn users_that_do_not_share_exclude_each_other() {
    let world = World::new();
    let image = image(MIB);
    world
        .add(json!({"driver": "raw", "node-name": "r", "file": file("f", &image)}))
        .await
        .unwrap();
    let jealous = Claim {
        permissions: Permissions::CONSISTENT_READ,
        shared: Permissions::CONSISTENT_READ,
    };
    let reader = world
        .graph
        .attach("r", "block export 'a'", jealous)
        .await
        .unwrap();
    assert_eq!(
        message(world.graph.attach("f", "block export 'b'", WRITER).await),
        "Permission conflict on node 'f': permissions 'write' are both required by block export 'b' (uses node 'f' as 'root' child) \
         and unshared by node 'r' (uses node 'f' as 'file' child)."
    );
    // The refused one has left no trace.
    let second = world
        .graph
        .attach("f", "block export 'c'", READER)
        .await
        .unwrap();
    world.graph.detach(reader).await;
    world
        .graph
        .attach("f", "block export 'b'", WRITER)
        .await
        .unwrap();
    drop(second);
}

#[tokio::test(flavor = "current_thread")]
async fn an_image_that_another_process_writes_is_refused() {
    let image = image(MIB);
    let (ours, theirs) = (World::new(), World::new());
    theirs.add(file("f", &image)).await.unwrap();
    let writer = theirs.graph.attach("f", "test", WRITER).await.unwrap();
    let jealous = Claim {
        permissions: Permissions::CONSISTENT_READ,
        shared: Permissions::CONSISTENT_READ,
    };
    ours.add(file("f", &image)).await.unwrap();
    let refused = ours.graph.attach("f", "test", jealous).await.err().unwrap();
    assert_eq!(refused.message, "Failed to get shared \"write\" lock");
    assert_eq!(
        refused.hint.unwrap(),
        format!(
            "Is another process using the image [{}]?",
            image.path().display()
        )
    );
    theirs.graph.detach(writer).await;
    ours.graph.attach("f", "test", jealous).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn read_only_nodes_refuse_writers_and_auto_read_only_ones_open_for_them() {
    let world = World::new();
    let image = image(MIB);
    let mut fixed = file("fixed", &image);
    fixed["read-only"] = json!(true);
    world.add(fixed).await.unwrap();
    assert_eq!(
        message(world.graph.attach("fixed", "test", WRITER).await),
        "Block node is read-only"
    );
    let mut dynamic = file("dynamic", &image);
    dynamic["auto-read-only"] = json!(true);
    world.add(dynamic).await.unwrap();
    let reader = world.graph.attach("dynamic", "test", READER).await.unwrap();
    assert_eq!(world.write(&reader, 0, vec![1]).await, Err(Errno::EPERM));
    let writer = world.graph.attach("dynamic", "test", WRITER).await.unwrap();
    world.write(&writer, 0, vec![1; 10]).await.unwrap();
    assert_eq!(world.read(&reader, 0, 10).await.unwrap(), [1; 10]);
    world.graph.detach(writer).await;
    assert_eq!(world.read(&reader, 0, 10).await.unwrap(), [1; 10]);
}

#[tokio::test(flavor = "current_thread")]
async fn a_window_shows_its_part_and_keeps_its_size() {
    let world = World::new();
    let image = image(MIB);
    std::fs::write(
        image.path(),
        (0..MIB)
            .map(|i| u8::try_from(i % 253).unwrap())
            .collect::<Vec<_>>(),
    )
    .unwrap();
    let window = json!({"driver": "raw", "node-name": "w", "offset": 1000, "size": 2048, "file": file("f", &image)});
    world.add(window).await.unwrap();
    let backend = world.graph.attach("w", "test", WRITER).await.unwrap();
    assert_eq!(backend.size(), 2048);
    let expected: Vec<u8> = (1000..3048u64)
        .map(|i| u8::try_from(i % 253).unwrap())
        .collect();
    assert_eq!(world.read(&backend, 0, 2048).await.unwrap(), expected);
    assert_eq!(world.read(&backend, 2000, 49).await, Err(Errno::EIO));
    assert_eq!(
        world.write(&backend, u64::MAX, vec![0; 2]).await,
        Err(Errno::EIO)
    );
    assert_eq!(
        message(world.graph.resize("w", 4096).await),
        "Cannot resize fixed-size raw disks"
    );
    let odd = json!({"driver": "raw", "node-name": "o", "size": 1000, "file": "f"});
    assert_eq!(
        message(world.add(odd).await),
        "Specified size is not multiple of 512"
    );
}

#[tokio::test(flavor = "current_thread")]
async fn detected_zeroes_become_holes() {
    let world = World::new();
    let image = image(MIB);
    std::fs::write(image.path(), vec![1; usize::try_from(MIB).unwrap()]).unwrap();
    let mut options = file("f", &image);
    options["detect-zeroes"] = json!("unmap");
    assert_eq!(
        message(world.add(options.clone()).await),
        "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
    );
    options["discard"] = json!("unmap");
    world.add(options).await.unwrap();
    let backend = world.graph.attach("f", "test", WRITER).await.unwrap();
    world
        .write(&backend, 65536, vec![0; 131_072])
        .await
        .unwrap();
    let status = {
        let backend = backend.clone();
        world
            .contexts
            .main()
            .run(move || async move { backend.block_status(65536, MIB - 65536).await })
            .await
            .unwrap()
            .unwrap()
    };
    assert!(
        status.zero && !status.data && status.len == 131_072,
        "{status:?}"
    );
    assert_eq!(world.read(&backend, 65535, 3).await.unwrap(), [1, 0, 0]);
}

#[tokio::test(flavor = "current_thread")]
async fn zeroes_and_discards_keep_their_neighbours() {
    let world = World::new();
    let image = image(0);
    std::fs::write(image.path(), vec![7; 100_000]).unwrap();
    let mut options = file("f", &image);
    options["discard"] = json!("unmap");
    world.add(options).await.unwrap();
    let backend = world.graph.attach("f", "test", WRITER).await.unwrap();
    let zeroing = backend.clone();
    world
        .contexts
        .main()
        .run(move || async move {
            zeroing
                .write_zeroes(10, 50_001, ZeroFlags::MAY_UNMAP)
                .await?;
            zeroing.write_zeroes(60_000, 10, ZeroFlags::empty()).await?;
            zeroing.discard(70_000, 10_000).await?;
            zeroing.flush().await
        })
        .await
        .unwrap()
        .unwrap();
    let content = world.read(&backend, 0, 100_000).await.unwrap();
    assert_eq!(content[..12], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0]);
    assert_eq!(content[50_010..50_012], [0, 7]);
    assert_eq!(
        content[59_999..60_011],
        [7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]
    );
    assert_eq!((content[69_999], content[80_000]), (7, 7));
}

struct Resized(AtomicU64);

impl BackendListener for Resized {
    fn resized(&self, size: u64) {
        self.0.store(size, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "current_thread")]
async fn resizing_tells_the_users_above() {
    let world = World::new();
    let image = image(MIB);
    world
        .add(json!({"driver": "raw", "node-name": "r", "file": file("f", &image)}))
        .await
        .unwrap();
    let backend = world.graph.attach("r", "test", WRITER).await.unwrap();
    let listener = Arc::new(Resized(AtomicU64::new(0)));
    backend.set_listener(Arc::clone(&listener) as Arc<dyn BackendListener>);
    world.graph.resize("r", 2 * MIB).await.unwrap();
    assert_eq!(backend.size(), 2 * MIB);
    assert_eq!(listener.0.load(Ordering::Relaxed), 2 * MIB);
    assert_eq!(image.as_file().metadata().unwrap().len(), 2 * MIB);
    world.write(&backend, 2 * MIB - 1, vec![9]).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn requests_go_on_after_many_drained_sections() {
    let world = World::new();
    let image = image(MIB);
    world
        .add(json!({"driver": "raw", "node-name": "r", "file": file("f", &image)}))
        .await
        .unwrap();
    let backend = world.graph.attach("r", "test", WRITER).await.unwrap();
    let load = {
        let backend = backend.clone();
        world
            .contexts
            .shared(2)
            .unwrap()
            .pop()
            .unwrap()
            .run(move || async move {
                for i in 0..3000u64 {
                    let at = i * 4096 % MIB;
                    backend
                        .write(at, IoBuffer::copy_of(&i.to_le_bytes()).into(), false)
                        .await
                        .unwrap();
                }
            })
    };
    let edits = async {
        for size in 1..=100u64 {
            world.graph.resize("r", MIB + size * 512).await.unwrap();
        }
    };
    let (loaded, ()) = tokio::join!(load, edits);
    loaded.unwrap();
    assert_eq!(backend.size(), MIB + 51_200);
}

#[tokio::test(flavor = "current_thread")]
async fn images_on_our_own_mounts_are_refused() {
    use std::os::unix::fs::MetadataExt;
    use stord_block::drivers::protocol::file::own_mounts;

    let world = World::new();
    // A device number of a file system of its own, so that the other tests' images are not touched.
    let shm = tempfile::Builder::new().tempfile_in("/dev/shm").unwrap();
    let device = shm.as_file().metadata().unwrap().dev();
    own_mounts::add(device);
    let refused = world
        .add(json!({"driver": "file", "node-name": "f", "filename": shm.path()}))
        .await
        .err()
        .unwrap();
    own_mounts::remove(device);
    assert!(
        refused
            .message
            .ends_with("it is on a mount of this daemon's own"),
        "{refused}"
    );
    world
        .add(json!({"driver": "file", "node-name": "f", "filename": shm.path()}))
        .await
        .unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn created_files_have_the_size_and_space_asked_for() {
    use std::os::unix::fs::MetadataExt;
    use stord_block::job::{JobControl, create};

    let world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new");
    let make = async |extra: (&str, Value)| {
        let mut options = json!({"driver": "file", "filename": path, "size": MIB});
        options[extra.0] = extra.1;
        let made = create::make(&world.graph, from_json(options)?, &JobControl::default()).await;
        made.map_err(stord_qmp::Error::from)
    };
    for (mode, allocated) in [("off", false), ("falloc", true), ("full", true)] {
        make(("preallocation", json!(mode))).await.unwrap();
        let made = std::fs::metadata(&path).unwrap();
        assert_eq!(made.len(), MIB);
        assert_eq!(made.blocks() * 512 >= MIB, allocated, "{mode}");
    }
    assert_eq!(
        message(make(("preallocation", json!("metadata"))).await),
        "Unsupported preallocation mode: metadata"
    );
    assert_eq!(
        message(make(("size", json!(-5))).await),
        "Could not resize file: Invalid argument"
    );
    make(("nocow", json!(true))).await.unwrap();
    // A file that somebody writes is left alone.
    world
        .add(json!({"driver": "file", "node-name": "f", "filename": path}))
        .await
        .unwrap();
    let claim = Claim {
        shared: Permissions::all() - Permissions::RESIZE,
        ..WRITER
    };
    let writer = world.graph.attach("f", "test", claim).await.unwrap();
    assert_eq!(
        message(make(("size", json!(0))).await),
        "Failed to get \"resize\" lock"
    );
    assert_eq!(writer.size(), MIB);
}
