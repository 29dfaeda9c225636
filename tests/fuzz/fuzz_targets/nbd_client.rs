//! Bytes of an NBD server. Opening fails or does not, requests fail or do not, and all of them end.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use serde_json::json;
use stord_aio::IoBuffer;
use stord_block::graph::Claim;
use stord_block::{Contexts, Detail, Graph, Permissions};
use stord_qmp::from_json;

/// What the server's bytes are.
enum Part {
    /// Everything that it says.
    All,
    /// What it says after a handshake in that style; a run of eight bytes 0xcc stands for the cookie of the last request.
    Transmission { is_structured: bool },
}

/// Says the bytes when something was asked, and goes.
fn serve(mut client: UnixStream, part: Part, bytes: &[u8]) {
    client.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    // The client may go at any time.
    let _ = match part {
        Part::All => client.write_all(bytes),
        Part::Transmission { is_structured } => transmit(&mut client, is_structured, bytes),
    };
}

fn transmit(client: &mut UnixStream, is_structured: bool, bytes: &[u8]) -> std::io::Result<()> {
    client.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    client.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; 16];
        client.read_exact(&mut header)?;
        let length = u32::from_be_bytes([header[12], header[13], header[14], header[15]]);
        client.read_exact(&mut vec![0; length as usize])?;
        let mut say = |kind: u32, data: &[u8]| {
            let mut reply = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            reply.extend(&header[8..12]);
            reply.extend(kind.to_be_bytes());
            reply.extend((data.len() as u32).to_be_bytes());
            reply.extend(data);
            client.write_all(&reply)
        };
        match header[11] {
            8 if is_structured => say(1, &[])?,
            10 => {
                say(4, b"\0\0\0\x05base:allocation")?;
                say(1, &[])?;
            }
            7 => {
                // 1 MiB that can do everything.
                say(3, &[0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0x0d, 0x6d])?;
                say(1, &[])?;
                break;
            }
            _ => say(0x8000_0001, &[])?,
        }
    }
    let mut request = [0; 28];
    client.read_exact(&mut request)?;
    let mut bytes = bytes.to_vec();
    while let Some(at) = bytes.windows(8).position(|window| window == [0xcc; 8]) {
        bytes[at..at + 8].copy_from_slice(&request[8..16]);
    }
    client.write_all(&bytes)
}

async fn live(part: Part, bytes: &[u8]) {
    let path = std::env::temp_dir().join(format!("stord-fuzz-client-{}.sock", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket");
    let bytes = bytes.to_vec();
    let serving = std::thread::spawn(move || {
        if let Ok((client, _)) = listener.accept() {
            serve(client, part, &bytes);
        }
    });
    let contexts = Rc::new(Contexts::start().expect("contexts"));
    let graph = Rc::new(Graph::new(Rc::clone(&contexts)));
    let node = json!({"driver": "nbd", "node-name": "n", "server": {"type": "unix", "path": path}});
    if graph.blockdev_add(from_json(node).expect("options")).await.is_ok() {
        let claim = Claim { permissions: Permissions::CONSISTENT_READ, shared: Permissions::all() };
        let backend = graph.attach("n", "fuzzing", claim).await.expect("nobody else is there");
        let asking = backend.clone();
        let asked = contexts.main().run(move || async move {
            let size = asking.size().min(65536);
            let buffer = IoBuffer::zeroed(usize::try_from(size).expect("small"));
            let _ = asking.read(0, buffer.into()).await;
            let _ = asking.locate(0, size.max(1), Detail::Map).await;
        });
        let asked = tokio::time::timeout(Duration::from_secs(30), asked).await;
        asked.expect("requests end").expect("the context lives");
        graph.detach(backend).await;
    }
    graph.close_all().await;
    serving.join().expect("no panic");
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, rest)) = data.split_first() else { return };
    let part = match choice % 3 {
        0 => Part::All,
        kind => Part::Transmission { is_structured: kind == 1 },
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, live(part, rest));
});
