//! Numbers of bytes as people write them.

use stord_qmp::Error;

/// Reads a number of bytes with a suffix: `k`, `M`, `G`, `T`, `P` or `E`, in powers of 1024. Without one it is bytes.
///
/// # Errors
/// It is no such number, or too large.
pub fn parse(text: &str) -> Result<u64, Error> {
    let wrong = || {
        Error::generic(format!("'{text}' is no size"))
            .with_hint("A size is a number with one of the suffixes k, M, G, T, or in bytes: 20G")
    };
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..).unwrap_or_default() {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        "E" | "e" => 60,
        _ => return Err(wrong()),
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    if !part.chars().all(|c| c.is_ascii_digit()) || part.len() > 9 {
        return Err(wrong());
    }
    let tenths = 10u128.pow(u32::try_from(part.len()).map_err(|_| wrong())?);
    let part: u128 = if part.is_empty() {
        0
    } else {
        part.parse().map_err(|_| wrong())?
    };
    let bytes = (u128::from(whole) << shift) + ((part << shift) / tenths);
    u64::try_from(bytes)
        .ok()
        .filter(|bytes| i64::try_from(*bytes).is_ok())
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1k", 1024),
            ("1.5K", 1536),
            ("20G", 20 << 30),
            ("2T", 2 << 40),
        ] {
            assert_eq!(parse(text).ok(), Some(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "k",
            "-1",
            "1x",
            "1kk",
            "1.2.3",
            "16E",
            "99999999999999999999",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
