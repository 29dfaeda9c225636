//! Builds values from tokens without recursion, within limits, so that no input can exhaust the
//! stack or, for long, the memory.
//!
//! A value ends where its brackets balance. An error inside it is therefore reported there, once,
//! and the rest of it is not looked at; only bytes that are no token end it at once.

use serde_json::{Map, Number, Value};

use crate::error::Error;

use super::lexer::{Kind, Lexer, MAX_TOKEN_SIZE, Token};
use super::string;

/// The deepest nesting of a value.
pub const MAX_NESTING: usize = 1024;

/// The most tokens of a value.
const MAX_TOKEN_COUNT: usize = 2 << 20;

/// The values of a stream of bytes.
#[derive(Default)]
pub struct Reader {
    lexer: Lexer,
    builder: Builder,
}

impl Reader {
    /// Takes bytes and hands each value they complete, or what is wrong with it, to `emit`.
    pub fn feed(&mut self, bytes: &[u8], mut emit: impl FnMut(Result<Value, Error>)) {
        let Self { lexer, builder } = self;
        for &byte in bytes {
            lexer.feed(byte, &mut |token| {
                if let Some(value) = builder.take(token) {
                    emit(value);
                }
            });
        }
    }

    /// Ends the stream; a value that has begun is one no more.
    pub fn finish(&mut self, mut emit: impl FnMut(Result<Value, Error>)) {
        let Self { lexer, builder } = self;
        lexer.finish(&mut |token| {
            if let Some(value) = builder.take(token) {
                emit(value);
            }
        });
        if builder.token_count > 0 {
            let unfinished = std::mem::take(builder);
            emit(Err(unfinished
                .error
                .unwrap_or_else(|| syntax("premature EOI"))));
        }
    }
}

/// The value under construction.
#[derive(Default)]
struct Builder {
    /// The open lists and objects, outermost first; empty once there is an error.
    open: Vec<Open>,
    complete: Option<Value>,
    error: Option<Error>,
    /// Opening minus closing braces and brackets; negative where they do not match.
    braces: isize,
    brackets: isize,
    token_count: usize,
    token_bytes: usize,
}

