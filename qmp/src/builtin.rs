//! The built-in types of the schema: integers of all widths, sizes, booleans, strings, null, any,
//! lists and optional members, each read from JSON as its own type and from keyval text by parsing.
//!
//! Integers keep two habits of the reference that clients may lean on: a `u64` takes a negative
//! JSON number or text as its two's complement, and integers in text may be hexadecimal or octal.

use serde_json::{Map, Value};

use crate::error::Error;
use crate::introspect::{Introspection, ObjectShape};
use crate::schema::introspect::JsonType;
use crate::visitor::{Input, Kind, Members, Object, Qapi, Scalar};

/// A number of bytes, written in keyval text with an optional unit such as `k` or `G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl From<Size> for u64 {
    fn from(size: Size) -> Self {
        size.0
    }
}

impl Qapi for Size {
    const KIND: Kind = Kind::Number;

    fn decode(input: Input<'_>) -> Result<Self, Error> {
        match input.scalar()? {
            Scalar::Typed(_) => decode_u64(&input).map(Size),
            Scalar::Text(text) => parse_size(text)
                .map(Size)
                .ok_or_else(|| input.expects("size")),
        }
    }

    fn encode(&self) -> Value {
        self.0.into()
    }

    fn introspect(schema: &mut Introspection) -> String {
        schema.builtin("int", JsonType::Int)
    }
}

impl Qapi for bool {
    const KIND: Kind = Kind::Bool;

    fn decode(input: Input<'_>) -> Result<Self, Error> {
        match input.scalar()? {
            Scalar::Typed(Value::Bool(value)) => Ok(*value),
            Scalar::Typed(_) => Err(input.wrong_type("boolean")),
            Scalar::Text(text) => parse_bool(text).ok_or_else(|| input.expects("'on' or 'off'")),
        }
    }

    fn encode(&self) -> Value {
        (*self).into()
    }

    fn introspect(schema: &mut Introspection) -> String {
        schema.builtin("bool", JsonType::Boolean)
    }
}

impl Qapi for String {
    const KIND: Kind = Kind::String;

    fn decode(input: Input<'_>) -> Result<Self, Error> {
        input.into_string()
    }

    fn encode(&self) -> Value {
        self.as_str().into()
    }

    fn introspect(schema: &mut Introspection) -> String {
        schema.builtin("str", JsonType::String)
    }
}

impl Qapi for f64 {
    const KIND: Kind = Kind::Number;

    fn decode(input: Input<'_>) -> Result<Self, Error> {
        match input.scalar()? {
            Scalar::Typed(Value::Number(number)) => {
                number.as_f64().ok_or_else(|| input.wrong_type("number"))
            }
            Scalar::Typed(_) => Err(input.wrong_type("number")),
            Scalar::Text(text) => (text.parse().ok())
                .filter(|number: &f64| number.is_finite())
                .ok_or_else(|| input.expects("number")),
        }
    }

    fn encode(&self) -> Value {
        (*self).into()
    }

    fn introspect(schema: &mut Introspection) -> String {
        schema.builtin("number", JsonType::Number)
    }
}

/// Any JSON value.
impl Qapi for Value {
    const KIND: Kind = Kind::Any;

    fn decode(input: Input<'_>) -> Result<Self, Error> {
        Ok(input.into_value())
    }

    fn encode(&self) -> Value {
        self.clone()
    }

    fn introspect(schema: &mut Introspection) -> String {
        schema.builtin("any", JsonType::Value)
    }
}

/// The JSON `null`, as a branch of an alternate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Null;

impl Qapi for Null {
    const KIND: Kind = Kind::Null;

    fn decode(input: Input<'_>) -> Result<Self, Error> {
        match input.scalar()? {
            Scalar::Typed(Value::Null) | Scalar::Text("") => Ok(Null),
            _ => Err(input.wrong_type("null")),
        }
    }

    fn encode(&self) -> Value {
        Value::Null
    }

    fn introspect(schema: &mut Introspection) -> String {
        schema.builtin("null", JsonType::Null)
    }
}

/// The object without members: no arguments, or nothing to return.
impl Qapi for () {
    const KIND: Kind = Kind::Object;

    fn decode(input: Input<'_>) -> Result<Self, Error> {
        input.object()
    }

    fn encode(&self) -> Value {
        Value::Object(Map::new())
    }

    fn introspect(schema: &mut Introspection) -> String {
        schema.object::<Self>(&[])
    }
}

impl Object for () {
    fn decode_members(_: &mut Members<'_>) -> Result<Self, Error> {
        Ok(())
    }

    fn encode_members(&self, _: &mut Map<String, Value>) {}

    fn describe(_: &mut Introspection, _: &mut ObjectShape) {}
}

impl<T: Qapi> Qapi for Vec<T> {
    const KIND: Kind = Kind::Array;

    fn decode(input: Input<'_>) -> Result<Self, Error> {
        input.elements()
    }

    fn encode(&self) -> Value {
        Value::Array(self.iter().map(T::encode).collect())
    }

    fn introspect(schema: &mut Introspection) -> String {
        schema.array::<T>()
    }
}

/// An optional member. An explicit `null` is not the same as leaving it out, and refused.
impl<T: Qapi> Qapi for Option<T> {
    const OPTIONAL: bool = true;
    const KIND: Kind = T::KIND;

    fn decode(input: Input<'_>) -> Result<Self, Error> {
        T::decode(input).map(Some)
    }

    fn absent() -> Option<Self> {
        Some(None)
    }

    fn encode(&self) -> Value {
        self.as_ref().map_or(Value::Null, T::encode)
    }

