//! What holds for all inputs: encoding loses nothing, no bytes can make the session panic or fall
//! out of step, and the JSON reader agrees with serde_json wherever both have an opinion.

use proptest::option;
use proptest::prelude::*;
use serde_json::Value;
use stord_qmp::json::{parse, to_compact, to_pretty};
use stord_qmp::schema::block::{
    BlockdevAioOptions, BlockdevCacheOptions, BlockdevDetectZeroesOptions, BlockdevDiscardOptions,
    BlockdevDriver, BlockdevOptions, BlockdevOptionsFile, BlockdevOptionsNull,
    BlockdevOptionsQcow2, BlockdevOptionsRaw, BlockdevRef, BlockdevRefOrNull, OnOffAuto,
    Qcow2OverlapCheckFlags, Qcow2OverlapCheckMode, Qcow2OverlapChecks,
};
use stord_qmp::session::{Incoming, Session};
use stord_qmp::{from_json, from_keyval, to_json};

fn file() -> impl Strategy<Value = BlockdevOptionsFile> {
    (
        any::<String>(),
        option::of(prop::sample::select(OnOffAuto::ALL)),
        option::of(prop::sample::select(BlockdevAioOptions::ALL)),
        any::<Option<i64>>(),
        any::<Option<bool>>(),
    )
        .prop_map(
            |(filename, locking, aio, aio_max_batch, drop_cache)| BlockdevOptionsFile {
                filename: filename.replace(is_noncharacter, ""),
                locking,
                aio,
                aio_max_batch,
                drop_cache,
                ..BlockdevOptionsFile::new("")
            },
        )
}

/// JSON strings cannot hold these here.
fn is_noncharacter(character: char) -> bool {
    let code = u32::from(character);
    (0xfdd0..0xfdf0).contains(&code) || code & 0xfffe == 0xfffe
}

fn null() -> impl Strategy<Value = BlockdevOptionsNull> {
    (
        any::<Option<i64>>(),
        any::<Option<u64>>(),
        any::<Option<bool>>(),
    )
        .prop_map(|(size, latency_ns, read_zeroes)| BlockdevOptionsNull {
            size,
            latency_ns,
            read_zeroes,
        })
}

fn overlap_checks() -> impl Strategy<Value = Qcow2OverlapChecks> {
    let mode = || prop::sample::select(Qcow2OverlapCheckMode::ALL);
    let flags = (mode(), any::<Option<bool>>()).prop_map(|(template, active_l1)| {
        Qcow2OverlapChecks::Flags(Qcow2OverlapCheckFlags {
            template: Some(template),
            active_l1,
            ..Default::default()
        })
    });
    prop_oneof![mode().prop_map(Qcow2OverlapChecks::Mode), flags]
}

fn reference(node: impl Strategy<Value = BlockdevOptions>) -> impl Strategy<Value = BlockdevRef> {
    prop_oneof![
        "[a-z][a-z0-9.-]*".prop_map(BlockdevRef::Reference),
        node.prop_map(|node| BlockdevRef::Definition(Box::new(node))),
    ]
}

/// A node on top of nodes that `node` makes, with its common options.
fn format(node: BoxedStrategy<BlockdevOptions>) -> impl Strategy<Value = BlockdevDriver> {
    let raw = (reference(node.clone()), any::<Option<i64>>()).prop_map(|(file, offset)| {
        BlockdevDriver::Raw(BlockdevOptionsRaw {
            offset,
            ..BlockdevOptionsRaw::new(file)
        })
    });
    let qcow2 = (
        reference(node.clone()),
        option::of(reference(node)),
        any::<bool>(),
        option::of(overlap_checks()),
    );
    let qcow2 = qcow2.prop_map(|(file, backing, no_backing, overlap_check)| {
        let backing = match backing {
            Some(BlockdevRef::Definition(node)) => Some(BlockdevRefOrNull::Definition(node)),
            Some(BlockdevRef::Reference(name)) => Some(BlockdevRefOrNull::Reference(name)),
            None if no_backing => Some(BlockdevRefOrNull::Null),
            None => None,
        };
        BlockdevDriver::Qcow2(BlockdevOptionsQcow2 {
            backing,
            overlap_check,
            ..BlockdevOptionsQcow2::new(file)
        })
    });
    prop_oneof![raw, qcow2]
}

