//! NBD URIs: `nbd://host[:port]/export`, `nbd+unix:///export?socket=path`, and `nbds` in place of `nbd` for TLS, as the URI
//! specification of the NBD project has them, and QEMU's older `nbd:host:port` and `nbd:unix:path` with `:exportname=`.

use stord_qmp::Error;
use stord_qmp::schema::block::BlockdevOptionsNbd;
use stord_qmp::schema::socket::{
    InetSocketAddress, SocketAddress, SocketAddressKind, UnixSocketAddress, VsockSocketAddress,
};

/// The port that a server has if none is named.
const DEFAULT_PORT: &str = "10809";

/// Whether a file name leads to an NBD server.
pub fn is_uri(name: &str) -> bool {
    let scheme = name.split_once(':').map_or("", |(scheme, _)| scheme);
    matches!(
        scheme,
        "nbd"
            | "nbds"
            | "nbd+tcp"
            | "nbds+tcp"
            | "nbd+unix"
            | "nbds+unix"
            | "nbd+vsock"
            | "nbds+vsock"
    )
}

/// What a URI says of TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Security {
    /// Who the client is.
    pub user: Option<String>,
    /// The directory of its certificates.
    pub certificates: Option<String>,
    /// The file of its pre-shared keys.
    pub psk_file: Option<String>,
    /// Whether the server must prove who it is.
    pub verify_peer: Option<bool>,
}

/// The options that a file name stands for.
///
/// # Errors
/// It is malformed, or asks for what cannot be said in a file name: TLS needs credentials, and a name that somebody has written into an
/// image must not choose files of this machine for that.
pub fn parse(name: &str) -> Result<BlockdevOptionsNbd, Error> {
    match parse_with_security(name)? {
        (options, None) => Ok(options),
        (_, Some(_)) => Err(Error::generic(format!("'{name}' asks for TLS")).with_hint(
            "give the server as options, with 'tls-creds' naming a TLS credentials object",
        )),
    }
}

/// The options that a URI stands for, and what it says of TLS if it asks for that. `tls-creds` is left to the caller.
///
/// # Errors
/// It is malformed.
pub fn parse_with_security(name: &str) -> Result<(BlockdevOptionsNbd, Option<Security>), Error> {
    let malformed = || Error::generic(format!("'{name}' is not a valid NBD URI"));
    let (scheme, rest) = name.split_once(':').ok_or_else(malformed)?;
    let Some(rest) = rest.strip_prefix("//") else {
        return match scheme {
            "nbd" => legacy(rest).map(|options| (options, None)),
            _ => None,
        }
        .ok_or_else(malformed);
    };
    let (secure, transport) = match scheme.split_once('+') {
        Some((front, transport)) => (front == "nbds", transport),
        None => (scheme == "nbds", "tcp"),
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(path).ok_or_else(malformed)?;
    let mut security = Security::default();
    let authority = match authority.split_once('@') {
        Some((user, authority)) if secure => {
            security.user = Some(decode(user).ok_or_else(malformed)?);
            authority
        }
        _ => authority,
    };
    let (mut socket, mut hostname) = (None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(malformed)?;
        let value = decode(value).ok_or_else(malformed)?;
        match (key, secure) {
            ("socket", _) => socket = Some(value),
            ("tls-certificates", true) => security.certificates = Some(value),
            ("tls-psk-file", true) => security.psk_file = Some(value),
            ("tls-hostname", true) => hostname = Some(value),
            ("tls-verify-peer", true) => {
                security.verify_peer = Some(truth(&value).ok_or_else(malformed)?);
            }
            _ => return Err(malformed()),
        }
    }
    let address = match (transport, socket) {
        ("unix", Some(path)) if authority.is_empty() => unix(path),
        ("tcp", None) => {
            let (host, port) = host_and_port(authority).ok_or_else(malformed)?;
            inet(host, port)
        }
        ("vsock", None) => {
            let (cid, port) = host_and_port(authority).ok_or_else(malformed)?;
            SocketAddressKind::Vsock(VsockSocketAddress { cid, port })
        }
        _ => return Err(malformed()),
    };
    let mut options = BlockdevOptionsNbd::new(SocketAddress { address });
    options.export = (!export.is_empty()).then_some(export);
    options.tls_hostname = hostname;
    Ok((options, secure.then_some(security)))
}

fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "true" | "t" | "yes" | "y" | "on" => Some(true),
        "0" | "false" | "f" | "no" | "n" | "off" => Some(false),
        _ => None,
    }
}

/// The part after `nbd:` in the older notation.
fn legacy(rest: &str) -> Option<BlockdevOptionsNbd> {
    let (server, export) = match rest.split_once(":exportname=") {
        Some((server, export)) => (server, Some(export.to_owned())),
        None => (rest, None),
    };
    let address = match server.strip_prefix("unix:") {
        Some("") => return None,
        Some(path) => unix(path.to_owned()),
        None if server.is_empty() => return None,
        None => {
            let (host, port) = host_and_port(server)?;
            inet(host, port)
        }
    };
    let mut options = BlockdevOptionsNbd::new(SocketAddress { address });
    options.export = export;
    Some(options)
}

