//! Keyval, the command line's way to write a structure: `driver=raw,file.driver=file`.
//!
//! ```text
//! parameters = [ parameter { "," parameter } [ "," ] ]
//! parameter  = key "=" value | "help" | "?"
//! key        = fragment { "." fragment }
//! fragment   = name | index
//! value      = any text, with "," written ",,"
//! ```
//!
//! Where an option has an implied key, the first parameter may be a value alone, without `,` or `=`.
//! A later value for the same key replaces an earlier one. Keys that share a prefix are members of
//! one object, or elements of one list if all of them are indexes. All scalars are strings; the
//! decoder reads them as what they should be.

use serde_json::{Map, Value};

use crate::error::Error;
use crate::opts::split_value;
use crate::visitor::MAX_DEPTH;

/// The longest fragment of a key, in bytes.
const MAX_FRAGMENT: usize = 127;

/// What a parameter text says.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// The structure, with strings for scalars.
    pub value: Value,
    /// Whether `help` or `?` was among the parameters.
    pub help: bool,
}

/// Reads a parameter text.
///
/// # Errors
/// It is not well-formed, or its keys contradict each other.
pub fn parse(text: &str, implied_key: Option<&str>) -> Result<Parameters, Error> {
    let mut tree = Map::new();
    let mut help = false;
    let mut rest = text;
    let mut implied_key = implied_key;
    while !rest.is_empty() {
        let (key, after_key) = rest.split_at(rest.find(['=', ',']).unwrap_or(rest.len()));
        let implied = implied_key.take();
        if let Some(after) = after_key.strip_prefix('=') {
            let (value, after_value) = split_value(after);
            insert(&mut tree, key, value)?;
            rest = after_value;
        } else {
            rest = after_key.strip_prefix(',').unwrap_or(after_key);
            match implied {
                _ if key == "help" || key == "?" => help = true,
                Some(implied) if !key.is_empty() => insert(&mut tree, implied, key.to_owned())?,
                _ => {
                    fragments(key)?;
                    return Err(Error::generic(format!(
                        "Expected '=' after parameter '{key}'"
                    )));
                }
            }
        }
    }
    Ok(Parameters {
        value: listify("", tree)?,
        help,
    })
}

/// Splits a key into its fragments.
fn fragments(key: &str) -> Result<Vec<&str>, Error> {
    let mut fragments = Vec::new();
    let mut rest = key;
    loop {
        let length = fragment_length(rest);
        let (fragment, after) = rest.split_at(length);
        let next = after.strip_prefix('.');
        let is_index = fragment.starts_with(|first: char| first.is_ascii_digit());
        let root_index = is_index && fragments.is_empty();
        if length == 0 || root_index || (next.is_none() && !after.is_empty()) {
            return Err(Error::generic(format!("Invalid parameter '{key}'")));
        }
        if fragments.len() > MAX_DEPTH {
            return Err(Error::generic(format!(
                "Parameter '{key}' is nested too deeply"
            )));
        }
        if length > MAX_FRAGMENT {
            let whole = fragment.len() == key.len();
            let what = if whole {
                "Parameter"
            } else {
                "Parameter fragment"
            };
            return Err(Error::generic(format!("{what} '{fragment}' is too long")));
        }
        fragments.push(fragment);
        match next {
            Some(next) => rest = next,
            None => return Ok(fragments),
        }
    }
}

/// The length of the index or name at the start of the text; 0 if there is none.
fn fragment_length(text: &str) -> usize {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    if digits > 0 {
        return digits;
    }
    let vendor = vendor_prefix_length(text);
    let name = text.bytes().skip(vendor);
    let is_inner = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    match name.clone().next() {
        Some(first) if first.is_ascii_alphabetic() => vendor + name.take_while(is_inner).count(),
        _ => 0,
    }
}

/// The length of a downstream extension's `__RFQDN_`, which may contain dots.
fn vendor_prefix_length(text: &str) -> usize {
    let Some(after) = text.strip_prefix("__") else {
        return 0;
    };
    let is_domain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
    let domain = after.bytes().take_while(is_domain).count();
    match after.as_bytes().get(domain) {
        Some(b'_') if domain > 0 => 2 + domain + 1,
        _ => 0,
    }
}

/// Puts a value into the tree of objects.
fn insert(tree: &mut Map<String, Value>, key: &str, value: String) -> Result<(), Error> {
    let fragments = fragments(key)?;
    let (last, parents) = fragments.split_last().expect("a key has a fragment");
    let mut prefix = 0;
    let mut inconsistent = |fragment: &str| {
        prefix += fragment.len();
        let name = key.get(..prefix).unwrap_or(key);
        prefix += 1;
        Error::generic(format!("Parameters '{name}.*' used inconsistently"))
    };
    let mut object = tree;
    for fragment in parents {
        let error = inconsistent(fragment);
        let child = object
            .entry(*fragment)
            .or_insert_with(|| Value::Object(Map::new()));
        let Value::Object(members) = child else {
            return Err(error);
        };
        object = members;
    }
    match object.insert((*last).to_owned(), Value::String(value)) {
        Some(Value::Object(_)) => Err(inconsistent(last)),
        _ => Ok(()),
    }
}

/// Turns the objects whose members are all indexes into lists, from the leaves up.
///
/// `prefix` is the key of the object with a dot after it, or empty at the root.
fn listify(prefix: &str, members: Map<String, Value>) -> Result<Value, Error> {
    let mut object = Map::new();
    let mut list = Vec::new();
    for (name, value) in members {
        let value = match value {
            Value::Object(members) => listify(&format!("{prefix}{name}."), members)?,
            scalar => scalar,
        };
        if name.starts_with(|first: char| first.is_ascii_digit()) {
            list.push((name.parse().unwrap_or(usize::MAX), value));
        } else {
            object.insert(name, value);
        }
    }
    if list.is_empty() {
        return Ok(Value::Object(object));
    }
    if !object.is_empty() {
        return Err(Error::generic(format!(
            "Parameters '{prefix}*' used inconsistently"
        )));
    }
    // Spellings such as 0 and 00 mean the same element; the first one wins.
    list.sort_by_key(|(index, _)| *index);
    list.dedup_by_key(|(index, _)| *index);
    let mut elements = Vec::new();
    for (index, value) in list {
        if index != elements.len() {
            return Err(Error::generic(format!(
                "Parameter '{prefix}{}' missing",
                elements.len()
            )));
        }
        elements.push(value);
    }
    Ok(Value::Array(elements))
}