fn with_common_options(
    driver: impl Strategy<Value = BlockdevDriver>,
) -> impl Strategy<Value = BlockdevOptions> {
    (
        driver,
        option::of("[a-z][a-z0-9.-]*"),
        option::of(prop::sample::select(BlockdevDiscardOptions::ALL)),
        any::<Option<bool>>(),
        option::of(prop::sample::select(BlockdevDetectZeroesOptions::ALL)),
    )
        .prop_map(
            |(driver, node_name, discard, direct, detect_zeroes)| BlockdevOptions {
                node_name,
                discard,
                cache: direct.map(|direct| BlockdevCacheOptions {
                    direct: Some(direct),
                    no_flush: None,
                }),
                detect_zeroes,
                ..BlockdevOptions::new(driver)
            },
        )
}

fn node() -> impl Strategy<Value = BlockdevOptions> {
    let leaf = prop_oneof![
        file().prop_map(BlockdevDriver::File),
        file().prop_map(BlockdevDriver::HostDevice),
        null().prop_map(BlockdevDriver::NullCo),
        null().prop_map(BlockdevDriver::NullAio),
    ];
    with_common_options(leaf).prop_recursive(4, 16, 2, |inner| with_common_options(format(inner)))
}

/// The keyval text of a structure, if it has one: there is none for null and nothing.
fn to_keyval(prefix: &str, value: &Value, parameters: &mut Vec<String>) -> Option<()> {
    let text = match value {
        Value::Object(members) => {
            for (name, value) in members {
                to_keyval(&format!("{prefix}.{name}"), value, parameters)?;
            }
            return Some(());
        }
        Value::Null | Value::Array(_) => return None,
        Value::Bool(value) => if *value { "on" } else { "off" }.to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.replace(',', ",,"),
    };
    parameters.push(format!("{}={text}", prefix.trim_start_matches('.')));
    Some(())
}

/// Any JSON value that the reader takes.
fn value() -> impl Strategy<Value = Value> {
    let text = || any::<String>().prop_map(|text| text.replace(is_noncharacter, ""));
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 64, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((text(), inner), 0..6)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// Pieces of JSON and QMP.
const TOKENS: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    " ",
    "\n",
    "\t",
    "1",
    "-",
    "0",
    ".5",
    "e+1",
    "null",
    "tru",
    "true",
    "\"",
    "'",
    "\\",
    "\\n",
    "\\u00e9",
    "\\ud83d",
    "\\ude00",
    "\"a\"",
    "'b'",
    "%",
    "\0",
    "é",
    "\"execute\":",
    "\"quit\"",
    "\"id\":",
    "{\"execute\":\"quit\"}",
    "{\"execute\":\"qmp_capabilities\"}",
];

/// Bytes that are nearly JSON, or nearly QMP.
fn tokens() -> impl Strategy<Value = Vec<u8>> {
    let token = prop_oneof![
        9 => prop::sample::select(TOKENS).prop_map(|token| token.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..4),
    ];
    prop::collection::vec(token, 0..64).prop_map(|tokens| tokens.concat())
}

fn answers(incoming: Vec<Incoming>, session: &Session, bytes: &mut Vec<u8>) {
    for incoming in incoming {
        bytes.extend(match incoming {
            Incoming::Execute(request) => session.reply(request.id, Ok(Value::Null)),
            Incoming::Answer { id, result, .. } => session.reply(id, result),
        });
    }
}

