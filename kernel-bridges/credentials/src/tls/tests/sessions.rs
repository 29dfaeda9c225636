//! Sessions that talk to each other in memory.

use std::io;
use std::sync::Arc;

use openssl::x509::extension::ExtendedKeyUsage;
use stord_qmp::Error;
use stord_qmp::schema::object::QCryptoTLSCredsEndpoint as Endpoint;
use stord_qmp::schema::object::{
    TlsCredsAnonProperties, TlsCredsProperties, TlsCredsPskProperties, TlsCredsX509Properties,
};

use super::made::{Identity, Made, Wanted};
use crate::authorization::Simple;
use crate::tls::{Handshake, Plaintext, TlsCredentials, TlsSession};
use crate::{Credential, Credentials};

fn x509(
    made: &Made,
    endpoint: Endpoint,
    change: impl FnOnce(&mut TlsCredsProperties),
) -> TlsCredentials {
    let mut properties = TlsCredsX509Properties {
        common: made.properties(endpoint),
        sanity_check: Some(false),
        passwordid: None,
    };
    change(&mut properties.common);
    TlsCredentials::x509(&properties, &Credentials::default()).expect("they are good")
}

/// Two ends of a connection.
struct Pair {
    client: TlsSession,
    server: TlsSession,
}

impl Pair {
    fn new(client: &TlsCredentials, server: &TlsCredentials, hostname: Option<&str>) -> Self {
        Self {
            client: client.client_session(hostname).expect("a session"),
            server: server.server_session().expect("a session"),
        }
    }

    /// Carries over what each has to say, in pieces of that many bytes.
    fn carry(&mut self, piece: usize) -> bool {
        let Self { client, server } = self;
        let mut has_moved = false;
        for swap in [false, true] {
            let (from, to) = match swap {
                false => (&mut *client, &mut *server),
                true => (&mut *server, &mut *client),
            };
            let count = from.output().len().min(piece);
            to.feed(&from.output()[..count]);
            from.consume_output(count);
            has_moved |= count > 0;
        }
        has_moved
    }

    /// Shakes hands: the errors of client and server.
    fn shake(&mut self, piece: usize) -> (Option<Error>, Option<Error>) {
        let (mut client, mut server) = (None, None);
        loop {
            if client.is_none() {
                client = self.client.handshake().err();
            }
            if server.is_none() {
                server = self.server.handshake().err();
            }
            if !self.carry(piece) {
                return (client, server);
            }
        }
    }

    fn shaken(client: &TlsCredentials, server: &TlsCredentials) -> Self {
        let mut pair = Self::new(client, server, Some("localhost"));
        let (client, server) = pair.shake(usize::MAX);
        assert!(
            client.is_none() && server.is_none(),
            "{client:?} {server:?}"
        );
        assert!(pair.client.is_established() && pair.server.is_established());
        pair
    }
}

fn refused(client: &TlsCredentials, server: &TlsCredentials) -> (Option<String>, Option<String>) {
    refused_for(client, server, "localhost")
}

fn refused_for(
    client: &TlsCredentials,
    server: &TlsCredentials,
    hostname: &str,
) -> (Option<String>, Option<String>) {
    let mut pair = Pair::new(client, server, Some(hostname));
    let (client, server) = pair.shake(usize::MAX);
    // A client of TLS 1.3 learns only from the first read that it was refused.
    let late = client
        .is_none()
        .then(|| read_all(&mut pair.client).err())
        .flatten();
    let client = client
        .map(|error| error.message)
        .or(late.map(|error| error.to_string()));
    (client, server.map(|error| error.message))
}

fn read_all(session: &mut TlsSession) -> io::Result<(Vec<u8>, bool)> {
    let mut all = Vec::new();
    let mut piece = [0; 1000];
    loop {
        match session.read(&mut piece)? {
            Plaintext::Bytes(count) => all.extend_from_slice(&piece[..count]),
            Plaintext::NeedsInput => return Ok((all, false)),
            Plaintext::Closed => return Ok((all, true)),
        }
    }
}

