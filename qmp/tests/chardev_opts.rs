//! `--chardev` as it is typed: old and new spellings, and the exact words of what is refused.

use stord_qmp::chardev_opts::translate;
use stord_qmp::opts::Opts;
use stord_qmp::{Error, to_json};

fn chardev(text: &str) -> Result<String, Error> {
    let devices = translate(Opts::parse(text, "backend")?)?;
    let devices: Vec<_> = (devices.iter())
        .map(|options| stord_qmp::json::to_compact(&to_json(options)))
        .collect();
    Ok(devices.join(" "))
}

#[test]
fn old_and_new_spellings_mean_the_same() {
    let expected = r#"{"id": "c", "backend": {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": "/s,1"}}, "server": true, "wait": false}}}"#;
    for text in [
        "socket,id=c,path=/s,,1,server=on,wait=off",
        "socket,id=c,path=/s,,1,server,nowait",
        "socket,path=x,path=/s,,1,server=off,server=yes,wait=n,id=c,id=d",
        "id=c,server,backend=socket,nowait,path=/s,,1",
    ] {
        assert_eq!(chardev(text).unwrap(), expected, "{text}");
    }
}

#[test]
fn backends_take_their_options() {
    let cases = [
        ("null,id=n", r#"{"type": "null", "data": {}}"#),
        ("stdio,id=n", r#"{"type": "stdio", "data": {}}"#),
        (
            "stdio,id=n,signal=off",
            r#"{"type": "stdio", "data": {"signal": false}}"#,
        ),
        (
            "hub,id=n,chardevs.0=a,chardevs.1=b",
            r#"{"type": "hub", "data": {"chardevs": ["a", "b"]}}"#,
        ),
        (
            "memory,id=n,size=4k,logappend=on",
            r#"{"type": "memory", "data": {"logappend": true, "size": 4096}}"#,
        ),
        (
            "pty,id=n,path=p",
            r#"{"type": "pty", "data": {"path": "p"}}"#,
        ),
        (
            "udp,id=n,port=5,localport=6,ipv4=on",
            r#"{"type": "udp", "data": {"remote": {"type": "inet", "data": {"host": "localhost", "port": "5", "ipv4": true}}, "local": {"type": "inet", "data": {"host": "", "port": "6"}}}}"#,
        ),
        (
            "socket,id=n,fd=7,reconnect-ms=9,telnet=on",
            r#"{"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": "7"}}, "server": false, "telnet": true, "reconnect-ms": 9}}"#,
        ),
        (
            "file,id=n,path=o,input-path=i,append=on",
            r#"{"type": "file", "data": {"in": "i", "out": "o", "append": true}}"#,
        ),
        (
            "socket,id=n,host=::1,port=5,to=9,ipv6=on,nodelay=on",
            r#"{"type": "socket", "data": {"addr": {"type": "inet", "data": {"host": "::1", "port": "5", "to": 9, "ipv6": true}}, "server": false, "nodelay": true}}"#,
        ),
        (
            "socket,id=n,path=p,abstract=on,tight=off,server=on,delay=on",
            r#"{"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": "p", "abstract": true, "tight": false}}, "server": true, "wait": true, "nodelay": false}}"#,
        ),
    ];
    let shared = r#"{"id": "n-base", "backend": {"type": "null", "data": {"logfile": "l"}}} {"id": "n", "backend": {"type": "mux", "data": {"chardev": "n-base"}}}"#;
    assert_eq!(chardev("null,id=n,logfile=l,mux=on").unwrap(), shared);
    for (text, backend) in cases {
        let expected = format!(r#"{{"id": "n", "backend": {backend}}}"#);
        assert_eq!(chardev(text).unwrap(), expected, "{text}");
    }
}

#[test]
fn bad_options_are_refused() {
    let cases = [
        ("", "chardev: no id specified"),
        ("stdio", "chardev: no id specified"),
        ("id=x", "chardev: \"x\" missing backend"),
        ("foo,id=x", "'foo' is not a valid char driver name"),
        ("null,,x,id=x", "'null,x' is not a valid char driver name"),
        ("stdio,id=1", "Parameter 'id' expects an identifier"),
        ("null,id=a,,b", "Parameter 'id' expects an identifier"),
        ("stdio,id=x,foo=1", "Invalid parameter 'foo'"),
        ("stdio,id=x,nofoo", "Invalid parameter 'foo'"),
        ("null,id=x,path=p", "Invalid parameter 'path'"),
        ("=,id=x", "Invalid parameter ''"),
        (
            "stdio,id=x,signal=x",
            "Parameter 'signal' expects 'on' or 'off'",
        ),
        (
            "stdio,id=x,signal=",
            "Parameter 'signal' expects 'on' or 'off'",
        ),
        ("file,id=x", "chardev: file: no filename given"),
        ("socket,id=x,host=b", "chardev: socket: no port given"),
        ("udp,id=x,host=b", "chardev: udp: remote port not specified"),
        ("mux,id=x", "chardev: mux: no chardev given"),
        ("pipe,id=x", "chardev: pipe: no device path given"),
        ("null,id=x,mux=x", "Parameter 'mux' expects 'on' or 'off'"),
        (
            "ringbuf,id=x,size=x",
            "Parameter 'size' expects a non-negative number below 2^64",
        ),
        (
            "socket,id=x,path=a,fd=3",
            "None or one of 'path', 'fd' or 'host' option required.",
        ),
        (
            "socket,id=x,host=b,port=1,to=x",
            "Parameter 'to' expects a number",
        ),
        (
            "socket,id=x,host=b,port=1,to=70000",
            "Parameter 'to' expects a number",
        ),
        (
            "socket,id=x,path=a,host=b",
            "None or one of 'path', 'fd' or 'host' option required.",
        ),
        (
            "socket,id=x,path=a,server=TRUE",
            "Parameter 'server' expects 'on' or 'off'",
        ),
        (
            "socket,id=x,path=a,wait=off",
            "'wait' option is incompatible with socket in client connect mode",
        ),
    ];
    for (text, message) in cases {
        assert_eq!(chardev(text).expect_err(text).message, message, "{text}");
    }
    let hint = chardev("null,id=1").unwrap_err().hint.unwrap();
    assert!(hint.starts_with("Identifiers consist of letters"));
}

#[test]
fn flags_are_taken_with_a_warning() {
    let warnings = |text| Opts::parse(text, "backend").unwrap().warnings;
    assert_eq!(warnings("socket,id=c,server=on,wait=off"), [""; 0]);
    assert_eq!(
        warnings("socket,server,nowait,nodelay,delay"),
        [
            "short-form boolean option 'server' deprecated\nPlease use server=on instead",
            "short-form boolean option 'nowait' deprecated\nPlease use wait=off instead",
            "short-form boolean option 'nodelay' deprecated\nPlease use nodelay=on instead",
            "short-form boolean option 'delay' deprecated\nPlease use nodelay=off instead",
        ]
    );
}

#[test]
fn help_is_recognised_anywhere() {
    for text in ["help", "?", "socket,help", "socket,id=x,?"] {
        assert!(Opts::parse(text, "backend").unwrap().help, "{text}");
    }
    assert!(!Opts::parse("null,id=x,path=help", "backend").unwrap().help);
}
