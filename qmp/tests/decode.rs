//! Decoding of JSON and keyval text: what is accepted, and the exact words of what is not.

use stord_qmp::json::MAX_NESTING;
use stord_qmp::schema::block::{BlockdevDriver, BlockdevOptions, BlockdevRef};
use stord_qmp::schema::export::BlockExportOptions;
use stord_qmp::visitor::MAX_DEPTH;
use stord_qmp::{from_keyval, to_json};

fn node_error(text: &str) -> String {
    from_keyval::<BlockdevOptions>(text, Some("driver"))
        .expect_err(text)
        .message
}

#[test]
fn keyval_node_with_inline_child_decodes() {
    let text = "raw,node-name=top,file.driver=file,file.filename=a,,b,offset=0x200,read-only=on";
    let node: BlockdevOptions = from_keyval(text, Some("driver")).unwrap();
    assert_eq!(node.read_only, Some(true));
    let BlockdevDriver::Raw(raw) = &node.driver else {
        panic!("{node:?}");
    };
    assert_eq!(raw.offset, Some(512));
    let BlockdevRef::Definition(child) = &raw.file else {
        panic!("{node:?}");
    };
    assert_eq!(
        to_json(child.as_ref()).to_string(),
        r#"{"driver":"file","filename":"a,b"}"#
    );
}

#[test]
fn errors_name_the_parameter_by_its_path() {
    let cases = [
        ("", "Parameter 'driver' is missing"),
        ("help", "Help is not available for this option"),
        ("file,?", "Help is not available for this option"),
        ("foo", "Parameter 'driver' does not accept value 'foo'"),
        ("file", "Parameter 'filename' is missing"),
        ("file,filename", "Expected '=' after parameter 'filename'"),
        ("file,filename=x,foo=1", "Parameter 'foo' is unexpected"),
        ("file,filename=x,foo.x=1", "Parameter 'foo' is unexpected"),
        (
            "file,filename=x,cache.foo=1",
            "Parameter 'cache.foo' is unexpected",
        ),
        (
            "file,filename=x,read-only=maybe",
            "Parameter 'read-only' expects 'on' or 'off'",
        ),
        (
            "file,filename=x,cache.direct=",
            "Parameter 'cache.direct' expects 'on' or 'off'",
        ),
        (
            "file,filename=x,aio-max-batch=1k",
            "Parameter 'aio-max-batch' expects integer",
        ),
        (
            "file,filename=x,cache=x",
            "Invalid parameter type for 'cache', expected: object",
        ),
        (
            "file,filename=x,discard=x",
            "Parameter 'discard' does not accept value 'x'",
        ),
        (
            "file,filename.x=x",
            "Parameters 'filename.*' are unexpected",
        ),
        ("raw,file.filename=x", "Parameter 'file.driver' is missing"),
        (
            "raw,file.driver=x",
            "Parameter 'driver' does not accept value 'x'",
        ),
        (
            "raw,file.0=x",
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (
            r#"{"driver":1}"#,
            "Invalid parameter type for 'driver', expected: string",
        ),
        (
            r#"{"driver":"qcow2","file":{"driver":"raw","file":{"driver":"file","filename":2}}}"#,
            "Invalid parameter type for 'file.file.filename', expected: string",
        ),
        (
            r#"{"driver":"qcow2","file":"x","backing":1}"#,
            "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
        ),
        (
            r#"{"driver":"null-co","latency-ns":1e3}"#,
            "Parameter 'latency-ns' expects uint64",
        ),
    ];
    for (text, message) in cases {
        assert_eq!(node_error(text), message, "{text}");
    }
}

#[test]
fn export_takes_one_or_several_iothreads() {
    let text = "fuse,id=e,node-name=n,mountpoint=m,iothread.0=a,iothread.1=b";
    let export: BlockExportOptions = from_keyval(text, Some("type")).unwrap();
    assert_eq!(to_json(&export)["iothread"].to_string(), r#"["a","b"]"#);
    let text = "fuse,id=e,node-name=n,mountpoint=m,iothread=a";
    let export: BlockExportOptions = from_keyval(text, Some("type")).unwrap();
    assert_eq!(to_json(&export)["iothread"].to_string(), r#""a""#);
}

/// A chain of `depth` nodes above the lowest one.
fn chain(depth: usize) -> String {
    let text = [
        r#"{"driver":"raw","file":"#.repeat(depth),
        r#"{"driver":"null-co"}"#.to_owned(),
        "}".repeat(depth),
    ];
    text.concat()
}

#[test]
fn deep_chain_decodes_and_encodes() {
    let text = chain(MAX_DEPTH);
    let node: BlockdevOptions = from_keyval(&text, None).unwrap();
    let encoded = stord_qmp::json::to_compact(&to_json(&node));
    assert_eq!(encoded.replace(' ', ""), text);
}

#[test]
fn deeper_chain_is_refused_without_exhausting_the_stack() {
    for depth in [MAX_DEPTH + 1, MAX_NESTING - 1] {
        let error = node_error(&chain(depth));
        assert!(
            error.ends_with("file.file' is nested too deeply"),
            "{error}"
        );
    }
}
