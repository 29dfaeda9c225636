//! Integers, sizes, booleans and lists: their ranges, their spelling in keyval text, and the words
//! that refuse the rest.

use stord_qmp::builtin::Null;
use stord_qmp::{Qapi, from_keyval, to_json};

/// One member of each kind.
#[derive(Clone, Debug, Default, PartialEq, Qapi)]
struct Scalars {
    i8: Option<i8>,
    u16: Option<u16>,
    i32: Option<i32>,
    i64: Option<i64>,
    u64: Option<u64>,
    #[qapi(size)]
    size: Option<u64>,
    on: Option<bool>,
    number: Option<f64>,
    none: Option<Null>,
    list: Option<Vec<Inner>>,
}

#[derive(Clone, Debug, PartialEq, Qapi)]
struct Inner {
    #[qapi(size)]
    bytes: u64,
}

fn decode(text: &str) -> Result<Scalars, String> {
    from_keyval(text, None).map_err(|error| error.message)
}

fn size(text: &str) -> Option<u64> {
    let refused = "Parameter 'size' expects size";
    match decode(&format!("size={text}")) {
        Ok(scalars) => scalars.size,
        Err(message) => {
            assert_eq!(message, refused, "{text}");
            None
        }
    }
}

#[test]
fn sizes_have_units_and_fractions() {
    let cases = [
        ("0", 0),
        ("1", 1),
        ("1B", 1),
        ("1k", 1 << 10),
        ("1K", 1 << 10),
        ("3M", 3 << 20),
        ("1G", 1 << 30),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("15E", 15 << 60),
        ("1.5k", 1536),
        ("1.3k", 1331),
        (".5k", 512),
        ("1.k", 1024),
        ("1.0", 1),
        ("1.", 1),
        ("0x10", 16),
        ("0x1b", 27),
        ("010", 10),
        ("+1", 1),
        (" 1k", 1024),
        ("18446744073709551615", u64::MAX),
    ];
    for (text, bytes) in cases {
        assert_eq!(size(text), Some(bytes), "{text}");
    }
    assert!(size("15.999999999999999999999999999999E") > Some(u64::MAX - 2));
}

#[test]
fn what_is_no_size_is_refused() {
    let cases = [
        "",
        "x",
        "1x",
        "-1",
        "1.5",
        "1.5B",
        "0x1k",
        "1e2",
        "16E",
        "1kk",
        ".k",
        ".",
        "k",
        "1 k",
        "++1",
        "0x",
        "0x+1",
        "18446744073709551616",
        "9999999999999999999E",
        "1.5.5k",
        "1é",
    ];
    for text in cases {
        assert_eq!(size(text), None, "{text}");
    }
}

#[test]
fn integers_in_text_are_read_as_c_does() {
    let cases = [
        ("0x10", 16),
        ("010", 8),
        ("+1", 1),
        (" 1", 1),
        ("-5", -5),
        ("9223372036854775807", i64::MAX),
        ("-9223372036854775808", i64::MIN),
    ];
    for (text, value) in cases {
        assert_eq!(
            decode(&format!("i64={text}")).unwrap().i64,
            Some(value),
            "{text}"
        );
    }
    for text in [
        "",
        "x",
        "1k",
        "1 ",
        "0x",
        "08",
        "- 1",
        "1.0",
        "9223372036854775808",
        "0x-1",
        "--1",
    ] {
        let message = decode(&format!("i64={text}")).unwrap_err();
        assert_eq!(message, "Parameter 'i64' expects integer", "{text}");
    }
}

#[test]
fn unsigned_integers_wrap_as_the_reference_s_do() {
    let value = |text: &str| decode(text).map(|scalars| scalars.u64);
    assert_eq!(value("u64=-1"), Ok(Some(u64::MAX)));
    assert_eq!(value("u64=-18446744073709551615"), Ok(Some(1)));
    assert_eq!(value("{\"u64\": -1}"), Ok(Some(u64::MAX)));
    assert_eq!(value("{\"u64\": 18446744073709551615}"), Ok(Some(u64::MAX)));
    let refused = Err("Parameter 'u64' expects integer".to_owned());
    assert_eq!(value("u64=18446744073709551616"), refused);
    assert_eq!(value("u64=-18446744073709551616"), refused);
    for json in [
        "18446744073709551616",
        "1e3",
        "1.5",
        "\"1\"",
        "null",
        "-9223372036854775809",
    ] {
        let refused = Err("Parameter 'u64' expects uint64".to_owned());
        assert_eq!(value(&format!("{{\"u64\": {json}}}")), refused, "{json}");
    }
}

