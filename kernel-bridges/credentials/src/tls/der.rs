//! Reads the tag-length-value encoding of certificates (X.690, DER), never past what is there.

/// What certificates are made of, as far as it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element<'a> {
    /// The identifier octet.
    pub tag: u8,
    /// The content.
    pub content: &'a [u8],
}

pub const BOOLEAN: u8 = 0x01;
pub const BIT_STRING: u8 = 0x03;
pub const OCTET_STRING: u8 = 0x04;
pub const OBJECT_IDENTIFIER: u8 = 0x06;
pub const UTF8_STRING: u8 = 0x0c;
pub const PRINTABLE_STRING: u8 = 0x13;
pub const TELETEX_STRING: u8 = 0x14;
pub const IA5_STRING: u8 = 0x16;
pub const UNIVERSAL_STRING: u8 = 0x1c;
pub const BMP_STRING: u8 = 0x1e;
pub const SEQUENCE: u8 = 0x30;
/// The extensions in a certificate: `[3] EXPLICIT`.
pub const EXTENSIONS: u8 = 0xa3;

/// Elements one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Elements<'a>(pub &'a [u8]);

impl<'a> Iterator for Elements<'a> {
    type Item = Element<'a>;

    /// The next element; none at the end, and where the encoding is broken.
    fn next(&mut self) -> Option<Element<'a>> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, mut rest) = rest.split_first()?;
        let length = match first {
            0..=0x7f => usize::from(first),
            0x81..=0x84 => {
                let (octets, after) = rest.split_at_checked(usize::from(first & 0x7f))?;
                rest = after;
                octets
                    .iter()
                    .fold(0, |length, octet| length << 8 | usize::from(*octet))
            }
            _ => return None,
        };
        let (content, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some(Element { tag, content })
    }
}

impl<'a> Element<'a> {
    /// The element that the bytes start with, if it is of that tag.
    pub fn first(bytes: &'a [u8], tag: u8) -> Option<Self> {
        Elements(bytes).next().filter(|element| element.tag == tag)
    }

    /// The elements inside.
    pub fn inside(self) -> Elements<'a> {
        Elements(self.content)
    }
}

/// An object identifier in dots and numbers.
pub fn dotted(identifier: &[u8]) -> String {
    let mut parts: Vec<u64> = Vec::new();
    let mut value: u64 = 0;
    for octet in identifier {
        value = value << 7 | u64::from(octet & 0x7f);
        if octet & 0x80 == 0 {
            match parts.is_empty() {
                // The first two numbers share one.
                true => {
                    let first = (value / 40).min(2);
                    parts.extend([first, value - 40 * first]);
                }
                false => parts.push(value),
            }
            value = 0;
        }
    }
    let parts: Vec<String> = parts.iter().map(u64::to_string).collect();
    parts.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_encodings_end_the_reading() {
        for bytes in [
            &b""[..],
            b"\x30",
            b"\x30\x02\x01",
            b"\x30\x80\x00\x00",
            b"\x30\x84\xff\xff\xff\xff\x00",
            b"\x30\x82\x01",
        ] {
            assert_eq!(Elements(bytes).next(), None, "{bytes:x?}");
        }
        let long = [&[0x04, 0x81, 0x80][..], &[9; 128]].concat();
        assert_eq!(Elements(&long).next().map(|e| e.content.len()), Some(128));
    }

    #[test]
    fn identifiers_are_written_in_dots() {
        assert_eq!(dotted(&[0x55, 0x04, 0x03]), "2.5.4.3");
        assert_eq!(
            dotted(&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x01]),
            "1.2.840.113549.1.9.1"
        );
    }
}
