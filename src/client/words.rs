//! What people type after a command: `key=value` words, or JSON.

use serde_json::Value;
use stord_qmp::{Error, keyval};

use super::schema::Schema;

/// A line in words: separated by blanks, which quotes protect. What starts with a brace is one word
/// to the end of the line.
///
/// # Errors
/// A quote has no end.
pub fn split(line: &str) -> Result<Vec<String>, Error> {
    let mut words = Vec::new();
    let mut rest = line.trim();
    while !rest.is_empty() {
        if rest.starts_with('{') {
            words.push(rest.to_owned());
            break;
        }
        let mut word = String::new();
        let mut quote = None;
        let mut end = rest.len();
        for (at, character) in rest.char_indices() {
            match quote {
                Some(open) if open == character => quote = None,
                Some(_) => word.push(character),
                None if character.is_whitespace() => {
                    end = at;
                    break;
                }
                // Quotes inside of JSON are JSON's.
                None if matches!(character, '"' | '\'') && !is_structure(&word) => {
                    quote = Some(character);
                }
                None => word.push(character),
            }
        }
        if quote.is_some() {
            return Err(Error::generic("a quote has no end"));
        }
        words.push(word);
        rest = rest.get(end..).unwrap_or_default().trim_start();
    }
    Ok(words)
}

fn is_structure(word: &str) -> bool {
    let value = word.split_once('=').map(|(_, value)| value);
    value.is_some_and(|value| value.starts_with(['{', '[']))
}

/// Whether the words can be read without a schema.
pub fn is_plain(words: &[String]) -> bool {
    match words {
        [] => true,
        [word] => word.starts_with('{'),
        _ => false,
    }
}

/// The arguments that the words say, for that command.
///
/// # Errors
/// A word is neither `key=value` nor JSON.
pub fn arguments(words: &[String], command: &str, schema: &Schema) -> Result<Option<Value>, Error> {
    match words {
        [] => return Ok(None),
        [word] if word.starts_with('{') => {
            let parsed = serde_json::from_str(word);
            return parsed.map(Some).map_err(|error| {
                Error::generic(format!("the arguments are no JSON: {error}")).with_source(error)
            });
        }
        _ => {}
    }
    let mut text = String::new();
    for word in words {
        let (key, value) = word.split_once('=').ok_or_else(|| {
            Error::generic(format!("'{word}' is neither key=value nor a JSON object"))
        })?;
        if !text.is_empty() {
            text.push(',');
        }
        // A word is one parameter, whatever its commas.
        text.push_str(&format!("{key}={}", value.replace(',', ",,")));
    }
    let value = keyval::parse(&text, None)?.value;
    Ok(Some(match schema.arguments_of(command) {
        Some(kind) => schema.convert(value, kind),
        None => value,
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::schema::tests::sample;
    use super::*;

    #[test]
    fn lines_are_split_where_people_expect_it() {
        let split = |line: &str| split(line).map_err(|error| error.message);
        let words = |words: &[&str]| Ok(words.iter().map(|word| (*word).to_owned()).collect());
        assert_eq!(split("  a b=c  d='e f'g "), words(&["a", "b=c", "d=e fg"]));
        assert_eq!(split("a {\"b\": 'c d'}"), words(&["a", "{\"b\": 'c d'}"]));
        assert_eq!(split("a b=[\"c\"] d"), words(&["a", "b=[\"c\"]", "d"]));
        assert_eq!(split(""), words(&[]));
        assert_eq!(split("a 'b"), Err("a quote has no end".to_owned()));
    }

    #[test]
    fn words_are_arguments() {
        let schema = sample();
        let arguments = |words: &[&str]| {
            let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
            arguments(&words, "open", &schema).map_err(|error| error.message)
        };
        assert_eq!(arguments(&[]), Ok(None));
        assert_eq!(
            arguments(&["{\"size\": \"1\"}"]),
            Ok(Some(json!({"size": "1"})))
        );
        assert_eq!(
            arguments(&[
                "driver=raw",
                "size=1M",
                "file.driver=file",
                "file.filename=a,b"
            ]),
            Ok(Some(json!({
                "driver": "raw", "size": 1 << 20,
                "file": {"driver": "file", "filename": "a,b"}
            })))
        );
        assert!(arguments(&["raw", "size=1"]).is_err_and(|it| it.starts_with("'raw' is neither")));
        assert!(arguments(&["{", "}"]).is_err());
    }
}
