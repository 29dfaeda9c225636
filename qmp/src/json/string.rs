//! The characters of a JSON string.

use crate::error::Error;

use super::reader::syntax;

/// Reads a string with its quotes.
///
/// # Errors
/// An unknown escape, or something that is no Unicode character.
pub fn unquote(quoted: &[u8]) -> Result<String, Error> {
    let mut text = String::new();
    let mut rest = match quoted {
        [_, inner @ .., _] => inner,
        _ => &[],
    };
    while let Some((&byte, after)) = rest.split_first() {
        (text, rest) = match (byte, after) {
            (b'\\', [b'u', after @ ..]) => {
                let (character, after) = unicode_escape(after).ok_or_else(|| {
                    // With the closing quote.
                    let start = quoted.len().saturating_sub(after.len() + 1);
                    bad_escape(quoted.get(start..).unwrap_or_default())
                })?;
                text.push(character);
                (text, after)
            }
            (b'\\', [letter, after @ ..]) => {
                text.push(simple_escape(*letter)?);
                (text, after)
            }
            (b' '..=b'~', _) => {
                text.push(char::from(byte));
                (text, after)
            }
            // NUL in the modified UTF-8 of the reference.
            (0xc0, [0x80, after @ ..]) => {
                text.push('\0');
                (text, after)
            }
            _ => {
                let (character, after) = raw_character(rest)
                    .ok_or_else(|| syntax("invalid UTF-8 sequence in string"))?;
                text.push(character);
                (text, after)
            }
        };
    }
    Ok(text)
}

fn simple_escape(letter: u8) -> Result<char, Error> {
    match letter {
        b'"' | b'\'' | b'\\' | b'/' => Ok(char::from(letter)),
        b'b' => Ok('\x08'),
        b'f' => Ok('\x0c'),
        b'n' => Ok('\n'),
        b'r' => Ok('\r'),
        b't' => Ok('\t'),
        _ => Err(syntax("invalid escape sequence in string")),
    }
}

/// The character written as what follows `\u`: four digits, or eight with another `\u` between.
fn unicode_escape(text: &[u8]) -> Option<(char, &[u8])> {
    let (first, rest) = hex_unit(text)?;
    let (second, rest) = match (first, rest.strip_prefix(b"\\u")) {
        (0xd800..0xdc00, Some(rest)) => hex_unit(rest).map(|(unit, rest)| (Some(unit), rest))?,
        _ => (None, rest),
    };
    let units = [Some(first), second].into_iter().flatten();
    let mut characters = char::decode_utf16(units);
    match (characters.next(), characters.next()) {
        (Some(Ok(character)), None) if !is_noncharacter(character) => Some((character, rest)),
        _ => None,
    }
}

fn hex_unit(text: &[u8]) -> Option<(u16, &[u8])> {
    let (digits, rest) = text.split_first_chunk::<4>()?;
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let digits = str::from_utf8(digits).ok()?;
    Some((u16::from_str_radix(digits, 16).ok()?, rest))
}

/// The error of a `\u` followed by this text, of which it shows the first four bytes.
fn bad_escape(text: &[u8]) -> Error {
    let shown = String::from_utf8_lossy(text.get(..4).unwrap_or(text));
    syntax(format!("\\u{shown} is not a valid Unicode character"))
}

/// The character at the start of the text.
fn raw_character(text: &[u8]) -> Option<(char, &[u8])> {
    // The one overlong sequence that the reference takes, for a NUL that ends no string in C.
    if let [0xc0, 0x80, rest @ ..] = text {
        return Some(('\0', rest));
    }
    let (candidate, _) = text.split_at(text.len().min(4));
    let valid = match str::from_utf8(candidate) {
        Ok(valid) => valid,
        Err(error) => str::from_utf8(candidate.get(..error.valid_up_to())?).ok()?,
    };
    let character = valid.chars().next().filter(|c| !is_noncharacter(*c))?;
    Some((character, text.get(character.len_utf8()..)?))
}

/// Whether Unicode reserves the code point for internal use.
fn is_noncharacter(character: char) -> bool {
    let code = u32::from(character);
    (0xfdd0..0xfdf0).contains(&code) || code & 0xfffe == 0xfffe
}
