//! What is loaded, and what is refused with what words.

use std::sync::Arc;

use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage};
use stord_qmp::schema::object::QCryptoTLSCredsEndpoint as Endpoint;
use stord_qmp::schema::object::{
    TlsCredsAnonProperties, TlsCredsPskProperties, TlsCredsX509Properties,
};

use super::made::{Identity, Made, Wanted, key_usage, of_authority};
use crate::secret::{Encoding, Source};
use crate::tls::TlsCredentials;
use crate::{Credential, Credentials, Secret};

/// Loads certificates, and gives the message if they are refused.
fn load(
    made: &Made,
    endpoint: Endpoint,
    change: impl FnOnce(&mut TlsCredsX509Properties),
) -> Result<(), String> {
    let credentials = Credentials::default();
    let secret = Secret::load(&Source::Data("word"), Encoding::default(), &credentials);
    let secret = Arc::new(secret.expect("it is plain"));
    credentials.insert("password", Credential::Secret(Some(secret)));
    let mut properties = TlsCredsX509Properties {
        common: made.properties(endpoint),
        ..TlsCredsX509Properties::default()
    };
    change(&mut properties);
    match TlsCredentials::x509(&properties, &credentials) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.message),
    }
}

/// Loads as they are, then without looking them over.
fn load_both(made: &Made, endpoint: Endpoint) -> (Result<(), String>, Result<(), String>) {
    let checked = load(made, endpoint, |_| {});
    let unchecked = load(made, endpoint, |properties| {
        properties.sanity_check = Some(false);
    });
    (checked, unchecked)
}

#[test]
fn complete_directory_is_loaded_for_both_sides() {
    let (made, _) = Made::complete();
    assert_eq!(load(&made, Endpoint::Server, |_| {}), Ok(()));
    assert_eq!(load(&made, Endpoint::Client, |_| {}), Ok(()));
    made.remove("client-key.pem");
    assert_eq!(load(&made, Endpoint::Client, |_| {}), Ok(()));
}

#[test]
fn missing_files_are_named() {
    let (made, _) = Made::complete();
    for name in ["server-key.pem", "server-cert.pem", "ca-cert.pem"] {
        made.remove(name);
        let path = made.text(name);
        assert_eq!(
            load(&made, Endpoint::Server, |_| {}),
            Err(format!(
                "Unable to access credentials {path}: No such file or directory"
            ))
        );
    }
    let nowhere = load(&made, Endpoint::Client, |properties| {
        properties.common.dir = None;
    });
    assert_eq!(nowhere, Err("Missing 'dir' property value".to_owned()));
}

#[test]
fn certificates_for_another_use_or_time_are_refused() {
    let purpose = |change: fn(&mut ExtendedKeyUsage)| {
        let mut purpose = ExtendedKeyUsage::new();
        purpose.critical();
        change(&mut purpose);
        Some(purpose)
    };
    let (made, authority) = Made::complete();
    let path = made.text("server-cert.pem");
    for (wanted, message) in [
        (
            Wanted {
                days: (-2, -1),
                ..Wanted::default()
            },
            format!("The server certificate {path} has expired"),
        ),
        (
            Wanted {
                days: (1, 2),
                ..Wanted::default()
            },
            format!("The server certificate {path} is not yet active"),
        ),
        (
            Wanted {
                constraints: Some(of_authority()),
                ..Wanted::default()
            },
            format!(
                "The certificate {path} basic constraints show a CA, but we need one for a server"
            ),
        ),
        (
            Wanted {
                usage: Some(key_usage(|usage| {
                    usage.key_encipherment();
                })),
                ..Wanted::default()
            },
            format!("Certificate {path} usage does not permit digital signature"),
        ),
        (
            Wanted {
                usage: Some(key_usage(|usage| {
                    usage.digital_signature();
                })),
                ..Wanted::default()
            },
            format!("Certificate {path} usage does not permit key encipherment"),
        ),
        (
            Wanted {
                purpose: purpose(|purpose| {
                    purpose.client_auth();
                }),
                ..Wanted::default()
            },
            format!("Certificate {path} purpose does not allow use with a TLS server"),
        ),
    ] {
        made.put_identity("server", &Identity::issued(Some(&authority), wanted));
        let (checked, unchecked) = load_both(&made, Endpoint::Server);
        assert_eq!(checked, Err(message));
        assert_eq!(unchecked, Ok(()));
    }
    let any = Wanted {
        usage: None,
        constraints: None,
        purpose: purpose(|purpose| {
            purpose.other("2.5.29.37.0");
        }),
        ..Wanted::default()
    };
    made.put_identity("server", &Identity::issued(Some(&authority), any));
    assert_eq!(load(&made, Endpoint::Server, |_| {}), Ok(()));
}