/// A list or an object, and what is to come next in it.
enum Open {
    List {
        values: Vec<Value>,
        next: NextInList,
    },
    Object {
        members: Map<String, Value>,
        key: String,
        next: NextInObject,
    },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum NextInList {
    ValueOrEnd,
    Value,
    SeparatorOrEnd,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum NextInObject {
    KeyOrEnd,
    Key,
    Colon,
    Value,
    SeparatorOrEnd,
}

impl Builder {
    /// Takes a token; returns the value or the error that it completes.
    fn take(&mut self, token: Token) -> Option<Result<Value, Error>> {
        if token.kind == Kind::Stray {
            *self = Self::default();
            return Some(Err(syntax(format!("stray '{}'", printable(&token.text)))));
        }
        match token.kind {
            Kind::Structural(b'{') => self.braces += 1,
            Kind::Structural(b'}') => self.braces -= 1,
            Kind::Structural(b'[') => self.brackets += 1,
            Kind::Structural(b']') => self.brackets -= 1,
            _ => {}
        }
        self.token_count += 1;
        self.token_bytes += token.text.len() + 1;
        if let Some(limit) = self.exceeded_limit() {
            *self = Self::default();
            return Some(Err(Error::generic(format!("JSON {limit} limit exceeded"))));
        }
        if self.error.is_none()
            && let Err(error) = self.place(token)
        {
            self.open.clear();
            self.error = Some(error);
        }
        let is_open = self.braces > 0 || self.brackets > 0;
        if is_open && self.braces >= 0 && self.brackets >= 0 {
            return None;
        }
        let done = std::mem::take(self);
        match (done.error, done.complete) {
            (Some(error), _) => Some(Err(error)),
            (None, value) => value.map(Ok),
        }
    }

    fn exceeded_limit(&self) -> Option<&'static str> {
        if self.token_bytes > MAX_TOKEN_SIZE {
            return Some("token size");
        }
        if self.token_count > MAX_TOKEN_COUNT {
            return Some("token count");
        }
        let nesting = self.braces.saturating_add(self.brackets);
        (nesting > MAX_NESTING.cast_signed()).then_some("nesting depth")
    }

    /// Puts a token where it belongs, if it belongs there.
    fn place(&mut self, token: Token) -> Result<(), Error> {
        match (self.open.last_mut(), token.kind) {
            (Some(Open::List { next, .. }), Kind::Structural(b']'))
                if *next != NextInList::Value =>
            {
                self.close()
            }
            (Some(Open::List { next, .. }), kind) if *next == NextInList::SeparatorOrEnd => {
                if kind != Kind::Structural(b',') {
                    return Err(syntax("expected separator in list"));
                }
                *next = NextInList::Value;
                Ok(())
            }
            (Some(Open::Object { next, .. }), Kind::Structural(b'}'))
                if matches!(*next, NextInObject::KeyOrEnd | NextInObject::SeparatorOrEnd) =>
            {
                self.close()
            }
            (Some(Open::Object { next, .. }), kind) if *next == NextInObject::SeparatorOrEnd => {
                if kind != Kind::Structural(b',') {
                    return Err(syntax("expected separator in dict"));
                }
                *next = NextInObject::Key;
                Ok(())
            }
            (Some(Open::Object { next, .. }), kind) if *next == NextInObject::Colon => {
                if kind != Kind::Structural(b':') {
                    return Err(syntax("missing : in object pair"));
                }
                *next = NextInObject::Value;
                Ok(())
            }
            _ => self.begin(token),
        }
    }

    /// Begins a value: a scalar, a list or an object.
    fn begin(&mut self, token: Token) -> Result<(), Error> {
        match token.kind {
            Kind::Structural(b'[') => self.open.push(Open::List {
                values: Vec::new(),
                next: NextInList::ValueOrEnd,
            }),
            Kind::Structural(b'{') => self.open.push(Open::Object {
                members: Map::new(),
                key: String::new(),
                next: NextInObject::KeyOrEnd,
            }),
            _ => return self.add(scalar(&token)?),
        }
        Ok(())
    }

    /// Ends the innermost list or object and adds it to the one around it.
    fn close(&mut self) -> Result<(), Error> {
        match self.open.pop() {
            Some(Open::List { values, .. }) => self.add(Value::Array(values)),
            Some(Open::Object { members, .. }) => self.add(Value::Object(members)),
            None => Err(syntax("expecting value")),
        }
    }

    /// Adds a value to the innermost list or object.
    fn add(&mut self, value: Value) -> Result<(), Error> {
        match self.open.last_mut() {
            None => self.complete = Some(value),
            Some(Open::List { values, next }) => {
                values.push(value);
                *next = NextInList::SeparatorOrEnd;
            }
            Some(Open::Object { members, key, next }) if *next == NextInObject::Value => {
                if members.insert(std::mem::take(key), value).is_some() {
                    return Err(syntax("duplicate key"));
                }
                *next = NextInObject::SeparatorOrEnd;
            }
            Some(Open::Object { key, next, .. }) => {
                let Value::String(text) = value else {
                    return Err(syntax("key is not a string in object"));
                };
                *key = text;
                *next = NextInObject::Colon;
            }
        }
        Ok(())
    }
}

fn scalar(token: &Token) -> Result<Value, Error> {
    match (token.kind, token.text.as_slice()) {
        (Kind::Keyword, b"null") => Ok(Value::Null),
        (Kind::Keyword, b"true") => Ok(Value::Bool(true)),
        (Kind::Keyword, b"false") => Ok(Value::Bool(false)),
        (Kind::Keyword, word) => Err(syntax(format!("invalid keyword '{}'", printable(word)))),
        (Kind::String, quoted) => string::unquote(quoted).map(Value::String),
        (Kind::Number, digits) => (str::from_utf8(digits).ok())
            .and_then(|digits| digits.parse::<Number>().ok())
            .map(Value::Number)
            .ok_or_else(|| syntax("expecting value")),
        (Kind::Structural(_) | Kind::Stray, _) => Err(syntax("expecting value")),
    }
}

/// The error of a text that is no JSON.
pub(super) fn syntax(what: impl std::fmt::Display) -> Error {
    Error::generic(format!("JSON parse error, {what}"))
}

/// Bytes as they appear in a message: up to the first NUL, invalid sequences replaced.
fn printable(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    let end = bytes.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(bytes.get(..end.unwrap_or(bytes.len())).unwrap_or(bytes))
}
