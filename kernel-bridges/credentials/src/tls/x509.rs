//! Certificates, their keys, and authorities, from the files of a directory. What is loaded has been
//! looked over, unless that was not wanted: a certificate that no peer would accept is found here
//! and not by the first client.

use std::fs;
use std::io;
use std::path::Path;

use openssl::asn1::Asn1Time;
use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{SslContextBuilder, SslFiletype, SslVerifyMode};
use openssl::stack::Stack;
use openssl::x509::store::{X509Lookup, X509Store, X509StoreBuilder};
use openssl::x509::verify::X509VerifyFlags;
use openssl::x509::{X509, X509PurposeId, X509Ref, X509StoreContext, X509VerifyResult};
use stord_qmp::Error;
use stord_qmp::schema::object::QCryptoTLSCredsEndpoint as Endpoint;
use stord_qmp::schema::object::TlsCredsX509Properties;
use zeroize::Zeroizing;

use super::certificate::Facts;
use super::session::verification_failure;
use super::{Directory, openssl_reason};
use crate::Credentials;

/// `X509_V_ERR_UNABLE_TO_GET_CRL`: authorities need not say what they have revoked.
const NO_REVOCATION_LIST: i32 = 3;

/// Certificates, their keys, and authorities.
pub struct Material {
    authorities: Vec<X509>,
    /// The certificate, those of the authorities between it and the root, and its key.
    own: Option<(Vec<X509>, PKey<Private>)>,
    /// The file of certificates that are revoked.
    revoked: Option<String>,
}

/// The files, of which some may be missing.
struct Files {
    authorities: String,
    revoked: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

impl Material {
    /// Loads what the properties say, and looks it over unless they say not to. Blocks.
    ///
    /// # Errors
    /// A file is missing, cannot be read, or holds something that is no good.
    pub fn load(
        properties: &TlsCredsX509Properties,
        credentials: &Credentials,
    ) -> Result<Self, Error> {
        let endpoint = properties.common.endpoint.unwrap_or(Endpoint::Client);
        let files = Files::find(&Directory::of(&properties.common), endpoint)?;
        if properties.sanity_check.unwrap_or(true) {
            check(&files, endpoint)?;
        }
        // An unreadable list counts as an empty one here, as in the reference: the check would have
        // said so.
        let authorities = fs::read(&files.authorities).map_err(|error| {
            let path = &files.authorities;
            let reason = Error::reason(&error);
            Error::generic(format!("Cannot load CA certificate '{path}': {reason}"))
        })?;
        let authorities = X509::stack_from_pem(&authorities).unwrap_or_default();
        let password = match &properties.passwordid {
            Some(id) => Some(Zeroizing::new(credentials.secret_text(id)?)),
            None => None,
        };
        let own = match (&files.certificate, &files.key) {
            (Some(certificate), Some(key)) => {
                let password = password.as_ref().map(|text| text.as_bytes());
                let pair = load_pair(certificate, key, password).map_err(|reason| {
                    Error::generic(format!(
                        "Cannot load certificate '{certificate}' & key '{key}': {reason}"
                    ))
                })?;
                Some(pair)
            }
            _ => None,
        };
        let material = Self {
            authorities,
            own,
            revoked: files.revoked,
        };
        material.store()?;
        Ok(material)
    }

    /// Tells OpenSSL. With `verify_peer` the peer must have a certificate of one of the authorities.
    ///
    /// # Errors
    /// Memory or OpenSSL's policy do not allow it.
    pub fn apply(&self, context: &mut SslContextBuilder, verify_peer: bool) -> Result<(), Error> {
        context.set_cert_store(self.store()?);
        let told = self.tell(context).map_err(|error| {
            let reason = openssl_reason(&error);
            Error::generic(format!("Cannot set TLS certificate: {reason}")).with_source(error)
        });
        told?;
        let mode = match verify_peer {
            true => SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT,
            false => SslVerifyMode::NONE,
        };
        context.set_verify_callback(mode, |is_good, chain| {
            is_good
                || is_forgiven(chain.error()) && {
                    chain.set_error(X509VerifyResult::OK);
                    true
                }
        });
        Ok(())
    }

    fn tell(&self, context: &mut SslContextBuilder) -> Result<(), ErrorStack> {
        for authority in &self.authorities {
            context.add_client_ca(authority)?;
        }
        if let Some((chain, key)) = &self.own {
            let mut chain = chain.iter();
            if let Some(certificate) = chain.next() {
                context.set_certificate(certificate)?;
            }
            context.set_private_key(key)?;
            for authority in chain {
                context.add_extra_chain_cert(authority.clone())?;
            }
        }
        Ok(())
    }

