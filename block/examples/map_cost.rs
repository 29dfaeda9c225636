//! What a qcow2 map costs: random 4 KiB requests through a `Backend`, raw beside qcow2, over a leaf that does nothing and over a
//! file in memory. Prints nanoseconds of the context's processor time per request, medians over alternating rounds.
//!
//!     cargo run --release -p stord-block --example map_cost [DIRECTORY [PART]]
//!
//! Needs qemu-img. DIRECTORY (default /dev/shm) has to be a tmpfs with 300 MiB to spare. Only lines that contain PART are measured.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use stord_aio::{Context, IoBuffer, join_all};
use stord_block::graph::Claim;
use stord_block::{Backend, Contexts, Graph, Permissions};
use stord_qmp::from_json;

const BLOCK: u64 = 4096;
/// The disk over the leaf that does nothing.
const NULL_SIZE: u64 = 1 << 30;
/// The disk over a file.
const FILE_SIZE: u64 = 128 << 20;
const ROUNDS: usize = 25;
const REQUESTS: u64 = 20_000;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// What needs no waiting, without a future; as exports ask first.
    AtOnce,
    /// A future for each request.
    Future,
}

#[derive(Clone, Copy)]
struct Load {
    writes: bool,
    depth: u64,
    contexts: usize,
    way: Way,
}

fn main() {
    let directory = std::env::args().nth(1).unwrap_or("/dev/shm".to_owned());
    let directory = tempfile::tempdir_in(directory).expect("a directory");
    let part = std::env::args().nth(2).unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(measure(directory.path(), &part));
}

async fn measure(directory: &Path, part: &str) {
    let contexts = Rc::new(Contexts::start().expect("an I/O context"));
    let other = contexts.shared(2).expect("a second context");
    let graph = Graph::new(Rc::clone(&contexts));
    println!("ns of processor time per request       raw    qcow2   qcow2/raw");
    for (leaf, pair) in [
        ("nothing", over_nothing(&graph, directory).await),
        ("tmpfs", over_file(&graph, directory).await),
    ] {
        for writes in [false, true] {
            for (depth, way) in [(1, Way::AtOnce), (1, Way::Future), (32, Way::Future)] {
                for count in 1..=other.len() {
                    let load = Load {
                        writes,
                        depth,
                        contexts: count,
                        way,
                    };
                    let name = format!(
                        "{leaf:8} {} depth {depth:2} {} {count} context{}",
                        if writes { "write" } else { "read " },
                        if way == Way::AtOnce {
                            "at once"
                        } else {
                            "future "
                        },
                        if count == 1 { " " } else { "s" },
                    );
                    if name.contains(part) {
                        let [raw, qcow2] = compare(&other, &pair, load).await;
                        println!("{name} {raw:8.1} {qcow2:8.1} {:8.2}", qcow2 / raw);
                    }
                }
            }
        }
        for backend in pair {
            graph.detach(backend).await;
        }
    }
    drop(graph);
}

/// Raw and qcow2 over `null-co`: the image keeps its data in a data file, and only its metadata in a file.
async fn over_nothing(graph: &Graph, directory: &Path) -> [Backend; 2] {
    let image = directory.join("mapped.qcow2");
    let data = directory.join("mapped.data");
    let option = format!("data_file={},preallocation=metadata", text(&data));
    create(&["-o", &option], &image, NULL_SIZE);
    let leaf = json!({"driver": "null-co", "size": NULL_SIZE});
    add(
        graph,
        json!({"node-name": "raw0", "driver": "raw", "file": leaf}),
    )
    .await;
    let file = json!({"driver": "file", "filename": text(&image)});
    let qcow2 = json!({"node-name": "qcow0", "driver": "qcow2", "file": file, "data-file": leaf});
    add(graph, qcow2).await;
    attach(graph, ["raw0", "qcow0"]).await
}

