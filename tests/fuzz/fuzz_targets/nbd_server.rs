//! Bytes of an NBD client, before and after the handshake, in pieces. What the server says is well-formed, and each whole request is
//! answered once and in full.
#![no_main]

#[path = "../../nbd/oracle.rs"]
mod oracle;
#[path = "../server.rs"]
mod server;

use std::io::{Read, Write};
use std::net::Shutdown;

use libfuzzer_sys::fuzz_target;
use oracle::{Style, handshake, judge, judge_handshake, number_requests, skip_handshake};

/// Replies to more requests would take too long.
const REQUESTS: usize = 48;

/// Sends the bytes in pieces while reading what comes.
fn converse(client: &mut std::os::unix::net::UnixStream, bytes: &[u8], piece: usize) -> Vec<u8> {
    let mut writer = client.try_clone().expect("a descriptor");
    let mut said = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for piece in bytes.chunks(piece) {
                // The server hangs up on what it does not understand.
                if writer.write_all(piece).is_err() {
                    break;
                }
            }
            let _ = writer.shutdown(Shutdown::Write);
        });
        match client.read_to_end(&mut said) {
            Ok(_) => {}
            // It hung up on what it does not understand, and did not look at the rest.
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    });
    said
}

fuzz_target!(|data: &[u8]| {
    let Some((&[choice, piece], rest)) = data.split_first_chunk() else { return };
    let piece = usize::from(piece).pow(2) + 1;
    let mut client = server::connect();
    let style = match choice % 4 {
        0 => Style::Simple,
        1 => Style::Structured,
        2 => Style::Extended,
        _ => {
            let said = converse(&mut client, rest, piece);
            judge_handshake(&said).expect("a handshake");
            return;
        }
    };
    let name = if choice & 4 == 0 { "now" } else { "later" };
    client.write_all(&handshake(style, name)).expect("it listens");
    skip_handshake(&mut client).expect("a handshake");
    let mut stream = rest.to_vec();
    let sent = number_requests(style, &mut stream, REQUESTS);
    let said = converse(&mut client, &stream, piece);
    judge(style, &sent, &said).expect("replies");
});