proptest! {
    #[test]
    fn decoding_reverses_encoding(node in node()) {
        let text = to_compact(&to_json(&node));
        prop_assert!(text.is_ascii());
        let decoded: BlockdevOptions = from_json(parse(text.as_bytes()).unwrap()).unwrap();
        prop_assert_eq!(&decoded, &node);
        let decoded: BlockdevOptions = from_keyval(&text, Some("driver")).unwrap();
        prop_assert_eq!(&decoded, &node);
    }

    #[test]
    fn keyval_says_the_same_as_json(node in node()) {
        let mut parameters = Vec::new();
        if to_keyval("", &to_json(&node), &mut parameters).is_some() {
            let decoded: BlockdevOptions = from_keyval(&parameters.join(","), None).unwrap();
            prop_assert_eq!(decoded, node);
        }
    }

    #[test]
    fn an_extra_or_missing_member_is_named(node in node(), at in any::<prop::sample::Index>()) {
        let mut value = to_json(&node);
        value["extra-member"] = Value::Null;
        let error = from_json::<BlockdevOptions>(value.clone()).unwrap_err();
        prop_assert_eq!(error.message, "Parameter 'extra-member' is unexpected");

        let members = value.as_object_mut().unwrap();
        members.shift_remove("extra-member");
        let name = members.keys().nth(at.index(members.len())).unwrap().clone();
        members.shift_remove(&name);
        match from_json::<BlockdevOptions>(value.clone()) {
            Err(error) => prop_assert_eq!(error.message, format!("Parameter '{name}' is missing")),
            Ok(without) => prop_assert_eq!(to_json(&without), value),
        }
    }

    #[test]
    fn keyval_text_never_panics(text in "[a-c0-2.,=?_ é-]{0,40}") {
        if let Ok(parameters) = stord_qmp::keyval::parse(&text, Some("driver")) {
            prop_assert!(parameters.value.is_object());
        }
        let _ = from_keyval::<BlockdevOptions>(&text, None);
    }

    #[test]
    fn reading_reverses_writing(value in value()) {
        prop_assert_eq!(&parse(to_compact(&value).as_bytes()).unwrap(), &value);
        prop_assert_eq!(&parse(to_pretty(&value).as_bytes()).unwrap(), &value);
        prop_assert_eq!(&serde_json::from_str::<Value>(&to_pretty(&value)).unwrap(), &value);
    }

    #[test]
    fn reader_agrees_with_serde_json(bytes in tokens()) {
        let ours = parse(&bytes);
        let theirs = serde_json::from_slice::<Value>(&bytes);
        match (ours, theirs) {
            (Ok(ours), Ok(theirs)) => prop_assert_eq!(ours, theirs),
            (Err(error), Ok(_)) => {
                prop_assert_eq!(error.message, "JSON parse error, duplicate key");
            }
            (Ok(_), Err(_)) => prop_assert!(bytes.contains(&b'\'')),
            (Err(_), Err(_)) => {}
        }
    }

    #[test]
    fn session_does_not_depend_on_how_bytes_arrive(
        bytes in tokens(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let mut whole = Session::new(false);
        let mut expected = Vec::new();
        let incoming = whole.feed(&bytes);
        answers(incoming, &whole, &mut expected);

        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.sort_unstable();
        cuts.push(bytes.len());
        let mut pieces = Session::new(false);
        let mut actual = Vec::new();
        let mut start = 0;
        for end in cuts {
            let incoming = pieces.feed(&bytes[start..end]);
            answers(incoming, &pieces, &mut actual);
            start = end;
        }
        prop_assert_eq!(actual, expected);
    }

    #[test]
    fn session_is_in_step_after_the_resynchronisation_byte(bytes in tokens()) {
        let mut session = Session::new(false);
        session.feed(&bytes);
        session.feed(b"\xff");
        if !session.is_ready() {
            session.feed(br#"{"execute":"qmp_capabilities"}"#);
        }
        let incoming = session.feed(br#"{"execute":"quit","id":42}"#);
        let [Incoming::Execute(request)] = &incoming[..] else {
            panic!("{incoming:?}");
        };
        prop_assert_eq!(&request.id, &Some(42.into()));
        prop_assert_eq!(&request.command, "quit");
    }

    #[test]
    fn session_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let mut session = Session::new(true);
        let mut output = Vec::new();
        let incoming = session.feed(&bytes);
        answers(incoming, &session, &mut output);
        prop_assert!(output.is_ascii());
    }
}
