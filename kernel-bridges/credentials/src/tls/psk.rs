//! Keys that both sides have been given beforehand, each with the name of the user whose it is.
//!
//! A file has one line `NAME:KEY` for each, the key in hexadecimal, as GnuTLS's `psktool` writes it.

use std::fs;

use stord_qmp::Error;
use stord_qmp::schema::object::QCryptoTLSCredsEndpoint as Endpoint;
use stord_qmp::schema::object::TlsCredsPskProperties;
use zeroize::Zeroizing;

use super::Directory;

/// The user whose key a client takes if it is not told.
const DEFAULT_USER: &str = "qemu";

/// Keys by the names of their users.
pub struct Keys {
    lines: Zeroizing<String>,
    /// The user that a client is.
    user: String,
}

impl Keys {
    /// Reads the file. Blocks.
    ///
    /// # Errors
    /// There is no such file, or nothing for the client's user in it.
    pub fn load(properties: &TlsCredsPskProperties) -> Result<Self, Error> {
        let endpoint = properties.common.endpoint.unwrap_or(Endpoint::Client);
        if endpoint == Endpoint::Server && properties.username.is_some() {
            return Err(Error::generic(
                "username should not be set when endpoint=server",
            ));
        }
        let path = Directory::of(&properties.common).required("keys.psk")?;
        let lines = fs::read_to_string(&path).map_err(|error| {
            let reason = Error::reason(&error);
            Error::generic(format!(
                "Failed to open file \u{201c}{path}\u{201d}: {reason}"
            ))
            .with_source(error)
        })?;
        let user = properties.username.as_deref().unwrap_or(DEFAULT_USER);
        let keys = Self {
            lines: Zeroizing::new(lines),
            user: user.to_owned(),
        };
        if endpoint == Endpoint::Client {
            let key = keys.line(user).ok_or_else(|| {
                Error::generic(format!("Username {user} not found in PSK file {path}"))
            })?;
            if decode(key).is_none() {
                return Err(Error::generic(
                    "Cannot set PSK client credentials: Error in parsing.",
                ));
            }
        }
        Ok(keys)
    }

    /// The user that a client is.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The key of a user.
    pub fn key(&self, user: &str) -> Option<Zeroizing<Vec<u8>>> {
        self.line(user).and_then(decode)
    }

    fn line(&self, user: &str) -> Option<&str> {
        let mut lines = self.lines.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(name, _)| *name == user).map(|(_, key)| key)
    }
}

/// A key from its hexadecimal digits; none if there is no byte, or something else.
fn decode(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let text = text.trim_end();
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        return None;
    };
    let byte = |pair: &[u8; 2]| {
        let text = std::str::from_utf8(pair).ok()?;
        (!text.starts_with('+')).then(|| u8::from_str_radix(text, 16).ok())?
    };
    let key: Option<Vec<u8>> = pairs.iter().map(byte).collect();
    key.filter(|key| !key.is_empty()).map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_by_user() {
        let keys = Keys {
            lines: Zeroizing::new("a:00ff\nhallo\nb:0g\nc:\nd:+1\n#x\n".to_owned()),
            user: "a".to_owned(),
        };
        assert_eq!(keys.key("a").as_deref(), Some(&vec![0, 255]));
        for user in ["b", "c", "d", "hallo", "", "A"] {
            assert_eq!(keys.key(user), None, "{user}");
        }
    }
}