    /// The authorities, and what they have revoked.
    fn store(&self) -> Result<X509Store, Error> {
        let mut store = trusting(&self.authorities).map_err(|error| internal(&error))?;
        if let Some(path) = &self.revoked {
            let lookup = store.add_lookup(X509Lookup::file());
            let loaded = lookup.and_then(|lookup| lookup.load_crl_file(path, SslFiletype::PEM));
            loaded.map_err(|_| {
                Error::generic(format!("Cannot load CRL '{path}': Base64 decoding error."))
            })?;
            let flags = X509VerifyFlags::CRL_CHECK | X509VerifyFlags::CRL_CHECK_ALL;
            store.set_flags(flags).map_err(|error| internal(&error))?;
        }
        Ok(store.build())
    }
}

fn is_forgiven(error: X509VerifyResult) -> bool {
    error.as_raw() == NO_REVOCATION_LIST
}

fn internal(error: &ErrorStack) -> Error {
    let reason = openssl_reason(error);
    Error::generic(format!("Cannot load TLS credentials: {reason}"))
}

/// A store in which every one of the authorities is the last word, roots or not.
fn trusting(authorities: &[X509]) -> Result<X509StoreBuilder, ErrorStack> {
    let mut store = X509StoreBuilder::new()?;
    store.set_flags(X509VerifyFlags::PARTIAL_CHAIN)?;
    for authority in authorities {
        store.add_cert(authority.clone())?;
    }
    Ok(store)
}

impl Files {
    fn find(directory: &Directory<'_>, endpoint: Endpoint) -> Result<Self, Error> {
        let required = |name| directory.required(name);
        let optional = |name| directory.optional(name);
        let authorities = required("ca-cert.pem")?;
        Ok(match endpoint {
            Endpoint::Server => {
                let revoked = optional("ca-crl.pem")?;
                Self {
                    authorities,
                    revoked,
                    certificate: Some(required("server-cert.pem")?),
                    key: Some(required("server-key.pem")?),
                }
            }
            Endpoint::Client => Self {
                authorities,
                revoked: None,
                certificate: optional("client-cert.pem")?,
                key: optional("client-key.pem")?,
            },
        })
    }
}

/// Reads a certificate and its key.
///
/// # Errors
/// The reason in the words of GnuTLS.
fn load_pair(
    certificate: &str,
    key: &str,
    password: Option<&[u8]>,
) -> Result<(Vec<X509>, PKey<Private>), String> {
    let read = |path: &str| fs::read(path).map_err(|error: io::Error| Error::reason(&error));
    let encoded = Zeroizing::new(read(key)?);
    let chain = parse_certificates(&read(certificate)?, "Base64 decoding error.")?;
    let has_key = encoded.windows(11).any(|text| text == b"PRIVATE KEY");
    let key = match password {
        _ if !has_key => return Err("The requested data were not available.".to_owned()),
        Some(password) => PKey::private_key_from_pem_passphrase(&encoded, password),
        // Without a callback OpenSSL would ask on the terminal.
        None => PKey::private_key_from_pem_callback(&encoded, |_| Ok(0)),
    };
    let key = key.map_err(|error| {
        let is_encrypted = encoded.windows(9).any(|text| text == b"ENCRYPTED");
        match is_encrypted {
            true => "Decryption has failed.".to_owned(),
            false => openssl_reason(&error),
        }
    })?;
    let public = chain.first().map(|certificate| certificate.public_key());
    if !public.is_some_and(|public| public.is_ok_and(|public| public.public_eq(&key))) {
        return Err("The certificate and the given key do not match.".to_owned());
    }
    Ok((chain, key))
}

/// The certificates of a file, one at least.
///
/// # Errors
/// The reason in the words of GnuTLS, for which `no_header` is one of several.
fn parse_certificates(encoded: &[u8], no_header: &str) -> Result<Vec<X509>, String> {
    match X509::stack_from_pem(encoded) {
        Ok(certificates) if certificates.is_empty() => Err(no_header.to_owned()),
        Ok(certificates) => Ok(certificates),
        Err(error) => {
            let is_content = |error: &openssl::error::Error| {
                error
                    .library()
                    .is_some_and(|library| library.starts_with("asn1"))
            };
            match error.errors().iter().any(is_content) {
                true => Err("ASN1 parser: Error in TAG.".to_owned()),
                false => Err(no_header.to_owned()),
            }
        }
    }
}

/// Looks over a directory's certificates.
fn check(files: &Files, endpoint: Endpoint) -> Result<(), Error> {
    let certificate = match &files.certificate {
        None => None,
        Some(path) => Some((path, import(path, endpoint)?)),
    };
    let authorities = fs::read(&files.authorities).ok();
    let authorities = authorities.and_then(|text| parse_certificates(&text, "").ok());
    let authorities = authorities.ok_or_else(|| {
        let path = &files.authorities;
        Error::generic(format!("Unable to import CA certificate list {path}"))
    })?;
    if let Some((path, chain)) = &certificate
        && let Some(own) = chain.first()
    {
        check_use(own, path, Use::Endpoint(endpoint))?;
    }
    for authority in &authorities {
        check_use(authority, &files.authorities, Use::Authority)?;
    }
    match &certificate {
        Some((path, chain)) => check_chain(chain, path, &authorities, &files.authorities),
        None => Ok(()),
    }
}

fn import(path: &str, endpoint: Endpoint) -> Result<Vec<X509>, Error> {
    let encoded = fs::read(Path::new(path)).map_err(|error| Error::reason(&error));
    let chain =
        encoded.and_then(|encoded| parse_certificates(&encoded, "Base64 unexpected header error."));
    chain.map_err(|reason| {
        let role = endpoint.name();
        Error::generic(format!(
            "Unable to import {role} certificate {path}: {reason}"
        ))
    })
}

/// What a certificate is to be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Authority,
    Endpoint(Endpoint),
}

