//! Images made by `blockdev-create`, judged by qemu-img.

use std::path::Path;
use std::process::{Command, Output};
use std::rc::Rc;

use serde_json::{Value, json};
use stord_block::job::{JobControl, create};
use stord_block::{Contexts, Graph};
use stord_qmp::{Error, from_json};

const GIB: u64 = 1 << 30;

struct World {
    graph: Graph,
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self {
            graph: Graph::new(Rc::new(Contexts::start().unwrap())),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// A file node definition for a new, empty file.
    fn file(&self, name: &str) -> (Value, std::path::PathBuf) {
        let path = self.folder.path().join(name);
        std::fs::write(&path, []).unwrap();
        (json!({"driver": "file", "filename": path}), path)
    }

    async fn create(&self, options: Value) -> Result<(), Error> {
        let made = create::make(&self.graph, from_json(options)?, &JobControl::default()).await;
        made.map_err(Error::from)
    }
}

fn qemu_img(arguments: &[&str], image: &Path) -> Output {
    Command::new("qemu-img")
        .args(arguments)
        .arg(image)
        .output()
        .expect("qemu-img is needed: scripts/setup test installs it")
}

fn check(image: &Path) -> Value {
    let output = qemu_img(&["check", "--output=json"], image);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

fn info(image: &Path) -> Value {
    let output = qemu_img(&["info", "--output=json"], image);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "current_thread")]
async fn every_geometry_is_clean_and_described_as_asked() {
    let world = World::new();
    let mut number = 0;
    for cluster_size in [512u64, 4096, 65536, 2 << 20] {
        for refcount_bits in [1, 4, 8, 16, 64] {
            for preallocation in ["off", "metadata"] {
                number += 1;
                let (file, path) = world.file(&format!("{number}"));
                let size = 37 * 1024 * 1024 + 512;
                world
                    .create(json!({
                        "driver": "qcow2", "file": file, "size": size, "cluster-size": cluster_size, "refcount-bits": refcount_bits,
                        "preallocation": preallocation, "lazy-refcounts": number % 2 == 0,
                    }))
                    .await
                    .unwrap();
                let checked = check(&path);
                assert_eq!(checked["check-errors"], 0);
                assert_eq!(
                    checked.get("leaks"),
                    None,
                    "{cluster_size} {refcount_bits} {preallocation}"
                );
                if preallocation == "metadata" {
                    assert_eq!(checked["allocated-clusters"], checked["total-clusters"]);
                }
                let info = info(&path);
                let specific = &info["format-specific"]["data"];
                assert_eq!(info["virtual-size"], size);
                assert_eq!(info["cluster-size"], cluster_size);
                assert_eq!(specific["refcount-bits"], refcount_bits);
                assert_eq!(specific["lazy-refcounts"], number % 2 == 0);
            }
        }
    }
}

#[tokio::test(flavor = "current_thread")]
async fn versions_features_and_names_are_kept() {
    let world = World::new();
    let (file, old) = world.file("old");
    world
        .create(json!({"driver": "qcow2", "file": file, "size": GIB, "version": "v2"}))
        .await
        .unwrap();
    check(&old);
    assert_eq!(info(&old)["format-specific"]["data"]["compat"], "0.10");
    let (file, new) = world.file("new");
    world
        .create(json!({
            "driver": "qcow2", "file": file, "size": GIB, "extended-l2": true, "compression-type": "zstd", "preallocation": "metadata",
            "backing-file": old, "backing-fmt": "qcow2", "cluster-size": 131_072,
        }))
        .await
        .unwrap();
    check(&new);
    let described = info(&new);
    assert_eq!(described["format-specific"]["data"]["extended-l2"], true);
    assert_eq!(
        described["format-specific"]["data"]["compression-type"],
        "zstd"
    );
    assert_eq!(described["backing-filename-format"], "qcow2");
    assert_eq!(described["full-backing-filename"].as_str(), old.to_str());
    // Empty disks, huge ones, and those with their data elsewhere.
    let (file, empty) = world.file("empty");
    world
        .create(json!({"driver": "qcow2", "file": file, "size": 0}))
        .await
        .unwrap();
    check(&empty);
    let (file, huge) = world.file("huge");
    world.create(json!({"driver": "qcow2", "file": file, "size": 1024 * GIB, "preallocation": "metadata"})).await.unwrap();
    assert_eq!(check(&huge)["total-clusters"], 1024 * GIB / 65536);
    let (file, split) = world.file("split");
    let (data_file, data_path) = world.file("data");
    world
        .create(json!({
            "driver": "qcow2", "file": file, "data-file": data_file, "data-file-raw": true, "size": GIB, "preallocation": "metadata",
        }))
        .await
        .unwrap();
    check(&split);
    assert_eq!(
        info(&split)["format-specific"]["data"]["data-file"].as_str(),
        data_path.to_str()
    );
    assert_eq!(std::fs::metadata(&data_path).unwrap().len(), GIB);
}

#[tokio::test(flavor = "current_thread")]
async fn preallocated_space_is_there() {
    use std::os::unix::fs::MetadataExt;

    let world = World::new();
    for mode in ["falloc", "full"] {
        let (file, path) = world.file(mode);
        world
            .create(
                json!({"driver": "qcow2", "file": file, "size": 8 << 20, "preallocation": mode}),
            )
            .await
            .unwrap();
        check(&path);
        assert!(
            std::fs::metadata(&path).unwrap().blocks() * 512 >= 8 << 20,
            "{mode}"
        );
    }
}

#[tokio::test(flavor = "current_thread")]
async fn contradicting_options_are_refused_in_the_reference_s_words() {
    let world = World::new();
    let (file, path) = world.file("x");
    let cases = [
        (
            json!({"cluster-size": 1000}),
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            json!({"size": 1000}),
            "Image size must be a multiple of 512 bytes",
        ),
        (
            json!({"refcount-bits": 3}),
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            json!({"version": "v2", "lazy-refcounts": true}),
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            json!({"backing-fmt": "raw"}),
            "Backing format cannot be used without backing file",
        ),
        (
            json!({"data-file-raw": true}),
            "data-file-raw requires data-file",
        ),
        (
            json!({"backing-file": "b", "preallocation": "metadata"}),
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ),
    ];
    for (extra, text) in cases {
        let mut options = json!({"driver": "qcow2", "file": file, "size": GIB});
        options
            .as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        assert_eq!(world.create(options).await.unwrap_err().message, text);
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
}
