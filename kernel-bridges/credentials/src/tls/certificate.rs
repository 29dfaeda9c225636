//! What a certificate says about what it may be used for: the extensions of RFC 5280, 4.2.1, that
//! [`X509Ref`] does not give away, and whether they are critical.

use openssl::x509::X509Ref;

use super::der::{self, Element};

/// A certificate's own word about its use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether it is for an authority; none if it does not say.
    pub is_authority: Option<bool>,
    /// What its key may do; none if it does not say.
    pub usage: Option<Usage>,
    /// What for; none if it does not say.
    pub purpose: Option<Purpose>,
}

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Sign what it says itself.
    pub digital_signature: bool,
    /// Protect other keys.
    pub key_encipherment: bool,
    /// Sign certificates.
    pub certificate_signing: bool,
    /// Whether this must be heeded.
    pub is_critical: bool,
}

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Purpose {
    /// Servers.
    pub server: bool,
    /// Clients.
    pub client: bool,
    /// Whether this must be heeded.
    pub is_critical: bool,
}

const KEY_USAGE: &str = "2.5.29.15";
const BASIC_CONSTRAINTS: &str = "2.5.29.19";
const EXTENDED_KEY_USAGE: &str = "2.5.29.37";

const ANY_PURPOSE: &str = "2.5.29.37.0";
const SERVER: &str = "1.3.6.1.5.5.7.3.1";
const CLIENT: &str = "1.3.6.1.5.5.7.3.2";

impl Facts {
    /// What the certificate says.
    pub fn of(certificate: &X509Ref) -> Self {
        let encoded = certificate.to_der().unwrap_or_default();
        Self::decode(&encoded).unwrap_or_default()
    }

    fn decode(encoded: &[u8]) -> Option<Self> {
        let certificate = Element::first(encoded, der::SEQUENCE)?;
        let signed = Element::first(certificate.content, der::SEQUENCE)?;
        let mut facts = Self::default();
        let Some(extensions) = signed.inside().find(|e| e.tag == der::EXTENSIONS) else {
            return Some(facts);
        };
        for extension in Element::first(extensions.content, der::SEQUENCE)?.inside() {
            let mut members = extension.inside();
            let identifier = members.next()?;
            let mut value = members.next()?;
            let mut is_critical = false;
            if value.tag == der::BOOLEAN {
                is_critical = value.content != [0];
                value = members.next()?;
            }
            if value.tag != der::OCTET_STRING {
                return None;
            }
            facts.take(&der::dotted(identifier.content), value.content, is_critical);
        }
        Some(facts)
    }

    fn take(&mut self, identifier: &str, value: &[u8], is_critical: bool) {
        match identifier {
            BASIC_CONSTRAINTS => {
                let constraints = Element::first(value, der::SEQUENCE);
                let flag = constraints.and_then(|c| Element::first(c.content, der::BOOLEAN));
                self.is_authority = Some(flag.is_some_and(|flag| flag.content != [0]));
            }
            KEY_USAGE => {
                let bits = Element::first(value, der::BIT_STRING);
                // The first octet says how many bits of the last are not meant.
                let first = bits.and_then(|bits| bits.content.get(1).copied());
                let bits = first.unwrap_or(0);
                self.usage = Some(Usage {
                    digital_signature: bits & 0x80 != 0,
                    key_encipherment: bits & 0x20 != 0,
                    certificate_signing: bits & 0x04 != 0,
                    is_critical,
                });
            }
            EXTENDED_KEY_USAGE => {
                let purposes = Element::first(value, der::SEQUENCE);
                let purposes = purposes.into_iter().flat_map(Element::inside);
                let purposes: Vec<_> = purposes.map(|e| der::dotted(e.content)).collect();
                let allows = |wanted: &str| {
                    let mut purposes = purposes.iter();
                    purposes.any(|purpose| purpose == wanted || purpose == ANY_PURPOSE)
                };
                self.purpose = Some(Purpose {
                    server: allows(SERVER),
                    client: allows(CLIENT),
                    is_critical,
                });
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use openssl::asn1::Asn1Time;
    use openssl::hash::MessageDigest;
    use openssl::pkey::PKey;
    use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, KeyUsage};
    use openssl::x509::{X509, X509Extension};

    use super::*;

    fn certificate(extensions: Vec<X509Extension>) -> X509 {
        let key = PKey::generate_ed25519().expect("a key");
        let mut builder = X509::builder().expect("memory");
        builder.set_version(2).expect("a version");
        builder.set_pubkey(&key).expect("a key");
        let now = Asn1Time::days_from_now(0).expect("a time");
        builder.set_not_before(&now).expect("a time");
        builder.set_not_after(&now).expect("a time");
        for extension in extensions {
            builder.append_extension(extension).expect("an extension");
        }
        builder
            .sign(&key, MessageDigest::null())
            .expect("a signature");
        builder.build()
    }

    #[test]
    fn extensions_are_found_with_their_weight() {
        let facts = Facts::of(&certificate(vec![
            BasicConstraints::new()
                .critical()
                .ca()
                .build()
                .expect("one"),
            KeyUsage::new()
                .critical()
                .key_cert_sign()
                .build()
                .expect("one"),
            ExtendedKeyUsage::new().client_auth().build().expect("one"),
        ]));
        let usage = Usage {
            digital_signature: false,
            key_encipherment: false,
            certificate_signing: true,
            is_critical: true,
        };
        let purpose = Purpose {
            server: false,
            client: true,
            is_critical: false,
        };
        assert_eq!(facts.is_authority, Some(true));
        assert_eq!(facts.usage, Some(usage));
        assert_eq!(facts.purpose, Some(purpose));
    }

    #[test]
    fn silence_is_told_from_a_no() {
        assert_eq!(Facts::of(&certificate(vec![])), Facts::default());
        let no = BasicConstraints::new().build().expect("one");
        assert_eq!(Facts::of(&certificate(vec![no])).is_authority, Some(false));
    }
}
