//! Shows an image as a raw file, without a daemon: for measuring and for trying out.
//!
//!     fuse_raw BLOCKDEV-JSON EXPORT-JSON
//!
//! Ends when its standard input does, or when the export ends.

use std::rc::Rc;

use stord_block::{Contexts, Graph};
use stord_bridges::{ExportEvent, ExportRegistry};
use stord_qmp::from_json;
use tokio::io::AsyncReadExt as _;
use tokio::sync::Notify;
use tokio::task::LocalSet;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(blockdev), Some(export)) = (arguments.next(), arguments.next()) else {
        return Err("usage: fuse_raw BLOCKDEV-JSON EXPORT-JSON".into());
    };
    let blockdev = from_json(serde_json::from_str(&blockdev)?)?;
    let export = from_json(serde_json::from_str(&export)?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, async {
        let contexts = Rc::new(Contexts::start()?);
        let graph = Rc::new(Graph::new(Rc::clone(&contexts)));
        let ended = Rc::new(Notify::new());
        let note = Rc::clone(&ended);
        let events = move |event| {
            if let ExportEvent::Deleted { id } = event {
                eprintln!("export '{id}' has ended");
                note.notify_one();
            }
        };
        let registry = ExportRegistry::new(Rc::clone(&graph), contexts, events);
        graph.blockdev_add(blockdev).await?;
        registry.add(export).await?;
        println!("ready");
        let mut input = tokio::io::stdin();
        let mut byte = [0];
        tokio::select! {
            _ = input.read(&mut byte) => {}
            () = ended.notified() => {}
        }
        registry.close_all().await;
        graph.close_all().await;
        // The thread that reads the standard input may still be there.
        std::process::exit(0)
    })
}
