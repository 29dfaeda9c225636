//! Splits bytes into tokens, one byte at a time, and finds its way back after an error: bytes are
//! skipped up to the next structural character, line end, or byte that no text contains.

use std::mem;

/// The most bytes one token may have; longer ones are cut off as errors.
pub const MAX_TOKEN_SIZE: usize = 64 << 20;

/// What bytes were found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One of `{ } [ ] : ,`.
    Structural(u8),
    /// A string with its quotes, escapes unread.
    String,
    /// A number.
    Number,
    /// Lower-case letters, perhaps a keyword.
    Keyword,
    /// Bytes that are no token.
    Stray,
}

/// A token and its bytes.
#[derive(Debug)]
pub struct Token {
    pub kind: Kind,
    pub text: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    /// After an error.
    Recovery,
    /// In a string that ends with this quote.
    String(u8),
    /// After a backslash in such a string.
    Escape(u8),
    Keyword,
    /// After `-`.
    Sign,
    /// After a leading `0`.
    Zero,
    Digits,
    /// After `.`, before a digit.
    Point,
    Fraction,
    /// After `e`.
    Exponent,
    /// After `e` and a sign.
    ExponentSign,
    ExponentDigits,
}

/// What a byte means in a state.
enum Step {
    /// It is skipped.
    Skip(State),
    /// It is part of the token.
    Take(State),
    /// It completes the token.
    End(Kind),
    /// The token was complete before it; look at it again.
    Before(Kind),
    /// There is no token here after all; look at it again.
    Again,
    /// It makes the token an error.
    Bad,
}

/// The tokens of a stream.
#[derive(Debug, Default)]
pub struct Lexer {
    state: State,
    text: Vec<u8>,
}

impl Lexer {
    /// Takes a byte and hands the tokens it completes, at most two, to `emit`.
    pub fn feed(&mut self, byte: u8, emit: &mut impl FnMut(Token)) {
        loop {
            match step(self.state, byte) {
                Step::Skip(state) => self.state = state,
                Step::Take(state) => {
                    self.text.push(byte);
                    self.state = state;
                    if self.text.len() > MAX_TOKEN_SIZE {
                        self.emit(Kind::Stray, State::Recovery, emit);
                    }
                }
                Step::End(kind) => {
                    self.text.push(byte);
                    self.emit(kind, State::Start, emit);
                }
                Step::Before(kind) => {
                    self.emit(kind, State::Start, emit);
                    continue;
                }
                Step::Again => {
                    self.state = State::Start;
                    continue;
                }
                Step::Bad => {
                    self.text.push(byte);
                    self.emit(Kind::Stray, State::Recovery, emit);
                }
            }
            return;
        }
    }

    /// Ends the stream: what has begun is a token or an error.
    pub fn finish(&mut self, emit: &mut impl FnMut(Token)) {
        match (self.state, step(self.state, b'\n')) {
            (State::Start | State::Recovery, _) => self.state = State::Start,
            (_, Step::Before(kind)) => self.emit(kind, State::Start, emit),
            _ => self.emit(Kind::Stray, State::Start, emit),
        }
    }

    fn emit(&mut self, kind: Kind, next: State, emit: &mut impl FnMut(Token)) {
        self.state = next;
        emit(Token {
            kind,
            text: mem::take(&mut self.text),
        });
    }
}

fn step(state: State, byte: u8) -> Step {
    match (state, byte) {
        (State::Start, b' ' | b'\t' | b'\r' | b'\n') => Step::Skip(State::Start),
        (State::Start, b'{' | b'}' | b'[' | b']' | b':' | b',') => {
            Step::End(Kind::Structural(byte))
        }
        (State::Start, b'"' | b'\'') => Step::Take(State::String(byte)),
        (State::Start, b'-') => Step::Take(State::Sign),
        (State::Start | State::Sign, b'0') => Step::Take(State::Zero),
        (State::Start | State::Sign, b'1'..=b'9') => Step::Take(State::Digits),
        (State::Start, b'a'..=b'z') => Step::Take(State::Keyword),
        (State::Start, _) => Step::Bad,

        (State::Recovery, b'\t') => Step::Skip(State::Recovery),
        (State::Recovery, b'{' | b'}' | b'[' | b']' | b':' | b',') => Step::Again,
        (State::Recovery, 0..0x20 | 0xfe..) => Step::Again,
        (State::Recovery, _) => Step::Skip(State::Recovery),

        (State::String(quote), _) if byte == quote => Step::End(Kind::String),
        (State::String(quote), b'\\') => Step::Take(State::Escape(quote)),
        (State::String(quote) | State::Escape(quote), 0x20..0xfe) => {
            Step::Take(State::String(quote))
        }
        (State::String(_) | State::Escape(_), _) => Step::Bad,

        (State::Keyword, b'a'..=b'z') => Step::Take(State::Keyword),
        (State::Keyword, _) => Step::Before(Kind::Keyword),

        (State::Zero, b'0'..=b'9') => Step::Bad,
        (State::Digits, b'0'..=b'9') => Step::Take(State::Digits),
        (State::Zero | State::Digits, b'.') => Step::Take(State::Point),
        (State::Point | State::Fraction, b'0'..=b'9') => Step::Take(State::Fraction),
        (State::Zero | State::Digits | State::Fraction, b'e' | b'E') => Step::Take(State::Exponent),
        (State::Exponent, b'+' | b'-') => Step::Take(State::ExponentSign),
        (State::Exponent | State::ExponentSign | State::ExponentDigits, b'0'..=b'9') => {
            Step::Take(State::ExponentDigits)
        }
        (State::Zero | State::Digits | State::Fraction | State::ExponentDigits, _) => {
            Step::Before(Kind::Number)
        }
        (State::Sign | State::Point | State::Exponent | State::ExponentSign, _) => Step::Bad,
    }
}
