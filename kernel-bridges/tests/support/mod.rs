//! What tests of exports share: a daemon without its monitor, and where it can mount.

use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread;

use nix::mount::{MntFlags, umount2};
use nix::unistd::geteuid;
use serde_json::{Value, json};
use stord_block::{Contexts, Graph};
use stord_bridges::{ExportEvent, ExportRegistry};
use stord_qmp::{Error, from_json};
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio::task::LocalSet;

pub const MIB: usize = 1 << 20;

/// A daemon without its monitor, in a directory of its own.
pub struct World {
    pub dir: TempDir,
    pub graph: Rc<Graph>,
    pub registry: Rc<ExportRegistry>,
    /// Ids of exports whose end was announced.
    pub deleted: Rc<RefCell<Vec<String>>>,
    notify: Rc<Notify>,
}

impl World {
    pub async fn new() -> Self {
        let contexts = Rc::new(Contexts::start().unwrap());
        let graph = Rc::new(Graph::new(Rc::clone(&contexts)));
        let deleted = Rc::new(RefCell::new(Vec::new()));
        let notify = Rc::new(Notify::new());
        let (ids, note) = (Rc::clone(&deleted), Rc::clone(&notify));
        let events = move |event| {
            if let ExportEvent::Deleted { id } = event {
                ids.borrow_mut().push(id);
                note.notify_one();
            }
        };
        let registry = ExportRegistry::new(Rc::clone(&graph), contexts, events);
        Self {
            dir: TempDir::new().unwrap(),
            graph,
            registry,
            deleted,
            notify,
        }
    }

    /// A raw image under the name of its node.
    pub async fn image(&self, node: &str, size: usize) -> PathBuf {
        let path = self.dir.path().join(node);
        File::create(&path).unwrap().set_len(size as u64).unwrap();
        let options = json!({"driver": "file", "node-name": node, "filename": path});
        self.graph
            .blockdev_add(from_json(options).unwrap())
            .await
            .unwrap();
        path
    }

    pub fn mountpoint(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(format!("{name}.mount"));
        File::create(&path).unwrap();
        path
    }

    pub async fn add(&self, id: &str, node: &str, more: Value) -> Result<PathBuf, Error> {
        let path = self.mountpoint(id);
        self.add_at(id, node, &path, more).await?;
        Ok(path)
    }

    pub async fn add_at(
        &self,
        id: &str,
        node: &str,
        path: &Path,
        more: Value,
    ) -> Result<(), Error> {
        let mut options = json!({"type": "fuse", "id": id, "node-name": node, "mountpoint": path});
        options["io-uring"] = IO_URING.get().into();
        for (name, value) in more.as_object().unwrap() {
            options[name] = value.clone();
        }
        self.registry.add(from_json(options)?).await
    }

    pub async fn until_deleted(&self, count: usize) {
        while self.deleted.borrow().len() < count {
            self.notify.notified().await;
        }
    }
}

impl Drop for World {
    /// Leaves nothing mounted, whatever became of the test.
    fn drop(&mut self) {
        for entry in fs::read_dir(self.dir.path())
            .into_iter()
            .flatten()
            .flatten()
        {
            // Most are not mounted.
            let _ = umount2(&entry.path(), MntFlags::MNT_DETACH);
        }
    }
}

thread_local! {
    /// What `io-uring` is for the exports of the running test.
    static IO_URING: Cell<&'static str> = const { Cell::new("off") };
}

/// Whether the kernel offers FUSE over io_uring.
pub fn has_io_uring() -> bool {
    let enabled = fs::read_to_string("/sys/module/fuse/parameters/enable_uring");
    enabled.is_ok_and(|enabled| enabled.trim() == "Y")
}

/// Runs a test that mounts, over each transport that the kernel has, unless it may not.
pub fn mounting<F: Future<Output = ()>>(test: impl Fn() -> F + Sync) {
    if !geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI must run as root with /dev/fuse"
        );
        eprintln!("SKIPPED: needs root and /dev/fuse");
        return;
    }
    let mut transports = vec!["off"];
    if has_io_uring() {
        transports.push("on");
    } else {
        eprintln!("SKIPPED over io_uring: needs Linux 6.14 and fuse.enable_uring");
    }
    for io_uring in transports {
        let run = || {
            IO_URING.set(io_uring);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            LocalSet::new().block_on(&runtime, test());
        };
        // The futures of a debug build need more stack than a test has.
        let ended = thread::scope(|scope| {
            let thread = thread::Builder::new().stack_size(16 * MIB);
            thread.spawn_scoped(scope, run).unwrap().join()
        });
        if let Err(panic) = ended {
            resume_unwind(panic);
        }
    }
}

/// Runs what blocks on a file of ours on another thread than the exports' control thread.
pub async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(f).await.unwrap()
}

pub fn size(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

pub fn is_mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let path = path.to_str().unwrap();
    table
        .lines()
        .any(|line| line.split(' ').nth(4) == Some(path))
}
