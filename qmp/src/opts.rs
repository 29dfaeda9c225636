//! The older option syntax of the command line, still that of `--chardev`: flat `key=value` pairs,
//! the first of which may be a value alone, and flags: `server` for `server=on`, `nowait` for
//! `wait=off`.
//!
//! Taking an option removes it, and [`Opts::finish`] refuses what nobody has taken, so no option is
//! accepted and ignored. Of repeated options the last counts, but of `id` the first.

use crate::builtin::parse_bool;
use crate::error::Error;
use crate::identifier;

/// The options of one command line argument.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opts {
    /// The id, if there is one.
    pub id: Option<String>,
    /// Whether `help` or `?` was among the options.
    pub help: bool,
    /// What to tell the user about the spelling, one text per line.
    pub warnings: Vec<String>,
    values: Vec<(String, String)>,
}

impl Opts {
    /// Reads options, of which the first is named `implied_key` if it is a value alone.
    ///
    /// # Errors
    /// The id is no identifier, or a name is empty.
    pub fn parse(text: &str, implied_key: &str) -> Result<Self, Error> {
        let mut opts = Self::default();
        let mut rest = text;
        let mut first = true;
        while !rest.is_empty() {
            let (word, after) = rest.split_at(rest.find(['=', ',']).unwrap_or(rest.len()));
            let is_value_alone = first && !after.starts_with('=');
            first = false;
            if let Some(after) = after.strip_prefix('=') {
                let (value, after) = split_value(after);
                opts.insert(word, value)?;
                rest = after;
            } else if word == "help" || word == "?" {
                opts.help = true;
                rest = after.strip_prefix(',').unwrap_or(after);
            } else if is_value_alone {
                let (value, after) = split_value(rest);
                opts.insert(implied_key, value)?;
                rest = after;
            } else {
                opts.insert_flag(word)?;
                rest = after.strip_prefix(',').unwrap_or(after);
            }
        }
        Ok(opts)
    }

    /// Takes an option.
    pub fn take(&mut self, name: &str) -> Option<String> {
        let mut taken = None;
        self.values.retain_mut(|(key, value)| {
            let matches = key == name;
            if matches {
                taken = Some(std::mem::take(value));
            }
            !matches
        });
        taken
    }

    /// Takes a boolean option.
    ///
    /// # Errors
    /// Its value is no boolean.
    pub fn take_bool(&mut self, name: &str) -> Result<Option<bool>, Error> {
        let parse = |text: String| {
            parse_bool(&text)
                .ok_or_else(|| Error::generic(format!("Parameter '{name}' expects 'on' or 'off'")))
        };
        self.take(name).map(parse).transpose()
    }

    /// Takes a numeric option.
    ///
    /// # Errors
    /// Its value is no number, or too large for a `T`.
    pub fn take_number<T: TryFrom<u64>>(&mut self, name: &str) -> Result<Option<T>, Error> {
        let parse = |text: String| {
            let number = crate::builtin::parse_u64(&text);
            (number.and_then(|number| T::try_from(number).ok()))
                .ok_or_else(|| Error::generic(format!("Parameter '{name}' expects a number")))
        };
        self.take(name).map(parse).transpose()
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// An option is left that nobody has taken.
    pub fn finish(self) -> Result<(), Error> {
        match self.values.first() {
            None => Ok(()),
            Some((name, _)) => Err(Error::generic(format!("Invalid parameter '{name}'"))),
        }
    }

    fn insert(&mut self, name: &str, value: String) -> Result<(), Error> {
        if name.is_empty() {
            return Err(Error::generic("Invalid parameter ''"));
        }
        if name != "id" {
            self.values.push((name.to_owned(), value));
        } else if self.id.is_none() {
            identifier::check("id", &value)?;
            self.id = Some(value);
        }
        Ok(())
    }

    fn insert_flag(&mut self, flag: &str) -> Result<(), Error> {
        // `nodelay` is a name of its own, and `delay` its opposite.
        let (name, on) = match (flag, flag.strip_prefix("no")) {
            ("nodelay", _) => ("nodelay", true),
            ("delay", _) => ("nodelay", false),
            (_, Some(name)) => (name, false),
            (name, None) => (name, true),
        };
        let value = if on { "on" } else { "off" };
        self.warnings.push(format!(
            "short-form boolean option '{flag}' deprecated\nPlease use {name}={value} instead"
        ));
        self.insert(name, value.to_owned())
    }
}

/// Splits a value off the text, `,,` in it standing for a comma.
pub(crate) fn split_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let (plain, comma) = rest.split_at(rest.find(',').unwrap_or(rest.len()));
        value.push_str(plain);
        match comma.strip_prefix(",,") {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, comma.strip_prefix(',').unwrap_or(comma)),
        }
    }
}