#[test]
fn data_arrives_however_the_ciphertext_is_cut() {
    let (made, _) = Made::complete();
    let server = x509(&made, Endpoint::Server, |_| {});
    let client = x509(&made, Endpoint::Client, |_| {});
    for piece in [1, 7, 100_000] {
        let mut pair = Pair::new(&client, &server, Some("localhost"));
        let (failure, other) = pair.shake(piece);
        assert!(failure.is_none() && other.is_none());
        assert_eq!(pair.client.handshake().ok(), Some(Handshake::Complete));
        assert!(pair.client.description().starts_with("TLSv1.3 TLS_"));
        let sent: Vec<u8> = (0..50_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        pair.client.write(&sent).expect("it is established");
        pair.server.write(b"hallo").expect("it is established");
        pair.client.close();
        let mut received = Vec::new();
        let mut is_closed = false;
        while pair.carry(piece) {
            let (bytes, closed) = read_all(&mut pair.server).expect("nothing is lost");
            received.extend(bytes);
            is_closed = closed;
        }
        assert!(received == sent && is_closed);
        // The other direction stays open.
        assert_eq!(
            read_all(&mut pair.client).expect("open"),
            (b"hallo".to_vec(), false)
        );
        assert!(pair.client.write(b"x").is_err());
    }
}

#[test]
fn every_kind_and_version_connects() {
    let (made, _) = Made::complete();
    made.put("keys.psk", b"qemu:00112233445566778899aabbccddeeff\n");
    for (priority, version) in [
        ("NORMAL", "TLSv1.3"),
        ("NORMAL:-VERS-TLS1.3", "TLSv1.2"),
        ("SECURE128", "TLSv1.3"),
        ("PFS:%SERVER_PRECEDENCE", "TLSv1.3"),
    ] {
        let common = |endpoint| TlsCredsProperties {
            priority: Some(priority.to_owned()),
            ..made.properties(endpoint)
        };
        let psk = |endpoint| {
            let common = common(endpoint);
            let properties = TlsCredsPskProperties {
                common,
                username: None,
            };
            TlsCredentials::psk(&properties).expect("they are good")
        };
        let anonymous = |endpoint| {
            let common = common(endpoint);
            let properties = TlsCredsAnonProperties { common };
            TlsCredentials::anonymous(&properties).expect("they are good")
        };
        let certificates = |endpoint| {
            x509(&made, endpoint, |common| {
                common.priority = Some(priority.to_owned());
            })
        };
        let pair = Pair::shaken(
            &certificates(Endpoint::Client),
            &certificates(Endpoint::Server),
        );
        assert!(pair.server.description().starts_with(version));
        let pair = Pair::shaken(&psk(Endpoint::Client), &psk(Endpoint::Server));
        assert!(
            pair.server.description().starts_with(version),
            "{}",
            pair.server.description()
        );
        assert_eq!(pair.server.peer_name(), None);
        let pair = Pair::shaken(&anonymous(Endpoint::Client), &anonymous(Endpoint::Server));
        assert!(pair.server.description().starts_with("TLSv1.2"));
    }
}

#[test]
fn peers_of_other_authorities_are_refused() {
    let (made, _) = Made::complete();
    let (other, _) = Made::complete();
    let unknown = Some("The certificate hasn't got a known issuer".to_owned());
    let server = x509(&made, Endpoint::Server, |_| {});
    let (client, _) = refused(&x509(&other, Endpoint::Client, |_| {}), &server);
    assert_eq!(client, unknown);
    let trusting = x509(&other, Endpoint::Client, |common| {
        common.verify_peer = Some(false);
    });
    let (client, reason) = refused(&trusting, &server);
    assert_eq!(reason, unknown);
    assert!(client.is_some(), "the alert arrives");
    let lenient = x509(&made, Endpoint::Server, |common| {
        common.verify_peer = Some(false);
    });
    assert_eq!(refused(&trusting, &lenient), (None, None));
    made.remove("client-cert.pem");
    let nameless = x509(&made, Endpoint::Client, |_| {});
    let (_, reason) = refused(&nameless, &server);
    assert!(reason.is_some_and(|reason| reason.starts_with("TLS handshake failed: ")));
    assert_eq!(refused(&nameless, &lenient), (None, None));
}

#[test]
fn servers_must_be_who_they_are_taken_for() {
    let (made, authority) = Made::complete();
    let server = x509(&made, Endpoint::Server, |_| {});
    let client = x509(&made, Endpoint::Client, |_| {});
    assert_eq!(refused_for(&client, &server, "127.0.0.1"), (None, None));
    for wrong in ["127.0.0.2", "example.org"] {
        let (reason, _) = refused_for(&client, &server, wrong);
        let expected = format!("Certificate does not match the hostname {wrong}");
        assert_eq!(reason, Some(expected));
    }
    let error = client.client_session(None).err().expect("refused");
    assert_eq!(error.message, "No hostname for certificate validation");
    assert!(
        x509(&made, Endpoint::Client, |common| common.verify_peer =
            Some(false))
        .client_session(None)
        .is_ok()
    );

    let mut purpose = ExtendedKeyUsage::new();
    purpose.client_auth();
    for (wanted, expected) in [
        (
            Wanted {
                days: (-2, -1),
                ..Wanted::default()
            },
            "The certificate has expired",
        ),
        (
            Wanted {
                days: (1, 2),
                ..Wanted::default()
            },
            "The certificate is not yet active",
        ),
        (
            Wanted {
                purpose: Some(purpose),
                ..Wanted::default()
            },
            "The certificate is not trusted (",
        ),
    ] {
        made.put_identity("server", &Identity::issued(Some(&authority), wanted));
        let server = x509(&made, Endpoint::Server, |_| {});
        let (reason, _) = refused(&client, &server);
        assert!(
            reason.as_ref().is_some_and(|it| it.starts_with(expected)),
            "{reason:?}"
        );
    }
}

#[test]
fn pre_shared_keys_must_be_the_same() {
    let ours = Made::new();
    ours.put("keys.psk", b"qemu:00112233\nfred:44\n");
    let theirs = Made::new();
    theirs.put("keys.psk", b"qemu:00112234\nmary:00112233\n");
    let psk = |made: &Made, endpoint, username: Option<&str>| {
        let properties = TlsCredsPskProperties {
            common: made.properties(endpoint),
            username: username.map(str::to_owned),
        };
        TlsCredentials::psk(&properties).expect("they are good")
    };
    let server = psk(&ours, Endpoint::Server, None);
    drop(Pair::shaken(
        &psk(&ours, Endpoint::Client, Some("fred")),
        &server,
    ));
    for stranger in [None, Some("mary")] {
        let (client, reason) = refused(&psk(&theirs, Endpoint::Client, stranger), &server);
        assert!(client.is_some() || reason.is_some());
        assert!(reason.is_some(), "{client:?}");
    }
    // A server that knows no key cannot come through with a certificate.
    let (made, _) = Made::complete();
    let impostor = x509(&made, Endpoint::Server, |common| {
        common.verify_peer = Some(false);
    });
    let (client, _) = refused(&psk(&ours, Endpoint::Client, None), &impostor);
    assert!(client.is_some());
}

#[test]
fn rules_are_asked_with_the_name_of_the_certificate() {
    let (made, _) = Made::complete();
    let server = x509(&made, Endpoint::Server, |_| {});
    let client = x509(&made, Endpoint::Client, |_| {});
    let credentials = Credentials::default();
    let rule = Arc::new(Simple::new("C=GB,O=Example,CN=localhost".to_owned()));
    let other = Arc::new(Simple::new("CN=localhost,O=Example,C=GB".to_owned()));
    credentials.insert("good", Credential::Authorization(rule));
    credentials.insert("other", Credential::Authorization(other));
    let pair = Pair::shaken(&client, &server);
    let name = "C=GB,O=Example,CN=localhost";
    assert_eq!(pair.server.peer_name().as_deref(), Some(name));
    let ask = |rule| {
        let answer = pair.server.authorize(rule, &credentials);
        answer.map_err(|error| error.message)
    };
    assert_eq!(ask("good"), Ok(()));
    assert_eq!(
        ask("other"),
        Err(format!("TLS x509 authz check for {name} is denied"))
    );
    assert_eq!(ask("nope"), Err("Cannot find object ID nope".to_owned()));

    let early = server.server_session().expect("a session");
    assert!(early.authorize("good", &credentials).is_err());
    server.set_verify_peer(false);
    let pair = Pair::shaken(&client, &server);
    assert_eq!(pair.server.peer_name(), None);
    assert!(pair.server.authorize("nope", &credentials).is_ok());
}

#[test]
fn connection_that_is_cut_or_garbled_is_an_error() {
    let (made, _) = Made::complete();
    let server = x509(&made, Endpoint::Server, |_| {});
    let client = x509(&made, Endpoint::Client, |_| {});
    let mut pair = Pair::shaken(&client, &server);
    pair.server.end_of_input();
    assert!(read_all(&mut pair.server).is_err());

    let mut pair = Pair::shaken(&client, &server);
    pair.client.write(b"hallo").expect("it is established");
    let mut garbled = pair.client.output().to_vec();
    if let Some(last) = garbled.last_mut() {
        *last ^= 1;
    }
    pair.server.feed(&garbled);
    assert!(read_all(&mut pair.server).is_err());
    assert!(read_all(&mut pair.server).is_err(), "it stays so");

    let mut session = server.server_session().expect("a session");
    session.feed(b"{\"execute\": \"qmp_capabilities\"}\n");
    assert!(session.handshake().is_err());
    let mut session = server.server_session().expect("a session");
    session.end_of_input();
    assert!(session.handshake().is_err());
}

#[test]
fn settings_may_change_between_connections() {
    let (made, _) = Made::complete();
    let server = x509(&made, Endpoint::Server, |_| {});
    let client = x509(&made, Endpoint::Client, |_| {});
    server
        .set_priority("NORMAL:-VERS-TLS1.3")
        .expect("it is understood");
    assert!(server.set_priority("X").is_err());
    assert!(
        Pair::shaken(&client, &server)
            .client
            .description()
            .starts_with("TLSv1.2")
    );
    server.set_endpoint(Endpoint::Client);
    let error = server.server_session().err().expect("refused");
    assert_eq!(
        error.message,
        "Expected TLS credentials for a server endpoint"
    );
    let credentials = Credentials::default();
    credentials.insert("tls", Credential::Tls(Arc::new(server)));
    credentials.insert("thread", Credential::Other);
    let find = |id, endpoint| {
        credentials
            .tls(id, endpoint)
            .map(drop)
            .map_err(|e| e.message)
    };
    assert_eq!(find("tls", Endpoint::Client), Ok(()));
    for (id, message) in [
        ("tls", "Expected TLS credentials for a server endpoint"),
        ("nope", "No TLS credentials with id 'nope'"),
        ("thread", "Object with id 'thread' is not TLS credentials"),
    ] {
        assert_eq!(find(id, Endpoint::Server), Err(message.to_owned()));
    }
}
