//! Keyval text: its syntax, its contradictions, and the exact words for both.

use serde_json::json;
use stord_qmp::keyval::parse;

fn error(text: &str) -> String {
    parse(text, Some("driver")).expect_err(text).message
}

#[test]
fn text_becomes_a_structure_of_strings() {
    let cases = [
        ("", json!({})),
        ("a", json!({"driver": "a"})),
        ("a.b", json!({"driver": "a.b"})),
        ("a,", json!({"driver": "a"})),
        ("driver=x,driver=y", json!({"driver": "y"})),
        ("a=b=c", json!({"a": "b=c"})),
        ("a=", json!({"a": ""})),
        ("a=,b=", json!({"a": "", "b": ""})),
        ("a=x,,y,,,,z,b=1", json!({"a": "x,y,,z", "b": "1"})),
        ("a=,,,b=1", json!({"a": ",", "b": "1"})),
        ("a=x,", json!({"a": "x"})),
        ("a=x,,", json!({"a": "x,"})),
        ("a.b.c=1,a.d=2", json!({"a": {"b": {"c": "1"}, "d": "2"}})),
        ("a.1=y,a.0=x", json!({"a": ["x", "y"]})),
        ("a.00=x,a.0=y", json!({"a": ["x"]})),
        ("a.0.b=1,a.1.0=2", json!({"a": [{"b": "1"}, ["2"]]})),
        ("__org.example_a=1", json!({"__org.example_a": "1"})),
        ("__a.b_c.d=1", json!({"__a.b_c": {"d": "1"}})),
        ("a-b_c9=é", json!({"a-b_c9": "é"})),
        ("help=x", json!({"help": "x"})),
        ("a=help", json!({"a": "help"})),
        ("helpx", json!({"driver": "helpx"})),
    ];
    for (text, value) in cases {
        let parameters = parse(text, Some("driver")).unwrap();
        assert_eq!(parameters.value, value, "{text}");
        assert!(!parameters.help, "{text}");
    }
}

#[test]
fn help_is_recognised_anywhere() {
    for text in ["help", "?", "a,help", "a=1,?", "help,a=1", "a,help,b=2"] {
        assert!(parse(text, Some("driver")).unwrap().help, "{text}");
    }
    let parameters = parse("iothread,help,id=x", Some("qom-type")).unwrap();
    assert_eq!(parameters.value, json!({"qom-type": "iothread", "id": "x"}));
}

#[test]
fn malformed_keys_are_refused() {
    let cases = [
        (".x=1", "Invalid parameter '.x'"),
        ("x..y=1", "Invalid parameter 'x..y'"),
        ("x.=1", "Invalid parameter 'x.'"),
        ("x.0.=1", "Invalid parameter 'x.0.'"),
        ("x.0a=1", "Invalid parameter 'x.0a'"),
        ("=1", "Invalid parameter ''"),
        (",x=1", "Invalid parameter ''"),
        ("a,,b", "Invalid parameter ''"),
        ("file,,", "Invalid parameter ''"),
        ("a b=1", "Invalid parameter 'a b'"),
        ("9a=1", "Invalid parameter '9a'"),
        ("0=x", "Invalid parameter '0'"),
        ("_a=1", "Invalid parameter '_a'"),
        ("__org.x=1", "Invalid parameter '__org.x'"),
        ("x:y=1", "Invalid parameter 'x:y'"),
        ("é=1", "Invalid parameter 'é'"),
        ("file,x.", "Invalid parameter 'x.'"),
        ("file,help,x.", "Invalid parameter 'x.'"),
        ("file,filename", "Expected '=' after parameter 'filename'"),
    ];
    for (text, message) in cases {
        assert_eq!(error(text), message, "{text}");
    }
    let message = "Expected '=' after parameter 'a'";
    assert_eq!(parse("a", None).unwrap_err().message, message);
}

#[test]
fn contradicting_keys_are_refused() {
    let cases = [
        ("a=1,a.x=1", "Parameters 'a.*' used inconsistently"),
        ("a.x=1,a=1", "Parameters 'a.*' used inconsistently"),
        ("a.b=1,a.b.c=1", "Parameters 'a.b.*' used inconsistently"),
        ("a.0.x=1,a.0=2", "Parameters 'a.0.*' used inconsistently"),
        ("a.0=1,a.x=2", "Parameters 'a.*' used inconsistently"),
        ("a.1=1", "Parameter 'a.0' missing"),
        ("a.0=1,a.2=1", "Parameter 'a.1' missing"),
        ("a.b.0=1,a.b.2=1", "Parameter 'a.b.1' missing"),
        ("a.99999999999999999999999=1", "Parameter 'a.0' missing"),
    ];
    for (text, message) in cases {
        assert_eq!(error(text), message, "{text}");
    }
}

#[test]
fn long_and_deep_keys_are_refused() {
    let longest = "a".repeat(127);
    assert!(parse(&format!("{longest}.{longest}=1"), None).is_ok());
    let longer = "a".repeat(128);
    assert_eq!(
        error(&format!("{longer}=1")),
        format!("Parameter '{longer}' is too long")
    );
    assert_eq!(
        error(&format!("x.{longer}=1")),
        format!("Parameter fragment '{longer}' is too long")
    );
    let deep = format!("{}a=1", "a.".repeat(100_000));
    assert!(error(&deep).ends_with("is nested too deeply"));
}