/// Raw and qcow2 over files with data in every cluster.
async fn over_file(graph: &Graph, directory: &Path) -> [Backend; 2] {
    let raw = directory.join("full.raw");
    let image = directory.join("full.qcow2");
    let full = vec![0x5a; usize::try_from(FILE_SIZE).expect("it fits")];
    std::fs::write(&raw, full).expect("a full disk image");
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&raw),
        text(&image),
    ]);
    let file = |path: &Path| json!({"driver": "file", "filename": text(path)});
    add(
        graph,
        json!({"node-name": "raw1", "driver": "raw", "file": file(&raw)}),
    )
    .await;
    add(
        graph,
        json!({"node-name": "qcow1", "driver": "qcow2", "file": file(&image)}),
    )
    .await;
    attach(graph, ["raw1", "qcow1"]).await
}

fn create(options: &[&str], image: &Path, size: u64) {
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    args.extend(options);
    args.extend([text(image), &size]);
    qemu_img(&args);
}

fn qemu_img(args: &[&str]) {
    let status = Command::new("qemu-img")
        .args(args)
        .status()
        .expect("qemu-img runs (install qemu-utils)");
    assert!(status.success(), "qemu-img {args:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a name in UTF-8")
}

async fn add(graph: &Graph, options: Value) {
    let options = from_json(options).expect("options of a node");
    graph.blockdev_add(options).await.expect("the node opens");
}

async fn attach(graph: &Graph, nodes: [&str; 2]) -> [Backend; 2] {
    let claim = Claim {
        permissions: Permissions::CONSISTENT_READ | Permissions::WRITE,
        shared: Permissions::all(),
    };
    let mut backends = Vec::new();
    for node in nodes {
        let backend = graph.attach(node, "map_cost", claim).await;
        backends.push(backend.expect("the node takes a user"));
    }
    backends
        .try_into()
        .unwrap_or_else(|_| unreachable!("as many as nodes"))
}

/// Median times of both, in nanoseconds per request.
async fn compare(contexts: &[Context], pair: &[Backend; 2], load: Load) -> [f64; 2] {
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=ROUNDS {
        for (times, backend) in times.iter_mut().zip(pair) {
            let time = run(contexts, backend, load).await;
            // The first warms caches up.
            if round > 0 {
                times.push(time);
            }
        }
    }
    times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    })
}

async fn run(contexts: &[Context], backend: &Backend, load: Load) -> f64 {
    let running: Vec<_> = contexts[..load.contexts]
        .iter()
        .zip(1u64..)
        .map(|(context, seed)| {
            let backend = backend.clone();
            context.run(move || work(backend, load, seed))
        })
        .collect();
    let mut sum = 0.0;
    for time in running {
        sum += time.await.expect("the context runs");
    }
    sum / load.contexts as f64
}

/// Makes requests on the calling context; gives nanoseconds of its thread's time per request.
async fn work(backend: Backend, load: Load, mut seed: u64) -> f64 {
    let blocks = backend.size() / BLOCK;
    let buffers: Vec<IoBuffer> = (0..load.depth).map(|_| IoBuffer::zeroed(4096)).collect();
    let mut next = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % blocks * BLOCK
    };
    let begun = thread_time();
    for _ in 0..REQUESTS / load.depth {
        if load.way == Way::AtOnce {
            let (at, buffer) = (next(), buffers[0].clone().into());
            let answer = match load.writes {
                true => backend.try_write(at, &buffer),
                false => backend.try_read(at, &buffer),
            };
            if let Some(result) = answer {
                result.expect("it is inside the disk");
                continue;
            }
        }
        if load.depth == 1 {
            one(&backend, next(), buffers[0].clone(), load.writes).await;
        } else {
            let requests = buffers
                .iter()
                .map(|buffer| one(&backend, next(), buffer.clone(), load.writes));
            join_all(requests.collect()).await;
        }
    }
    (thread_time() - begun).as_nanos() as f64 / REQUESTS as f64
}

async fn one(backend: &Backend, at: u64, buffer: IoBuffer, writes: bool) {
    let result = if writes {
        backend.write(at, buffer.into(), false).await
    } else {
        backend.read(at, buffer.into()).await
    };
    result.expect("it is inside the disk");
}

fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .expect("every thread has that clock")
        .into()
}
