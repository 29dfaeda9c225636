//! Base64 as the reference's commands and secrets take it: an incomplete group at the end is
//! dropped, line ends are skipped, and `=` may stand anywhere.

use crate::error::Error;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Decodes a text.
///
/// # Errors
/// It holds a character that is neither of the alphabet nor `=` nor a line end.
pub fn decode(text: &str) -> Result<Vec<u8>, Error> {
    let mut digits = Vec::with_capacity(text.len());
    for byte in text.bytes().filter(|byte| *byte != b'\n') {
        let digit = ALPHABET
            .iter()
            .zip(0u32..)
            .find(|(known, _)| **known == byte);
        match digit {
            Some((_, digit)) => digits.push((digit, false)),
            None if byte == b'=' => digits.push((0, true)),
            None => return Err(Error::generic("Base64 data contains invalid characters")),
        }
    }
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3);
    for group in digits.as_chunks::<4>().0 {
        let [.., third, fourth] = group;
        let value = group.iter().fold(0, |value, (digit, _)| value << 6 | digit);
        let [_, first_byte, second_byte, third_byte] = value.to_be_bytes();
        bytes.push(first_byte);
        if !third.1 {
            bytes.push(second_byte);
        }
        if !fourth.1 {
            bytes.push(third_byte);
        }
    }
    Ok(bytes)
}

/// Encodes bytes, with padding and without line ends.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let value = byte(0) << 16 | byte(1) << 8 | byte(2);
        for position in 0..4 {
            let digit = value >> (18 - 6 * position) & 63;
            let is_padding = position > group.len();
            let symbol = ALPHABET.iter().zip(0..).find(|(_, index)| *index == digit);
            text.push(match symbol {
                Some((symbol, _)) if !is_padding => char::from(*symbol),
                _ => '=',
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive() {
        for length in 0u8..20 {
            let bytes: Vec<u8> = (0..length).map(|byte| byte.wrapping_mul(73)).collect();
            assert_eq!(decode(&encode(&bytes)), Ok(bytes));
        }
        assert_eq!(encode(b"hallo"), "aGFsbG8=");
        assert_eq!(encode(b"\xff\xfe\xfd"), "//79");
    }

    #[test]
    fn odd_texts_are_taken_as_the_reference_takes_them() {
        for (text, bytes) in [
            ("", &b""[..]),
            ("a", b""),
            ("aGFsbG8", b"hal"),
            ("aGFs\nbG8=\n", b"hallo"),
            ("aGFsbG8=aGFs", b"hallohal"),
            ("====", b"\0"),
            ("aG=s", b"h\x2c"),
        ] {
            assert_eq!(decode(text).as_deref(), Ok(bytes), "{text:?}");
        }
        for text in ["a GF", "@@@@", "aGF\u{e4}", "aGF-"] {
            assert!(decode(text).is_err(), "{text:?}");
        }
    }
}