    fn is_absent(&self) -> bool {
        self.is_none()
    }

    fn introspect(schema: &mut Introspection) -> String {
        T::introspect(schema)
    }
}

impl<T: Qapi> Qapi for Box<T> {
    const KIND: Kind = T::KIND;

    fn decode(input: Input<'_>) -> Result<Self, Error> {
        T::decode(input).map(Box::new)
    }

    fn encode(&self) -> Value {
        T::encode(self)
    }

    fn introspect(schema: &mut Introspection) -> String {
        T::introspect(schema)
    }
}

impl<T: Object> Object for Box<T> {
    fn decode_members(members: &mut Members<'_>) -> Result<Self, Error> {
        T::decode_members(members).map(Box::new)
    }

    fn encode_members(&self, members: &mut Map<String, Value>) {
        T::encode_members(self, members);
    }

    fn describe(schema: &mut Introspection, shape: &mut ObjectShape) {
        T::describe(schema, shape);
    }
}

fn decode_i64(input: &Input<'_>) -> Result<i64, Error> {
    match input.scalar()? {
        Scalar::Typed(value) => value.as_i64().ok_or_else(|| input.wrong_type("integer")),
        Scalar::Text(text) => (parse_integer(text).and_then(|value| value.try_into().ok()))
            .ok_or_else(|| input.expects("integer")),
    }
}

fn decode_u64(input: &Input<'_>) -> Result<u64, Error> {
    match input.scalar()? {
        Scalar::Typed(value) => (value.as_u64())
            .or_else(|| value.as_i64().map(i64::cast_unsigned))
            .ok_or_else(|| input.expects("uint64")),
        Scalar::Text(text) => parse_u64(text).ok_or_else(|| input.expects("integer")),
    }
}

macro_rules! integers {
    ($($type:ty, $wide:ident, $name:literal;)*) => {$(
        impl Qapi for $type {
            const KIND: Kind = Kind::Number;

            fn decode(input: Input<'_>) -> Result<Self, Error> {
                Self::try_from($wide(&input)?).map_err(|_| input.out_of_range($name))
            }

            fn encode(&self) -> Value {
                (*self).into()
            }

            fn introspect(schema: &mut Introspection) -> String {
                schema.builtin("int", JsonType::Int)
            }
        }
    )*};
}

integers! {
    i8, decode_i64, "int8_t";
    i16, decode_i64, "int16_t";
    i32, decode_i64, "int32_t";
    i64, decode_i64, "int64_t";
    u8, decode_u64, "uint8_t";
    u16, decode_u64, "uint16_t";
    u32, decode_u64, "uint32_t";
    u64, decode_u64, "uint64_t";
}

/// Reads the words for true and false.
pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// Reads an unsigned integer; a negative one is its two's complement.
pub(crate) fn parse_u64(text: &str) -> Option<u64> {
    let value = parse_integer(text)?;
    let magnitude = u64::try_from(value.unsigned_abs()).ok()?;
    Some(if value < 0 {
        magnitude.wrapping_neg()
    } else {
        magnitude
    })
}

/// Reads an integer as C's `strtoll` with base 0 does: blanks, a sign, `0x` or a leading zero.
fn parse_integer(text: &str) -> Option<i128> {
    let text = trim_blanks(text);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let magnitude = parse_magnitude(digits)?;
    Some(if negative { -magnitude } else { magnitude })
}

fn parse_magnitude(text: &str) -> Option<i128> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(rest) => (rest, 16),
        None if text.len() > 1 && text.starts_with('0') => (text, 8),
        None => (text, 10),
    };
    // from_str_radix would take a sign of its own.
    if digits.starts_with(['+', '-']) {
        return None;
    }
    i128::from_str_radix(digits, radix).ok()
}

/// Reads a size in bytes: decimal with an optional fraction and unit, or hexadecimal without either.
///
/// A fraction needs a unit to be a fraction of. It is rounded to the nearest byte.
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    let text = trim_blanks(text);
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16)
            .ok()
            .filter(|_| !digits.starts_with('+'));
    }
    let number = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let shift = match text.strip_prefix(number) {
        Some("") | None => 0,
        Some(unit) => unit_shift(unit)?,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if shift == 0 && fraction.bytes().any(|digit| digit != b'0') {
        return None;
    }
    let is_digits = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_digits(whole) || !is_digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    let bytes = whole.checked_mul(1 << shift)?;
    bytes.checked_add(fraction_of(fraction, shift))
}

/// `0.digits` of `1 << shift` bytes, to the nearest byte.
fn fraction_of(digits: &str, shift: u32) -> u64 {
    // Eighteen digits are finer than a byte of an exbibyte, and keep the product inside 128 bits.
    let digits: Vec<u8> = digits.bytes().take(18).collect();
    let numerator = (digits.iter()).fold(0u128, |sum, digit| sum * 10 + u128::from(digit - b'0'));
    let denominator = digits.iter().fold(1u128, |product, _| product * 10);
    let rounded = ((numerator << shift) + denominator / 2) / denominator;
    u64::try_from(rounded).expect("a fraction of a power of two up to 2^60 fits 64 bits")
}

/// The power of two that a unit stands for.
fn unit_shift(unit: &str) -> Option<u32> {
    match unit {
        "b" | "B" => Some(0),
        "k" | "K" => Some(10),
        "m" | "M" => Some(20),
        "g" | "G" => Some(30),
        "t" | "T" => Some(40),
        "p" | "P" => Some(50),
        "e" | "E" => Some(60),
        _ => None,
    }
}

fn trim_blanks(text: &str) -> &str {
    text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r'])
}
