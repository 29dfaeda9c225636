//! How values are shown: as JSON over several lines, in colours on terminals that have them.

use std::io::IsTerminal;

use serde_json::Value;

const NAME: &str = "\x1b[36m";
const TEXT: &str = "\x1b[32m";
const OTHER: &str = "\x1b[33m";
const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Whether standard output is to be in colours.
pub fn wants_colours() -> bool {
    let is_unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
        || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    !is_unwanted && std::io::stdout().is_terminal()
}

/// A value over several lines, without the last line's end.
pub fn pretty(value: &Value, colours: bool) -> String {
    let mut text = String::new();
    write(value, 0, colours, &mut text);
    text
}

/// An event in one line, without its end.
pub fn event(event: &Value, colours: bool) -> String {
    match colours {
        true => format!("{DIM}{event}{PLAIN}"),
        false => event.to_string(),
    }
}

fn write(value: &Value, depth: usize, colours: bool, text: &mut String) {
    let new_line = |text: &mut String, depth: usize| {
        text.push('\n');
        text.push_str(&"  ".repeat(depth));
    };
    match value {
        Value::Array(elements) if !elements.is_empty() => {
            text.push('[');
            for (index, element) in elements.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                new_line(text, depth + 1);
                write(element, depth + 1, colours, text);
            }
            new_line(text, depth);
            text.push(']');
        }
        Value::Object(members) if !members.is_empty() => {
            text.push('{');
            for (index, (name, member)) in members.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                new_line(text, depth + 1);
                let name = Value::String(name.clone()).to_string();
                paint(text, NAME, &name, colours);
                text.push_str(": ");
                write(member, depth + 1, colours, text);
            }
            new_line(text, depth);
            text.push('}');
        }
        Value::String(_) => paint(text, TEXT, &value.to_string(), colours),
        Value::Array(_) | Value::Object(_) => text.push_str(&value.to_string()),
        _ => paint(text, OTHER, &value.to_string(), colours),
    }
}

fn paint(text: &mut String, colour: &str, piece: &str, colours: bool) {
    match colours {
        true => {
            text.push_str(colour);
            text.push_str(piece);
            text.push_str(PLAIN);
        }
        false => text.push_str(piece),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_json_with_and_without_colours() {
        let value = json!({"a": [1, "x\n", null, {}], "b\"": {"c": true}, "d": []});
        let plain = pretty(&value, false);
        assert_eq!(
            serde_json::from_str::<Value>(&plain).ok(),
            Some(value.clone())
        );
        assert!(plain.contains("\n  \"a\": [\n    1,"), "{plain}");
        let mut painted = pretty(&value, true);
        for colour in [NAME, TEXT, OTHER, PLAIN] {
            painted = painted.replace(colour, "");
        }
        assert_eq!(painted, plain);
    }
}
