//! Authorities, certificates and keys made for a test, in a directory of its own.

use std::fs;
use std::path::PathBuf;

use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::symm::Cipher;
use openssl::x509::extension::{
    BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName,
};
use openssl::x509::{X509, X509Builder, X509Name, X509NameBuilder};
use stord_qmp::schema::object::QCryptoTLSCredsEndpoint as Endpoint;
use stord_qmp::schema::object::TlsCredsProperties;
use tempfile::TempDir;

/// Seconds of a day.
const DAY: i64 = 86400;

/// A certificate and its key.
pub struct Identity {
    pub certificate: X509,
    pub key: PKey<Private>,
}

/// What a certificate is to say.
pub struct Wanted<'a> {
    pub name: &'a [(&'a str, &'a str)],
    pub usage: Option<KeyUsage>,
    pub constraints: Option<BasicConstraints>,
    pub purpose: Option<ExtendedKeyUsage>,
    /// From when to when it is valid, in days from now.
    pub days: (i64, i64),
}

impl Default for Wanted<'_> {
    fn default() -> Self {
        Self {
            name: &[("C", "GB"), ("O", "Example"), ("CN", "localhost")],
            usage: Some(key_usage(|usage| {
                usage.digital_signature().key_encipherment();
            })),
            constraints: Some(BasicConstraints::new()),
            purpose: None,
            days: (-1, 1),
        }
    }
}

/// A usage that must be heeded.
pub fn key_usage(change: impl FnOnce(&mut KeyUsage)) -> KeyUsage {
    let mut usage = KeyUsage::new();
    usage.critical();
    change(&mut usage);
    usage
}

/// Constraints of an authority.
pub fn of_authority() -> BasicConstraints {
    let mut constraints = BasicConstraints::new();
    constraints.critical().ca();
    constraints
}

pub fn new_key() -> PKey<Private> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).expect("a known curve");
    let key = EcKey::generate(&group).expect("a key");
    PKey::from_ec_key(key).expect("a key")
}

fn name(entries: &[(&str, &str)]) -> X509Name {
    let mut name = X509NameBuilder::new().expect("memory");
    for (field, value) in entries {
        name.append_entry_by_text(field, value)
            .expect("a known field");
    }
    name.build()
}

impl Identity {
    /// An authority that nobody stands for.
    pub fn authority() -> Self {
        Self::issued(
            None,
            Wanted {
                name: &[("CN", "authority")],
                usage: Some(key_usage(|usage| {
                    usage.key_cert_sign().crl_sign();
                })),
                constraints: Some(of_authority()),
                ..Wanted::default()
            },
        )
    }

    /// A certificate that an authority stands for.
    pub fn issued(authority: Option<&Self>, wanted: Wanted<'_>) -> Self {
        let key = new_key();
        let mut builder = X509Builder::new().expect("memory");
        builder.set_version(2).expect("a version");
        let mut serial = BigNum::new().expect("memory");
        serial
            .rand(64, openssl::bn::MsbOption::ONE, false)
            .expect("random bits");
        let serial = serial.to_asn1_integer().expect("a number");
        builder.set_serial_number(&serial).expect("a number");
        let subject = name(wanted.name);
        builder.set_subject_name(&subject).expect("a name");
        builder.set_pubkey(&key).expect("a key");
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("later than 1970");
        let now = i64::try_from(now.as_secs()).expect("it will do for a while");
        let time = |days: i64| Asn1Time::from_unix(now + days * DAY).expect("a time");
        builder
            .set_not_before(&time(wanted.days.0))
            .expect("a time");
        builder.set_not_after(&time(wanted.days.1)).expect("a time");
        if let Some(constraints) = wanted.constraints {
            let extension = constraints.build().expect("an extension");
            builder.append_extension(extension).expect("an extension");
        }
        if let Some(usage) = wanted.usage {
            let extension = usage.build().expect("an extension");
            builder.append_extension(extension).expect("an extension");
        }
        if let Some(purpose) = wanted.purpose {
            let extension = purpose.build().expect("an extension");
            builder.append_extension(extension).expect("an extension");
        }
        let issuer = match authority {
            None => subject,
            Some(authority) => {
                let issuer = authority.certificate.subject_name();
                issuer.to_owned().expect("memory")
            }
        };
        builder.set_issuer_name(&issuer).expect("a name");
        let context = builder.x509v3_context(authority.map(|it| &*it.certificate), None);
        let names = SubjectAlternativeName::new()
            .dns("localhost")
            .ip("127.0.0.1")
            .build(&context)
            .expect("an extension");
        builder.append_extension(names).expect("an extension");
        let signer = authority.map_or(&key, |authority| &authority.key);
        builder
            .sign(signer, MessageDigest::sha256())
            .expect("a signature");
        Self {
            certificate: builder.build(),
            key,
        }
    }

    pub fn pem(&self) -> Vec<u8> {
        self.certificate.to_pem().expect("it can be written")
    }
}

/// A directory of credentials.
pub struct Made(TempDir);

impl Made {
    /// An empty one.
    pub fn new() -> Self {
        Self(TempDir::new().expect("a directory"))
    }

    /// One with an authority, and a server and a client of that authority.
    pub fn complete() -> (Self, Identity) {
        let authority = Identity::authority();
        let made = Self::new();
        made.put("ca-cert.pem", &authority.pem());
        made.put_identity(
            "server",
            &Identity::issued(Some(&authority), Wanted::default()),
        );
        made.put_identity(
            "client",
            &Identity::issued(Some(&authority), Wanted::default()),
        );
        (made, authority)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a plain path").to_owned()
    }

    pub fn put(&self, name: &str, content: &[u8]) {
        fs::write(self.path(name), content).expect("room");
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).expect("it is there");
    }

    pub fn put_identity(&self, role: &str, identity: &Identity) {
        self.put(&format!("{role}-cert.pem"), &identity.pem());
        let key = identity.key.private_key_to_pem_pkcs8().expect("a key");
        self.put(&format!("{role}-key.pem"), &key);
    }

    pub fn encrypt_key(&self, role: &str, key: &PKey<Private>, password: &str) {
        let cipher = Cipher::aes_256_cbc();
        let key = key.private_key_to_pem_pkcs8_passphrase(cipher, password.as_bytes());
        self.put(&format!("{role}-key.pem"), &key.expect("a key"));
    }

    pub fn properties(&self, endpoint: Endpoint) -> TlsCredsProperties {
        TlsCredsProperties {
            dir: Some(self.0.path().to_str().expect("a plain path").to_owned()),
            endpoint: Some(endpoint),
            ..TlsCredsProperties::default()
        }
    }
}
