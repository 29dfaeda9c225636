//! Writes JSON the way the reference lays it out, in ASCII: any transport is safe for it, and a
//! client that compares text sees no difference.

use serde_json::Value;

/// On one line, with a blank after each comma and colon.
pub fn to_compact(value: &Value) -> String {
    let mut writer = Writer {
        out: String::new(),
        pretty: false,
        depth: 0,
    };
    writer.value(value);
    writer.out
}

/// One element or member per line, indented by four blanks per level.
pub fn to_pretty(value: &Value) -> String {
    let mut writer = Writer {
        out: String::new(),
        pretty: true,
        depth: 0,
    };
    writer.value(value);
    writer.out
}

struct Writer {
    out: String,
    pretty: bool,
    depth: usize,
}

impl Writer {
    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.out.push_str("null"),
            Value::Bool(value) => self.out.push_str(if *value { "true" } else { "false" }),
            Value::Number(number) => self.out.push_str(&number.to_string()),
            Value::String(text) => self.string(text),
            Value::Array(values) => self.enclosed('[', values, ']', Self::value),
            Value::Object(members) => self.enclosed('{', members, '}', |writer, (name, value)| {
                writer.string(name);
                writer.out.push_str(": ");
                writer.value(value);
            }),
        }
    }

    fn enclosed<T>(
        &mut self,
        opening: char,
        items: impl IntoIterator<Item = T>,
        closing: char,
        mut write: impl FnMut(&mut Self, T),
    ) {
        self.out.push(opening);
        self.depth += 1;
        for (index, item) in items.into_iter().enumerate() {
            if index > 0 {
                self.out.push_str(if self.pretty { "," } else { ", " });
            }
            self.line();
            write(self, item);
        }
        self.depth -= 1;
        self.line();
        self.out.push(closing);
    }

    fn line(&mut self) {
        if self.pretty {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n("    ", self.depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            self.character(character);
        }
        self.out.push('"');
    }

    fn character(&mut self, character: char) {
        match character {
            '"' => self.out.push_str("\\\""),
            '\\' => self.out.push_str("\\\\"),
            '\x08' => self.out.push_str("\\b"),
            '\x0c' => self.out.push_str("\\f"),
            '\n' => self.out.push_str("\\n"),
            '\r' => self.out.push_str("\\r"),
            '\t' => self.out.push_str("\\t"),
            ' '..='~' => self.out.push(character),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    self.out.push_str(&format!("\\u{unit:04X}"));
                }
            }
        }
    }
}
