//! Writes distinguished names as authorization rules have them: as in RFC 4514, but in the order of
//! the certificate, which is how GnuTLS writes them and thus what the reference's rules say.

use std::fmt::Write;

use super::der::{self, Element};

/// The names of attribute types, by object identifier.
const ATTRIBUTES: &[(&str, &str)] = &[
    ("2.5.4.3", "CN"),
    ("2.5.4.4", "surName"),
    ("2.5.4.5", "serialNumber"),
    ("2.5.4.6", "C"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.9", "street"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.12", "title"),
    ("2.5.4.13", "description"),
    ("2.5.4.15", "businessCategory"),
    ("2.5.4.17", "postalCode"),
    ("2.5.4.20", "telephoneNumber"),
    ("2.5.4.41", "name"),
    ("2.5.4.42", "givenName"),
    ("2.5.4.43", "initials"),
    ("2.5.4.44", "generationQualifier"),
    ("2.5.4.46", "dnQualifier"),
    ("2.5.4.65", "pseudonym"),
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("1.2.840.113549.1.9.1", "EMAIL"),
];

/// The name that is encoded so (RFC 5280, 4.1.2.4); none if it is no name.
pub fn describe(encoded: &[u8]) -> Option<String> {
    let mut text = String::new();
    for (index, relative) in Element::first(encoded, der::SEQUENCE)?.inside().enumerate() {
        for (part, attribute) in relative.inside().enumerate() {
            match (index, part) {
                (0, 0) => {}
                (_, 0) => text.push(','),
                _ => text.push('+'),
            }
            let mut members = attribute.inside();
            let identifier = members.next().filter(|e| e.tag == der::OBJECT_IDENTIFIER)?;
            write_attribute(&mut text, &der::dotted(identifier.content), members.0)?;
        }
    }
    Some(text)
}

fn write_attribute(text: &mut String, identifier: &str, encoded: &[u8]) -> Option<()> {
    let known = ATTRIBUTES.iter().find(|(known, _)| *known == identifier);
    let value = der::Elements(encoded).next()?;
    match (known, string(value)) {
        (Some((_, name)), Some(value)) => {
            text.push_str(name);
            text.push('=');
            escape(text, &value);
        }
        _ => {
            text.push_str(identifier);
            text.push_str("=#");
            for octet in encoded {
                write!(text, "{octet:02X}").ok()?;
            }
        }
    }
    Some(())
}

/// The text of a string of any kind.
fn string(value: Element<'_>) -> Option<String> {
    let Element { tag, content } = value;
    match tag {
        der::UTF8_STRING | der::PRINTABLE_STRING | der::IA5_STRING | der::TELETEX_STRING => {
            String::from_utf8(content.to_vec()).ok()
        }
        der::BMP_STRING => {
            let (units, []) = content.as_chunks() else {
                return None;
            };
            let units: Vec<u16> = units.iter().map(|unit| u16::from_be_bytes(*unit)).collect();
            String::from_utf16(&units).ok()
        }
        der::UNIVERSAL_STRING => {
            let (characters, []) = content.as_chunks() else {
                return None;
            };
            let mut characters = characters.iter();
            characters.try_fold(String::new(), |mut text, character| {
                text.push(char::from_u32(u32::from_be_bytes(*character))?);
                Some(text)
            })
        }
        _ => None,
    }
}

/// Writes a value so that it cannot be taken for anything else in the name (RFC 4514, 2.4).
fn escape(text: &mut String, value: &str) {
    let last = value.chars().count().saturating_sub(1);
    for (at, character) in value.chars().enumerate() {
        match character {
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' => text.push('\\'),
            '#' if at == 0 => text.push('\\'),
            ' ' if at == 0 || at == last => text.push('\\'),
            '\0' => {
                text.push_str("\\00");
                continue;
            }
            _ => {}
        }
        text.push(character);
    }
}

#[cfg(test)]
mod tests {
    use openssl::nid::Nid;
    use openssl::x509::X509NameBuilder;

    use super::*;

    fn name(entries: &[(&str, &str)]) -> String {
        let mut name = X509NameBuilder::new().expect("memory");
        for (field, value) in entries {
            name.append_entry_by_text(field, value)
                .expect("a known field");
        }
        let encoded = name.build().to_der().expect("it was just built");
        describe(&encoded).expect("it is a name")
    }

    #[test]
    fn names_are_in_the_order_of_the_certificate() {
        let entries = [
            ("C", "GB"),
            ("ST", "London"),
            ("O", "Example"),
            ("CN", "a.b"),
        ];
        assert_eq!(name(&entries), "C=GB,ST=London,O=Example,CN=a.b");
        let others = [("DC", "org"), ("UID", "fred"), ("emailAddress", "f@x.org")];
        assert_eq!(name(&others), "DC=org,UID=fred,EMAIL=f@x.org");
    }

    #[test]
    fn values_cannot_pretend_to_be_other_attributes() {
        assert_eq!(name(&[("CN", "a,O=b")]), "CN=a\\,O=b");
        assert_eq!(name(&[("CN", " #a+\"b ")]), "CN=\\ #a\\+\\\"b\\ ");
        assert_eq!(name(&[("CN", "#a")]), "CN=\\#a");
    }

    #[test]
    fn unknown_attributes_are_written_in_hex() {
        let mut built = X509NameBuilder::new().expect("memory");
        built
            .append_entry_by_nid(Nid::NETSCAPE_CERT_TYPE, "x")
            .expect("any attribute will do");
        let encoded = built.build().to_der().expect("it was just built");
        let text = describe(&encoded).expect("it is a name");
        assert!(text.starts_with("2.16.840.1.113730.1.1=#"), "{text}");
    }

    #[test]
    fn what_is_no_name_has_none() {
        assert_eq!(describe(b""), None);
        assert_eq!(describe(b"\x31\x00"), None);
        assert_eq!(describe(b"\x30\x04\x31\x02\x30\x00"), None);
        assert_eq!(describe(b"\x30\x00").as_deref(), Some(""));
    }
}
