//! The session, byte for byte: what each input is answered with, as the reference answers it.

use std::time::{Duration, UNIX_EPOCH};

use stord_qmp::Event;
use stord_qmp::json::MAX_NESTING;
use stord_qmp::schema::control::{VersionInfo, VersionTriple};
use stord_qmp::schema::export::BlockExportDeleted;
use stord_qmp::session::{Incoming, Session};

/// What commands are answered with here.
const DONE: &str = "{\"return\": {}}\r\n";

fn ready() -> Session {
    let mut session = Session::new(false);
    session.feed(br#"{"execute":"qmp_capabilities"}"#);
    assert!(session.is_ready());
    session
}

/// Feeds bytes to a session and lets every command succeed.
fn talk(session: &mut Session, bytes: &[u8]) -> String {
    let answers = session.feed(bytes).into_iter().map(|incoming| {
        let bytes = match incoming {
            Incoming::Execute(request) => session.reply(request.id, Ok(serde_json::json!({}))),
            Incoming::Answer { id, result, .. } => session.reply(id, result),
        };
        String::from_utf8(bytes).expect("output is ASCII")
    });
    answers.collect()
}

fn generic(message: &str) -> String {
    format!("{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"{message}\"}}}}\r\n")
}

#[test]
fn greeting_names_version_and_capabilities() {
    let version = VersionInfo {
        qemu: VersionTriple {
            major: 10,
            minor: 0,
            micro: 2,
        },
        package: "stord".to_owned(),
    };
    let greeting = Session::new(false).greeting(&version);
    let expected = concat!(
        r#"{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "#,
        r#""package": "stord"}, "capabilities": ["oob"]}}"#,
        "\r\n"
    );
    assert_eq!(String::from_utf8(greeting).unwrap(), expected);
}

#[test]
fn nothing_but_negotiation_is_executed_before_it() {
    let mut session = Session::new(false);
    let refusal = concat!(
        r#"{"id": 7, "error": {"class": "CommandNotFound", "#,
        r#""desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}}"#,
        "\r\n"
    );
    assert_eq!(talk(&mut session, br#"{"execute":"quit","id":7}"#), refusal);
    let bad = br#"{"execute":"qmp_capabilities","arguments":{"enable":["foo"]}}"#;
    assert_eq!(
        talk(&mut session, bad),
        generic("Parameter 'null' does not accept value 'foo'")
    );
    assert!(!session.is_ready());
    assert_eq!(
        talk(&mut session, br#"{"execute":"qmp_capabilities"}"#),
        DONE
    );
    let again = concat!(
        r#"{"error": {"class": "CommandNotFound", "#,
        r#""desc": "Capabilities negotiation is already complete, command ignored"}}"#,
        "\r\n"
    );
    assert_eq!(
        talk(&mut session, br#"{"execute":"qmp_capabilities"}"#),
        again
    );
}

#[test]
fn out_of_band_commands_need_the_capability() {
    let unexpected = generic("QMP input member 'exec-oob' is unexpected");
    assert_eq!(talk(&mut ready(), br#"{"exec-oob":"quit"}"#), unexpected);

    let mut session = Session::new(false);
    let enable = br#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}"#;
    assert_eq!(
        talk(&mut session, enable),
        "{\"return\": {}, \"id\": 1}\r\n"
    );
    let incoming = session.feed(br#"{"exec-oob":"quit"}"#);
    assert!(matches!(&incoming[..], [Incoming::Execute(request)] if request.oob));
    assert!(incoming.iter().all(Incoming::is_out_of_band));
    let overtaking = |session: &mut Session, text: &[u8]| -> Vec<bool> {
        let incoming = session.feed(text);
        incoming.iter().map(Incoming::is_out_of_band).collect()
    };
    let both = br#"{"exec-oob":"quit","execute":"x"} {"execute":"x"} {"exec-oob":7}"#;
    assert_eq!(overtaking(&mut session, both), [false, false, true]);
    assert_eq!(overtaking(&mut ready(), both), [false, false, false]);
    assert_eq!(
        talk(&mut session, br#"{"exec-oob":"quit","execute":"x"}"#),
        generic("QMP input member 'execute' clashes with 'exec-oob'")
    );
    assert_eq!(
        talk(&mut session, br#"{"exec-oob":"qmp_capabilities"}"#),
        generic("The command qmp_capabilities does not support OOB")
    );
}

#[test]
fn what_is_no_command_is_refused() {
    let cases = [
        (
            r#"{"execute":"quit","arguments":1}"#,
            "QMP input member 'arguments' must be an object",
        ),
        (
            r#"{"execute":"x","arguments":null}"#,
            "QMP input member 'arguments' must be an object",
        ),
        (
            r#"{"execute":1,"foo":2}"#,
            "QMP input member 'execute' must be a string",
        ),
        (
            r#"{"arguments":1,"execute":2}"#,
            "QMP input member 'execute' must be a string",
        ),
        (
            r#"{"execute":"quit","foo":1}"#,
            "QMP input member 'foo' is unexpected",
        ),
        (r#"{"arguments":{}}"#, "QMP input lacks member 'execute'"),
        ("{}", "QMP input lacks member 'execute'"),
        ("[]", "QMP input must be a JSON object"),
        ("1 ", "QMP input must be a JSON object"),
        ("\"x\"", "QMP input must be a JSON object"),
        ("null\n", "QMP input must be a JSON object"),
    ];
    for (input, message) in cases {
        assert_eq!(
            talk(&mut ready(), input.as_bytes()),
            generic(message),
            "{input}"
        );
    }
}

#[test]
fn ids_of_every_type_come_back() {
    for id in [
        "1",
        "null",
        "\"x\"",
        "[1, {\"a\": []}]",
        "1.50",
        "18446744073709551616",
    ] {
        let command = format!(r#"{{"execute":"quit","id":{id}}}"#);
        let answer = talk(&mut ready(), command.as_bytes());
        assert_eq!(answer, format!("{{\"return\": {{}}, \"id\": {id}}}\r\n"));
    }
    let error = "{\"id\": 9, \"error\": {\"class\": \"GenericError\", \
                 \"desc\": \"QMP input lacks member 'execute'\"}}\r\n";
    assert_eq!(talk(&mut ready(), br#"{"id":9}"#), error);
}

#[test]
fn strings_are_answered_in_ascii() {
    let command = b"{'execute':'quit','id':'\\u00e9\\u0001\\n\\ud83d\\ude00 \x7f\\\"\\\\/\\/'}";
    assert_eq!(
        talk(&mut ready(), command),
        "{\"return\": {}, \"id\": \"\\u00E9\\u0001\\n\\uD83D\\uDE00 \\u007F\\\"\\\\//\"}\r\n"
    );
}

/// Each input is followed by a command; the number says how many answers come before its answer.
#[test]
fn garbage_is_answered_and_the_next_command_executed() {
    let value = "expecting value";
    let cases: &[(&[u8], &[&str])] = &[
        (b"foo ", &["invalid keyword 'foo'"]),
        (b"}", &[value]),
        (b"]", &[value]),
        (b":", &[value]),
        (b",,", &[value, value]),
        (b"{\"a\"}", &["missing : in object pair"]),
        (b"{\"a\":}", &[value]),
        (b"{\"a\" 1}", &["missing : in object pair"]),
        (b"{,}", &[value]),
        (b"{1:2}", &["key is not a string in object"]),
        (b"{[]:2}", &["key is not a string in object"]),
        (b"[1,]", &[value]),
        (b"{\"a\":1,}", &[value]),
        (b"[1 2]", &["expected separator in list"]),
        (b"[1}]", &["expected separator in list", value]),
        (b"{\"a\":1]}", &["expected separator in dict", value]),
        (b"[}", &[value]),
        (b"{]", &[value]),
        (b"{\"a\":1,\"a\":2}", &["duplicate key"]),
        (b"\"\\q\"", &["invalid escape sequence in string"]),
        // Four bytes are shown, the closing quote among them.
        (
            b"\"\\u12\"",
            &["\\\\u12\\\" is not a valid Unicode character"],
        ),
        (
            b"\"\\ud800\"",
            &["\\\\ud800 is not a valid Unicode character"],
        ),
        (
            b"\"\\ud83d\\u0041\"",
            &["\\\\ud83d is not a valid Unicode character"],
        ),
        (
            b"\"\\ufffe\"",
            &["\\\\ufffe is not a valid Unicode character"],
        ),
        (
            b"\"\\u00zzab\"",
            &["\\\\u00zz is not a valid Unicode character"],
        ),
        (b"\"\xc3(\"", &["invalid UTF-8 sequence in string"]),
        (b"\"\xed\xa0\x80\"", &["invalid UTF-8 sequence in string"]),
        (b"\"\xef\xbf\xbf\"", &["invalid UTF-8 sequence in string"]),
        (
            b"\"\xf4\x90\x80\x80\"",
            &["invalid UTF-8 sequence in string"],
        ),
        (b"\"a\tb\" ", &["stray '\\\"a\\t'"]),
        (b"\"abc\n", &["stray '\\\"abc\\n'"]),
        (b"\"\xff", &["stray '\\\"\\uFFFD'"]),
        (b"\xff", &["stray '\\uFFFD'"]),
        (b"{\"execute\":\"quit\"\xff", &["stray '\\uFFFD'"]),
        (b"x\xffy\n", &["invalid keyword 'x'", "stray '\\uFFFD'"]),
        (b"\xef\xbb\xbf", &["stray '\\uFFFD'"]),
        (b"\0", &["stray ''"]),
        (b"01 ", &["stray '01'"]),
        (b"1.e ", &["stray '1.e'"]),
        (b"1e \n", &["stray '1e '"]),
        (b"#", &["stray '#'"]),
        (b"%d", &["stray '%'"]),
        (b"{\"a\":%d}", &["stray '%'", value]),
        (b"tRue ", &["invalid keyword 't'", "stray 'R'"]),
    ];
    for (input, errors) in cases {
        let mut bytes = input.to_vec();
        bytes.extend_from_slice(br#"{"execute":"quit"}"#);
        let errors = errors
            .iter()
            .map(|error| generic(&format!("JSON parse error, {error}")));
        let expected: String = errors.chain([DONE.to_owned()]).collect();
        let input = String::from_utf8_lossy(input);
        assert_eq!(talk(&mut ready(), &bytes), expected, "{input}");
    }
}

#[test]
fn commands_may_be_split_and_joined_anywhere() {
    let bytes = br#"{"execute":"a"} {"execute":"b","arguments":{"x":"}"}}{"execute":"c"}"#;
    for size in 1..bytes.len() {
        let mut session = ready();
        let incoming = bytes.chunks(size).flat_map(|chunk| session.feed(chunk));
        let names: Vec<_> = incoming
            .map(|incoming| match incoming {
                Incoming::Execute(request) => request.command,
                Incoming::Answer { result, .. } => panic!("{result:?}"),
            })
            .collect();
        assert_eq!(names, ["a", "b", "c"]);
    }
}

#[test]
fn nesting_is_limited_to_1024() {
    let nested = |depth| [vec![b'['; depth], vec![b']'; depth]].concat();
    let object = generic("QMP input must be a JSON object");
    assert_eq!(talk(&mut ready(), &nested(1024)), object);
    let answer = talk(&mut ready(), &nested(1025));
    assert!(answer.starts_with(&generic("JSON nesting depth limit exceeded")));
}

#[test]
fn deepest_id_comes_back() {
    let depth = MAX_NESTING - 1;
    let id = ["[".repeat(depth), "]".repeat(depth)].concat();
    let command = format!(r#"{{"execute":"quit","id":{id}}}"#);
    let answer = talk(&mut ready(), command.as_bytes());
    assert_eq!(answer, format!("{{\"return\": {{}}, \"id\": {id}}}\r\n"));
    let mut pretty = Session::new(true);
    let answer = talk(&mut pretty, command.as_bytes());
    assert_eq!(
        answer.lines().filter(|line| line.ends_with('[')).count(),
        depth
    );
}

#[test]
fn events_are_sent_when_ready() {
    let deleted = BlockExportDeleted { id: "e".to_owned() };
    let event = Event::new(&deleted);
    let at = UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
    assert!(Session::new(false).event(&event, at).is_empty());
    let expected = concat!(
        r#"{"timestamp": {"seconds": 1700000000, "microseconds": 123456}, "#,
        r#""event": "BLOCK_EXPORT_DELETED", "data": {"id": "e"}}"#,
        "\r\n"
    );
    assert_eq!(
        String::from_utf8(ready().event(&event, at)).unwrap(),
        expected
    );
}

#[test]
fn pretty_output_has_one_member_per_line() {
    let mut session = Session::new(true);
    let answer = talk(
        &mut session,
        br#"{"execute":"x","id":{"a":{},"b":[],"c":[1,{"x":1}]}}"#,
    );
    let expected = r#"{
    "id": {
        "a": {
        },
        "b": [
        ],
        "c": [
            1,
            {
                "x": 1
            }
        ]
    },
    "error": {
        "class": "CommandNotFound",
        "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"
    }
}
"#;
    assert_eq!(answer, expected.replace('\n', "\r\n"));
}

#[test]
fn ten_mebibytes_of_brackets_are_survived() {
    let mut session = ready();
    let mut errors = 0;
    for _ in 0..160 {
        errors += session.feed(&[b'['; 65536]).len();
    }
    assert_eq!(errors, 160 * 65536 / 1025);

    let mut session = ready();
    session.feed(b"\xff[");
    let lists = b"[],".repeat(1000);
    let refused = (0..3500).flat_map(|_| session.feed(&lists)).next();
    let limit = "JSON token count limit exceeded";
    assert!(
        matches!(refused, Some(Incoming::Answer { result: Err(error), .. }) if error.message == limit)
    );
    // Ready for the next command.
    session.feed(b"\xff");
    assert_eq!(talk(&mut session, br#"{"execute":"quit"}"#), DONE);
}