#[test]
fn authorities_that_are_none_are_refused() {
    let made = Made::new();
    let path = made.text("ca-cert.pem");
    let own = made.text("server-cert.pem");
    let signs = || {
        Some(key_usage(|usage| {
            usage.key_cert_sign();
        }))
    };
    for (constraints, usage, days, message) in [
        (
            None,
            signs(),
            (-1, 1),
            format!("The certificate {path} is missing basic constraints for a CA"),
        ),
        (
            Some(BasicConstraints::new()),
            signs(),
            (-1, 1),
            format!("The certificate {path} basic constraints do not show a CA"),
        ),
        (
            Some(of_authority()),
            Some(key_usage(|usage| {
                usage.digital_signature();
            })),
            (-1, 1),
            format!("Certificate {path} usage does not permit certificate signing"),
        ),
        (
            Some(of_authority()),
            signs(),
            (-2, -1),
            format!("The CA certificate {path} has expired"),
        ),
    ] {
        let authority = Identity::issued(
            None,
            Wanted {
                constraints,
                usage,
                days,
                ..Wanted::default()
            },
        );
        made.put("ca-cert.pem", &authority.pem());
        made.put_identity(
            "server",
            &Identity::issued(Some(&authority), Wanted::default()),
        );
        assert_eq!(load_both(&made, Endpoint::Server), (Err(message), Ok(())));
    }
    made.put("ca-cert.pem", &Identity::authority().pem());
    assert_eq!(
        load(&made, Endpoint::Server, |_| {}),
        Err(format!(
            "Our own certificate {own} failed validation against {path}: \
             The certificate hasn't got a known issuer"
        ))
    );
    made.put("ca-cert.pem", b"hallo\n");
    assert_eq!(
        load_both(&made, Endpoint::Server),
        (
            Err(format!("Unable to import CA certificate list {path}")),
            Ok(())
        )
    );
}

#[test]
fn chain_up_to_the_authority_may_be_in_either_file() {
    let (made, root) = Made::complete();
    let between = Identity::issued(
        Some(&root),
        Wanted {
            name: &[("CN", "between")],
            usage: Some(key_usage(|usage| {
                usage.key_cert_sign();
            })),
            constraints: Some(of_authority()),
            ..Wanted::default()
        },
    );
    let own = Identity::issued(Some(&between), Wanted::default());
    made.put_identity("server", &own);
    assert!(load(&made, Endpoint::Server, |_| {}).is_err());
    made.put("server-cert.pem", &[own.pem(), between.pem()].concat());
    assert_eq!(load(&made, Endpoint::Server, |_| {}), Ok(()));
    made.put("server-cert.pem", &own.pem());
    made.put("ca-cert.pem", &between.pem());
    assert_eq!(load(&made, Endpoint::Server, |_| {}), Ok(()));
}

