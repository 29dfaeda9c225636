//! An NBD server within the process: a disk that answers at once and one that takes its time.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::OnceLock;
use std::sync::mpsc;

use serde_json::json;
use stord_block::{Contexts, Graph};
use stord_bridges::ExportRegistry;
use stord_qmp::from_json;

/// A connection to the server, which is started by the first.
pub fn connect() -> UnixStream {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    let socket = SOCKET.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("stord-fuzz-{}.sock", std::process::id()));
        let (ready, is_ready) = mpsc::channel();
        let at = path.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let serving = async move {
                start(&at).await;
                ready.send(()).expect("somebody waits");
                std::future::pending::<()>().await;
            };
            tokio::task::LocalSet::new().block_on(&runtime.expect("a runtime"), serving);
        });
        is_ready.recv().expect("the server starts");
        path
    });
    UnixStream::connect(socket).expect("the server listens")
}

async fn start(socket: &std::path::Path) {
    let contexts = Rc::new(Contexts::start().expect("contexts"));
    let graph = Rc::new(Graph::new(Rc::clone(&contexts)));
    let registry = ExportRegistry::new(Rc::clone(&graph), contexts, |_| {});
    let server = json!({"addr": {"type": "unix", "path": socket}, "max-connections": 0});
    let server = from_json(server).expect("options");
    registry.nbd_server_start(server, Default::default()).await.expect("a server");
    for (name, driver) in [("now", "null-co"), ("later", "null-aio")] {
        let node = json!({"driver": driver, "node-name": name, "size": 256 << 10, "read-zeroes": true});
        graph.blockdev_add(from_json(node).expect("options")).await.expect("a node");
        let export = json!({"type": "nbd", "id": name, "node-name": name, "writable": true});
        registry.add(from_json(export).expect("options")).await.expect("an export");
    }
    // They live as long as the process.
    std::mem::forget((graph, registry));
}
