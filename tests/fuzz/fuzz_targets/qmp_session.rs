//! Bytes of a client. How they are cut into pieces changes nothing, every answer is a line of JSON in ASCII, and what JSON is accepted
//! means the same to serde_json.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use stord_qmp::json::{parse, to_compact, to_pretty};
use stord_qmp::session::{Incoming, Session};

/// What a session answers to pieces of bytes.
fn answers<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut session = Session::new(false);
    let mut output = Vec::new();
    for piece in pieces {
        for incoming in session.feed(piece) {
            output.extend(match incoming {
                Incoming::Execute(request) => {
                    let told = json!([request.command, request.arguments, request.oob]);
                    session.reply(request.id, Ok(told))
                }
                Incoming::Answer { id, result, .. } => session.reply(id, result),
            });
        }
    }
    output
}

fuzz_target!(|data: &[u8]| {
    let whole = answers(std::iter::once(data));
    assert!(whole.is_ascii());
    for line in whole.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        serde_json::from_slice::<Value>(line).expect("an answer is JSON");
    }
    let step = usize::from(data.first().copied().unwrap_or(0)) % 7 + 1;
    assert_eq!(whole, answers(data.chunks(step)));
    if let Ok(value) = parse(data) {
        assert_eq!(parse(to_compact(&value).as_bytes()).expect("its own output"), value);
        assert_eq!(parse(to_pretty(&value).as_bytes()).expect("its own output"), value);
        if let Ok(theirs) = serde_json::from_slice::<Value>(data) {
            assert_eq!(value, theirs);
        }
    }
});
