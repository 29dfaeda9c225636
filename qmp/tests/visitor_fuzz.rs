//! Arguments of commands, changed at random from a seed: whatever they are, decoding gives a value or an error with a text, and a value that
//! was accepted survives being encoded and decoded.

use serde_json::{Value, json};
use stord_qmp::schema::block::{BlockdevOptions, BlockdevReopen};
use stord_qmp::schema::chardev::ChardevOptions;
use stord_qmp::schema::create::BlockdevCreate;
use stord_qmp::schema::export::BlockExportOptions;
use stord_qmp::schema::monitor::MonitorOptions;
use stord_qmp::schema::object::{ObjectOptions, QomSet};
use stord_qmp::schema::statistics::{BlockSetWriteThreshold, QueryBlockstats};
use stord_qmp::{Qapi, from_json, to_json};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % n as u64).expect("below n")
    }
}

fn anything(random: &mut Random) -> Value {
    const NUMBERS: [&str; 8] = [
        "0",
        "-1",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775809",
        "1e400",
        "0.5",
        "65536",
    ];
    match random.below(9) {
        0 => Value::Null,
        1 => json!(true),
        2 | 3 => serde_json::from_str(NUMBERS[random.below(NUMBERS.len())]).expect("a number"),
        4 => json!(["", "\u{0}", "on", "file", "qcow2", "unix", "0", "a.b", "#x"][random.below(9)]),
        5 => json!([]),
        6 => json!({}),
        7 => json!([anything(random)]),
        _ => json!({"driver": "raw", "file": anything(random), "type": "unix", "data": {}}),
    }
}

/// Changes something, somewhere.
fn change(value: &mut Value, random: &mut Random) {
    if random.below(4) == 0 {
        *value = anything(random);
        return;
    }
    match value {
        Value::Object(members) if !members.is_empty() => {
            let at = random.below(members.len());
            let key = members.keys().nth(at).expect("it is there").clone();
            match random.below(6) {
                0 => drop(members.shift_remove(&key)),
                1 => {
                    let extra = ["x", "", "driver", "file.driver", "backing", "id", "addr"]
                        [random.below(7)];
                    members.insert(extra.to_owned(), anything(random));
                }
                // Deep, as a client may make it.
                2 => {
                    let mut inner = members[&key].take();
                    for _ in 0..random.below(160) {
                        inner = json!({"driver": "raw", "file": inner});
                    }
                    members.insert(key, inner);
                }
                _ => change(&mut members[&key], random),
            }
        }
        Value::Array(elements) if !elements.is_empty() => {
            let at = random.below(elements.len());
            change(&mut elements[at], random);
        }
        Value::String(text) if random.below(2) == 0 => {
            text.push(['x', '\u{0}', ',', 'é'][random.below(4)]);
        }
        _ => *value = anything(random),
    }
}

fn decode<T: Qapi>(value: &Value) {
    match from_json::<T>(value.clone()) {
        Ok(decoded) => {
            let encoded = to_json(&decoded);
            let again: T = from_json(encoded.clone()).expect("its own output");
            assert_eq!(to_json(&again), encoded);
        }
        Err(error) => assert!(!error.message.is_empty()),
    }
}

type Decode = fn(&Value);

fn commands() -> Vec<(Decode, Value)> {
    let node = json!({
        "driver": "qcow2", "node-name": "q", "cache": {"direct": true}, "detect-zeroes": "unmap",
        "file": {"driver": "file", "filename": "a", "locking": "off"},
        "backing": {"driver": "raw", "file": {"driver": "null-co", "size": 1}, "offset": 0, "size": 512},
        "overlap-check": {"template": "all", "active-l1": false}, "l2-cache-size": 1 << 20,
    });
    vec![
        (decode::<BlockdevOptions> as Decode, node.clone()),
        (
            decode::<BlockdevReopen>,
            json!({"options": [node, {"driver": "null-co"}]}),
        ),
        (
            decode::<BlockdevCreate>,
            json!({"job-id": "j", "options": {"driver": "qcow2", "file": "f", "size": 512, "cluster-size": 4096, "preallocation": "full"}}),
        ),
        (
            decode::<BlockExportOptions>,
            json!({"type": "fuse", "id": "e", "node-name": "q", "mountpoint": "m", "allow-other": "auto", "writable": true}),
        ),
        (
            decode::<ObjectOptions>,
            json!({"qom-type": "iothread", "id": "i", "poll-max-ns": 5, "aio-max-batch": 0}),
        ),
        (
            decode::<ObjectOptions>,
            json!({"qom-type": "authz-list", "id": "a", "rules": [{"match": "x", "policy": "allow", "format": "glob"}]}),
        ),
        (
            decode::<ChardevOptions>,
            json!({"id": "c", "backend": {"type": "socket", "data": {"addr": {"type": "inet", "data": {"host": "h", "port": "1"}}, "server": true}}}),
        ),
        (
            decode::<MonitorOptions>,
            json!({"id": "m", "mode": "control", "chardev": "c", "pretty": true}),
        ),
        (
            decode::<QomSet>,
            json!({"path": "/objects/i", "property": "poll-max-ns", "value": [1, {"a": null}]}),
        ),
        (decode::<QueryBlockstats>, json!({"query-nodes": true})),
        (
            decode::<BlockSetWriteThreshold>,
            json!({"node-name": "n", "write-threshold": 1}),
        ),
    ]
}

#[test]
fn changed_arguments_are_decoded_or_refused() {
    let commands = commands();
    for (_, arguments) in &commands {
        assert!(arguments.is_object());
    }
    for seed in 0..1500u32 {
        let mut random = Random(u64::from(seed));
        let (decode, arguments) = &commands[random.below(commands.len())];
        let mut arguments = arguments.clone();
        for _ in 0..random.below(4) {
            change(&mut arguments, &mut random);
        }
        decode(&arguments);
    }
}

#[test]
fn unchanged_arguments_are_accepted() {
    let node = commands().remove(0).1;
    from_json::<BlockdevOptions>(node).expect("nothing is wrong with it");
}
