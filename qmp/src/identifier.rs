//! Names that users give to objects, exports, nodes and devices are identifiers.

use crate::error::Error;

/// Whether the text is an identifier: a letter, then letters, digits, `-`, `.` and `_`.
pub fn is_identifier(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    text.starts_with(|first: char| first.is_ascii_alphabetic()) && text.bytes().all(is_inner)
}

/// Refuses a value of the parameter that is no identifier.
///
/// # Errors
/// It is none.
pub fn check(parameter: &str, value: &str) -> Result<(), Error> {
    if is_identifier(value) {
        return Ok(());
    }
    Err(
        Error::generic(format!("Parameter '{parameter}' expects an identifier")).with_hint(
            "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
        ),
    )
}