#[test]
fn broken_files_are_refused() {
    let (made, authority) = Made::complete();
    let [certificate, key] = ["server-cert.pem", "server-key.pem"].map(|name| made.text(name));
    let pair = |reason: &str| {
        Err(format!(
            "Cannot load certificate '{certificate}' & key '{key}': {reason}"
        ))
    };
    let import = |reason: &str| {
        Err(format!(
            "Unable to import server certificate {certificate}: {reason}"
        ))
    };
    made.put("server-cert.pem", b"hallo\n");
    assert_eq!(
        load_both(&made, Endpoint::Server),
        (
            import("Base64 unexpected header error."),
            pair("Base64 decoding error.")
        )
    );
    made.put(
        "server-cert.pem",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    );
    let reason = "ASN1 parser: Error in TAG.";
    assert_eq!(
        load_both(&made, Endpoint::Server),
        (import(reason), pair(reason))
    );

    let own = Identity::issued(Some(&authority), Wanted::default());
    made.put_identity("server", &own);
    made.put("server-key.pem", b"hallo\n");
    let result = load(&made, Endpoint::Server, |_| {});
    assert_eq!(result, pair("The requested data were not available."));
    made.put_identity("server", &own);
    made.put(
        "server-cert.pem",
        &Identity::issued(Some(&authority), Wanted::default()).pem(),
    );
    let result = load(&made, Endpoint::Server, |_| {});
    assert_eq!(
        result,
        pair("The certificate and the given key do not match.")
    );

    made.put_identity("server", &own);
    for (name, message) in [
        (
            "ca-crl.pem",
            "Cannot load CRL 'PATH': Base64 decoding error.",
        ),
        (
            "dh-params.pem",
            "Unable to load DH parameters from PATH: Base64 unexpected header error.",
        ),
    ] {
        made.put(name, b"hallo\n");
        let message = message.replace("PATH", &made.text(name));
        assert_eq!(load(&made, Endpoint::Server, |_| {}), Err(message));
        assert_eq!(load(&made, Endpoint::Client, |_| {}), Ok(()));
        made.remove(name);
    }
}

#[test]
fn encrypted_key_needs_the_right_password() {
    let (made, authority) = Made::complete();
    let own = Identity::issued(Some(&authority), Wanted::default());
    made.put_identity("server", &own);
    let with = |id: &'static str| {
        load(&made, Endpoint::Server, |properties| {
            properties.passwordid = Some(id.to_owned());
        })
    };
    assert_eq!(with("nope"), Err("No secret with id 'nope'".to_owned()));
    assert_eq!(with("password"), Ok(()), "an open key needs none");
    made.encrypt_key("server", &own.key, "word");
    assert_eq!(with("password"), Ok(()));
    let [certificate, key] = ["server-cert.pem", "server-key.pem"].map(|name| made.text(name));
    let failed = Err(format!(
        "Cannot load certificate '{certificate}' & key '{key}': Decryption has failed."
    ));
    assert_eq!(load(&made, Endpoint::Server, |_| {}), failed);
    made.encrypt_key("server", &own.key, "another");
    assert_eq!(with("password"), failed);
}

#[test]
fn pre_shared_keys_are_looked_for() {
    let made = Made::new();
    let load = |endpoint, username: Option<&str>| {
        let properties = TlsCredsPskProperties {
            common: made.properties(endpoint),
            username: username.map(str::to_owned),
        };
        TlsCredentials::psk(&properties)
            .map(drop)
            .map_err(|error| error.message)
    };
    let path = made.text("keys.psk");
    assert_eq!(
        load(Endpoint::Server, None),
        Err(format!(
            "Unable to access credentials {path}: No such file or directory"
        ))
    );
    made.put("keys.psk", b"fred:0011\nbob:zz\n");
    assert_eq!(load(Endpoint::Server, None), Ok(()));
    assert_eq!(load(Endpoint::Client, Some("fred")), Ok(()));
    for (user, message) in [
        (None, format!("Username qemu not found in PSK file {path}")),
        (Some(""), format!("Username  not found in PSK file {path}")),
        (
            Some("bob"),
            "Cannot set PSK client credentials: Error in parsing.".to_owned(),
        ),
    ] {
        assert_eq!(load(Endpoint::Client, user), Err(message));
    }
    assert_eq!(
        load(Endpoint::Server, Some("fred")),
        Err("username should not be set when endpoint=server".to_owned())
    );
}

#[test]
fn priorities_are_looked_at_when_loading() {
    let mut properties = TlsCredsAnonProperties::default();
    assert!(TlsCredentials::anonymous(&properties).is_ok());
    properties.common.priority = Some("NOPE".to_owned());
    let error = TlsCredentials::anonymous(&properties)
        .err()
        .expect("refused");
    assert_eq!(
        error.message,
        "Unable to set TLS session priority NOPE: 'NOPE' is unknown or not supported"
    );
}