fn unix(path: String) -> SocketAddressKind {
    SocketAddressKind::Unix(UnixSocketAddress {
        path,
        r#abstract: None,
        tight: None,
    })
}

fn inet(host: String, port: String) -> SocketAddressKind {
    SocketAddressKind::Inet(InetSocketAddress {
        host,
        port,
        numeric: None,
        to: None,
        ipv4: None,
        ipv6: None,
        keep_alive: None,
        mptcp: None,
    })
}

/// The host, without the brackets of an IPv6 address, and the port.
fn host_and_port(authority: &str) -> Option<(String, String)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            match rest.strip_prefix(':') {
                Some(port) => (host, port),
                None if rest.is_empty() => (host, DEFAULT_PORT),
                None => return None,
            }
        }
        None => authority
            .split_once(':')
            .unwrap_or((authority, DEFAULT_PORT)),
    };
    let host = if host.is_empty() { "localhost" } else { host };
    let is_number = port.bytes().all(|byte| byte.is_ascii_digit()) && !port.is_empty();
    is_number.then(|| (host.to_owned(), port.to_owned()))
}

/// Replaces `%XX` by the byte it stands for.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        if *byte == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(*byte);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

/// The URI of a server and an export, as `query-named-block-nodes` reports it.
pub fn of(address: &SocketAddressKind, export: &str) -> String {
    match address {
        SocketAddressKind::Unix(unix) => format!("nbd+unix:///{export}?socket={}", unix.path),
        SocketAddressKind::Inet(InetSocketAddress { host, port, .. }) => {
            let host = if host.contains(':') {
                format!("[{host}]")
            } else {
                host.clone()
            };
            format!("nbd://{host}:{port}/{export}")
        }
        SocketAddressKind::Vsock(VsockSocketAddress { cid, port }) => {
            format!("nbd+vsock://{cid}:{port}/{export}")
        }
        SocketAddressKind::Fd(fd) => format!("nbd:fd:{}:{export}", fd.r#str),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_is(name: &str, uri: &str, export: Option<&str>) {
        let options = parse(name).expect(name);
        assert_eq!(options.export.as_deref(), export, "{name}");
        let export = options.export.unwrap_or_default();
        assert_eq!(of(&options.server.address, &export), uri, "{name}");
    }

    #[test]
    fn notations_are_understood() {
        assert_is("nbd://example.org", "nbd://example.org:10809/", None);
        assert_is("nbd://h:1/a%20b", "nbd://h:1/a b", Some("a b"));
        assert_is("nbd+tcp://[::1]:5/x", "nbd://[::1]:5/x", Some("x"));
        assert_is(
            "nbd+unix:///e?socket=/tmp/s%3f",
            "nbd+unix:///e?socket=/tmp/s?",
            Some("e"),
        );
        assert_is("nbd+unix://?socket=s", "nbd+unix:///?socket=s", None);
        assert_is("nbd:h:7", "nbd://h:7/", None);
        assert_is(
            "nbd:unix:/a/b:exportname=c",
            "nbd+unix:///c?socket=/a/b",
            Some("c"),
        );
        assert_is("nbd+vsock://2:9/x", "nbd+vsock://2:9/x", Some("x"));
    }

    #[test]
    fn tls_is_for_those_who_may_choose_files() {
        let name = "nbds+unix://al%20ice@/e?socket=s&tls-psk-file=/k/keys.psk&tls-hostname=h&tls-verify-peer=no";
        let (options, security) = parse_with_security(name).expect(name);
        assert_eq!(options.tls_hostname.as_deref(), Some("h"));
        let wanted = Security {
            user: Some("al ice".to_owned()),
            certificates: None,
            psk_file: Some("/k/keys.psk".to_owned()),
            verify_peer: Some(false),
        };
        assert_eq!(security, Some(wanted));
        assert!(parse(name).is_err());
        assert!(parse_with_security("nbd://h/?tls-hostname=h").is_err());
        assert!(parse_with_security("nbds://h/?tls-verify-peer=maybe").is_err());
        let (_, security) = parse_with_security("nbd://h/").expect("good");
        assert_eq!(security, None);
    }

    #[test]
    fn nonsense_is_refused() {
        for name in [
            "nbd://h:port/",
            "nbd+unix:///e",
            "nbd+unix://h/e?socket=s",
            "nbd://h/?bad=1",
            "nbd:",
            "nbd:unix:",
            "nbd://h/%zz",
            "nbd://[::1",
            "nbds://h/",
            "nbd+carrier-pigeon://h/",
        ] {
            assert!(parse(name).is_err(), "{name}");
        }
        assert!(!is_uri("/nbd/x"));
        assert!(!is_uri("file:nbd"));
    }
}