/// Refuses a certificate that is not for that use, or not now.
fn check_use(certificate: &X509Ref, path: &str, wanted: Use) -> Result<(), Error> {
    let role = match wanted {
        Use::Authority => "CA",
        Use::Endpoint(endpoint) => endpoint.name(),
    };
    let refuse = |message: String| Err(Error::generic(message));
    let now = Asn1Time::days_from_now(0).map_err(|error| internal(&error))?;
    if certificate.not_after() < now {
        return refuse(format!("The {role} certificate {path} has expired"));
    }
    if certificate.not_before() > now {
        return refuse(format!("The {role} certificate {path} is not yet active"));
    }
    let facts = Facts::of(certificate);
    let is_authority = wanted == Use::Authority;
    let constraints = format!("The certificate {path} basic constraints");
    match facts.is_authority {
        Some(true) if !is_authority => {
            return refuse(format!(
                "{constraints} show a CA, but we need one for a {role}"
            ));
        }
        Some(false) if is_authority => {
            return refuse(format!("{constraints} do not show a CA"));
        }
        None if is_authority => {
            return refuse(format!(
                "The certificate {path} is missing basic constraints for a CA"
            ));
        }
        _ => {}
    }
    let usage = facts.usage.filter(|usage| usage.is_critical);
    let missing = usage.and_then(|usage| match wanted {
        Use::Authority if !usage.certificate_signing => Some("certificate signing"),
        Use::Endpoint(_) if !usage.digital_signature => Some("digital signature"),
        Use::Endpoint(_) if !usage.key_encipherment => Some("key encipherment"),
        _ => None,
    });
    if let Some(missing) = missing {
        return refuse(format!(
            "Certificate {path} usage does not permit {missing}"
        ));
    }
    let purpose = facts.purpose.filter(|purpose| purpose.is_critical);
    let is_allowed = purpose.is_none_or(|purpose| match wanted {
        Use::Authority => true,
        Use::Endpoint(Endpoint::Server) => purpose.server,
        Use::Endpoint(Endpoint::Client) => purpose.client,
    });
    match is_allowed {
        true => Ok(()),
        false => refuse(format!(
            "Certificate {path} purpose does not allow use with a TLS {role}"
        )),
    }
}

/// Refuses a certificate that peers who trust the authorities would refuse.
fn check_chain(
    chain: &[X509],
    path: &str,
    authorities: &[X509],
    authorities_path: &str,
) -> Result<(), Error> {
    let Some(own) = chain.first() else {
        return Ok(());
    };
    let verify = || -> Result<X509VerifyResult, ErrorStack> {
        let mut store = trusting(authorities)?;
        store.set_purpose(X509PurposeId::ANY)?;
        let store = store.build();
        let mut between = Stack::new()?;
        for certificate in chain.iter().skip(1) {
            between.push(certificate.clone())?;
        }
        let mut context = X509StoreContext::new()?;
        context.init(&store, own, &between, |context| {
            context.verify_cert()?;
            Ok(context.error())
        })
    };
    let result = verify().map_err(|error| internal(&error))?;
    if result == X509VerifyResult::OK {
        return Ok(());
    }
    let reason = verification_failure(result);
    Err(Error::generic(format!(
        "Our own certificate {path} failed validation against {authorities_path}: {reason}"
    )))
}