#[test]
fn narrow_integers_have_ranges() {
    let cases = [
        ("u16=65536", "Parameter 'u16' expects uint16_t"),
        ("u16=-1", "Parameter 'u16' expects uint16_t"),
        ("u16=x", "Parameter 'u16' expects integer"),
        ("{\"u16\": 65536}", "Parameter 'u16' expects uint16_t"),
        ("{\"u16\": \"x\"}", "Parameter 'u16' expects uint64"),
        ("i8=128", "Parameter 'i8' expects int8_t"),
        ("i8=-129", "Parameter 'i8' expects int8_t"),
        ("{\"i32\": 2147483648}", "Parameter 'i32' expects int32_t"),
        (
            "{\"i32\": \"1\"}",
            "Invalid parameter type for 'i32', expected: integer",
        ),
        (
            "{\"i64\": 9223372036854775808}",
            "Invalid parameter type for 'i64', expected: integer",
        ),
        (
            "{\"i64\": 1.0}",
            "Invalid parameter type for 'i64', expected: integer",
        ),
        (
            "{\"i64\": []}",
            "Invalid parameter type for 'i64', expected: integer",
        ),
    ];
    for (text, message) in cases {
        assert_eq!(decode(text), Err(message.to_owned()), "{text}");
    }
    assert_eq!(decode("u16=65535,i8=-128").unwrap().u16, Some(65535));
}

#[test]
fn booleans_have_eight_spellings() {
    for (words, on) in [("on yes true y", true), ("off no false n", false)] {
        for word in words.split(' ') {
            assert_eq!(decode(&format!("on={word}")).unwrap().on, Some(on));
        }
    }
    for word in ["", "ON", "1", "maybe"] {
        let message = decode(&format!("on={word}")).unwrap_err();
        assert_eq!(message, "Parameter 'on' expects 'on' or 'off'");
    }
    let message = decode("{\"on\": \"on\"}").unwrap_err();
    assert_eq!(
        message,
        "Invalid parameter type for 'on', expected: boolean"
    );
}

#[test]
fn numbers_are_finite() {
    assert_eq!(decode("number=1.5").unwrap().number, Some(1.5));
    assert_eq!(decode("{\"number\": 2}").unwrap().number, Some(2.0));
    let refused = "Parameter 'number' expects number";
    for text in ["inf", "nan", "x", "1e999"] {
        assert_eq!(decode(&format!("number={text}")).unwrap_err(), refused);
    }
    let refused = "Invalid parameter type for 'number', expected: number";
    assert_eq!(decode("{\"number\": 1e999}").unwrap_err(), refused);
    assert_eq!(decode("{\"number\": \"1\"}").unwrap_err(), refused);
}

#[test]
fn absent_is_not_null() {
    assert_eq!(decode("{}"), Ok(Scalars::default()));
    for member in ["i64", "on", "list", "number"] {
        assert!(
            decode(&format!("{{\"{member}\": null}}")).is_err(),
            "{member}"
        );
    }
    assert_eq!(decode("{\"none\": null}").unwrap().none, Some(Null));
    assert_eq!(decode("none=").unwrap().none, Some(Null));
    let refused = "Invalid parameter type for 'none', expected: null";
    assert_eq!(decode("none=x").unwrap_err(), refused);
    let encoded = to_json(&decode("{\"none\": null}").unwrap()).to_string();
    assert_eq!(encoded, "{\"none\":null}");
}

#[test]
fn elements_are_named_by_the_syntax_they_came_in() {
    let cases = [
        (
            "list.0.bytes=1k,list.1.bytes=x",
            "Parameter 'list.1.bytes' expects size",
        ),
        (
            "list.0.bytes=1k,list.1.x=x",
            "Parameter 'list.1.bytes' is missing",
        ),
        (
            "list.0.bytes=1k,list.0.x=x",
            "Parameter 'list.0.x' is unexpected",
        ),
        (
            "list=1",
            "Invalid parameter type for 'list', expected: array",
        ),
        (
            "list.0=1",
            "Invalid parameter type for 'list.0', expected: object",
        ),
        (
            "{\"list\": [{\"bytes\": 1}, {}]}",
            "Parameter 'list[1].bytes' is missing",
        ),
        (
            "{\"list\": [1]}",
            "Invalid parameter type for 'list[0]', expected: object",
        ),
        (
            "{\"list\": {}}",
            "Invalid parameter type for 'list', expected: array",
        ),
    ];
    for (text, message) in cases {
        assert_eq!(decode(text), Err(message.to_owned()), "{text}");
    }
    let list = decode("list.0.bytes=1k,list.1.bytes=2")
        .unwrap()
        .list
        .unwrap();
    assert_eq!(list, [Inner { bytes: 1024 }, Inner { bytes: 2 }]);
}
