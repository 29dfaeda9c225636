//! Secrets: bytes given in the open, or encrypted with AES-256 in CBC mode under another secret.
//! They are wiped when the last user is gone.
//!
//! Given are, in this order of undoing: the source's bytes; base64 around them if the format says
//! so; the encryption, of base64-decoded bytes, if there is a key. Padding is PKCS#7, of which only
//! the count in the last byte is looked at, as in the reference.

use std::fs::File;
use std::io::{self, Read};

use aes::cipher::{BlockModeDecrypt, KeyIvInit};
use linux_keyutils::{Key, KeyError, KeySerialId};
use nix::errno::Errno;
use stord_qmp::schema::object::QCryptoSecretFormat;
use stord_qmp::{Error, base64};
use zeroize::{Zeroize, Zeroizing};

use crate::Credentials;

const KEY_SIZE: usize = 32;
const BLOCK_SIZE: usize = 16;

/// Bytes to be kept secret.
pub struct Secret(Zeroizing<Vec<u8>>);

/// Where a secret's bytes come from.
pub enum Source<'a> {
    /// The text itself.
    Data(&'a str),
    /// A file's content.
    File(&'a str),
    /// The payload of a key in the kernel's keyrings.
    Key(i32),
}

/// How a secret's bytes are to be read.
#[derive(Clone, Copy, Default)]
pub struct Encoding<'a> {
    /// Whether they are in base64; default as they are.
    pub format: Option<QCryptoSecretFormat>,
    /// The id of the secret they are encrypted under.
    pub key: Option<&'a str>,
    /// The initialization vector, in base64.
    pub iv: Option<&'a str>,
}

impl Secret {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Reads a secret. Blocks while a file is read.
    ///
    /// # Errors
    /// The source cannot be read, or is not as the encoding says.
    pub fn load(
        source: &Source<'_>,
        encoding: Encoding<'_>,
        credentials: &Credentials,
    ) -> Result<Self, Error> {
        let raw = source.read()?;
        let is_base64 = encoding.format == Some(QCryptoSecretFormat::Base64);
        let decode = |raw: Zeroizing<Vec<u8>>| match is_base64 {
            false => Ok(raw),
            true => decode_base64(&raw),
        };
        let bytes = match encoding.key {
            None => decode(raw)?,
            Some(id) => {
                let key = credentials.secret(id)?;
                if key.bytes().len() != KEY_SIZE {
                    let message = format!("Key should be {KEY_SIZE} bytes in length");
                    return Err(Error::generic(message));
                }
                let iv = decode_iv(encoding.iv)?;
                decrypt(key.bytes(), &iv, decode(raw)?)?
            }
        };
        Ok(Self(bytes))
    }
}

impl Source<'_> {
    fn read(&self) -> Result<Zeroizing<Vec<u8>>, Error> {
        match *self {
            Self::Data(text) => Ok(Zeroizing::new(text.as_bytes().to_vec())),
            Self::File(path) => read_file(path),
            Self::Key(serial) => read_key(serial),
        }
    }
}

fn read_file(path: &str) -> Result<Zeroizing<Vec<u8>>, Error> {
    let failed = |what: &str, error: io::Error| {
        let reason = Error::reason(&error);
        Error::generic(format!(
            "Unable to read {path}: {what} file \u{201c}{path}\u{201d}: {reason}"
        ))
        .with_source(error)
    };
    let mut file = File::open(path).map_err(|error| failed("Failed to open", error))?;
    let mut content = Zeroizing::new(Vec::new());
    file.read_to_end(&mut content)
        .map_err(|error| failed("Error reading", error))?;
    Ok(content)
}

fn read_key(serial: i32) -> Result<Zeroizing<Vec<u8>>, Error> {
    if serial == 0 {
        return Err(Error::generic("'serial' should not be equal to 0"));
    }
    let payload = Key::from_id(KeySerialId(serial)).read_to_vec();
    payload.map(Zeroizing::new).map_err(|error| {
        // A negative serial is shown as the kernel's tools show it.
        Error::generic(format!(
            "Unable to read serial key {serial:08x}: {}",
            key_reason(error)
        ))
    })
}

/// What went wrong in the words of the C library.
fn key_reason(error: KeyError) -> String {
    let errno = match error {
        KeyError::AccessDenied => Errno::EACCES,
        KeyError::QuotaExceeded => Errno::EDQUOT,
        KeyError::BadAddress => Errno::EFAULT,
        KeyError::InvalidArguments => Errno::EINVAL,
        KeyError::KeyExpired => Errno::EKEYEXPIRED,
        KeyError::KeyRevoked => Errno::EKEYREVOKED,
        KeyError::KeyRejected => Errno::EKEYREJECTED,
        KeyError::KeyDoesNotExist | KeyError::KeyringDoesNotExist => Errno::ENOKEY,
        KeyError::OutOfMemory => Errno::ENOMEM,
        KeyError::OperationNotSupported => Errno::EOPNOTSUPP,
        KeyError::PermissionDenied => Errno::EPERM,
        KeyError::MissingFileOrDirectory => Errno::ENOENT,
        KeyError::Unknown(errno) => Errno::from_raw(errno),
        other => return other.to_string(),
    };
    Error::reason(&io::Error::from(errno))
}

fn decode_base64(bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
    let invalid = || Error::generic("Base64 data contains invalid characters");
    let text = std::str::from_utf8(bytes).map_err(|_| invalid())?;
    base64::decode(text).map(Zeroizing::new)
}

fn decode_iv(iv: Option<&str>) -> Result<[u8; BLOCK_SIZE], Error> {
    let iv = iv.ok_or_else(|| Error::generic("IV is required to decrypt secret"))?;
    base64::decode(iv)?.try_into().map_err(|iv: Vec<u8>| {
        let length = iv.len();
        Error::generic(format!(
            "IV should be {BLOCK_SIZE} bytes in length not {length}"
        ))
    })
}

fn decrypt(
    key: &[u8],
    iv: &[u8; BLOCK_SIZE],
    mut bytes: Zeroizing<Vec<u8>>,
) -> Result<Zeroizing<Vec<u8>>, Error> {
    let length = bytes.len();
    let (blocks, []) = bytes.as_chunks_mut::<BLOCK_SIZE>() else {
        return Err(Error::generic(format!(
            "Length {length} must be a multiple of block size {BLOCK_SIZE}"
        )));
    };
    let mut cipher = cbc::Decryptor::<aes::Aes256>::new_from_slices(key, iv)
        .expect("the lengths of key and vector were looked at");
    for block in blocks {
        cipher.decrypt_block(block.into());
    }
    let padding = bytes.last().copied().unwrap_or(0);
    if usize::from(padding) > BLOCK_SIZE {
        return Err(Error::generic(format!(
            "Incorrect number of padding bytes ({padding}) found on decrypted data"
        )));
    }
    let (kept, dropped) = bytes.split_at_mut(length.saturating_sub(padding.into()));
    dropped.zeroize();
    let kept = kept.len();
    bytes.truncate(kept);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::Credential;

    const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    const IV: &str = "8PHy8/T19vf4+fr7/P3+/w==";

    fn load(source: &Source<'_>, encoding: Encoding<'_>) -> Result<Vec<u8>, String> {
        let credentials = Credentials::default();
        let in_base64 = Encoding {
            format: Some(QCryptoSecretFormat::Base64),
            ..Encoding::default()
        };
        for (id, text) in [("key", KEY), ("short", "AAEC")] {
            let secret = Secret::load(&Source::Data(text), in_base64, &credentials);
            let secret = Arc::new(secret.expect("it is base64"));
            credentials.insert(id, Credential::Secret(Some(secret)));
        }
        credentials.insert("self", Credential::Secret(None));
        credentials.insert("thread", Credential::Other);
        match Secret::load(source, encoding, &credentials) {
            Ok(secret) => Ok(secret.bytes().to_vec()),
            Err(error) => Err(error.message),
        }
    }

    fn encrypted(text: &str, key: &str, iv: Option<&str>) -> Result<Vec<u8>, String> {
        let encoding = Encoding {
            format: Some(QCryptoSecretFormat::Base64),
            key: Some(key),
            iv,
        };
        load(&Source::Data(text), encoding)
    }

    #[test]
    fn text_is_taken_as_it_is_or_decoded() {
        let base64 = Encoding {
            format: Some(QCryptoSecretFormat::Base64),
            ..Encoding::default()
        };
        let data = Source::Data("aGFsbG8=");
        assert_eq!(load(&data, Encoding::default()), Ok(b"aGFsbG8=".to_vec()));
        assert_eq!(load(&data, base64), Ok(b"hallo".to_vec()));
    }

    #[test]
    fn file_is_read_whole() {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::io::Write::write_all(&mut file, b"\x00line\n").expect("room for six bytes");
        let path = file.path().to_str().expect("a plain path");
        let content = load(&Source::File(path), Encoding::default());
        assert_eq!(content, Ok(b"\x00line\n".to_vec()));
        assert_eq!(
            load(&Source::File("/no/such"), Encoding::default()),
            Err(
                "Unable to read /no/such: Failed to open file \u{201c}/no/such\u{201d}: \
                 No such file or directory"
                    .to_owned()
            )
        );
    }

    // Made with `openssl enc -aes-256-cbc -K 000102...1f -iv f0f1...ff -a`.
    #[test]
    fn encryption_is_undone() {
        let plain = b"sixteen bytes...and some more".to_vec();
        let cipher = "syTohNJ2+eT4y6eyimP30enLULNCe0gSw6IfC9WT/kE=";
        assert_eq!(encrypted(cipher, "key", Some(IV)), Ok(plain));
        assert_eq!(encrypted("", "key", Some(IV)), Ok(Vec::new()));
    }

    #[test]
    fn encryption_that_cannot_be_undone_is_refused() {
        let block = "AAAAAAAAAAAAAAAAAAAAAA==";
        for (text, key, iv, message) in [
            (block, "nope", Some(IV), "No secret with id 'nope'"),
            (
                block,
                "thread",
                Some(IV),
                "Object with id 'thread' is not a secret",
            ),
            (block, "self", Some(IV), "Secret with id 'self' has no data"),
            (block, "short", None, "Key should be 32 bytes in length"),
            (block, "key", None, "IV is required to decrypt secret"),
            (
                block,
                "key",
                Some("aa"),
                "IV should be 16 bytes in length not 0",
            ),
            (
                "AAAA",
                "key",
                Some(IV),
                "Length 3 must be a multiple of block size 16",
            ),
        ] {
            assert_eq!(
                encrypted(text, key, iv),
                Err(message.to_owned()),
                "{message}"
            );
        }
        let wrong = encrypted("yDzTm+KeL7xgXaEhD/Q9DQ==", "key", Some(IV));
        assert_eq!(
            wrong,
            Err("Incorrect number of padding bytes (17) found on decrypted data".to_owned())
        );
    }

    #[test]
    fn key_that_is_not_there_is_refused() {
        let zero = load(&Source::Key(0), Encoding::default());
        assert_eq!(zero, Err("'serial' should not be equal to 0".to_owned()));
        let none = load(&Source::Key(i32::MAX), Encoding::default());
        assert!(
            none.is_err_and(|message| message.starts_with("Unable to read serial key 7fffffff: "))
        );
    }
}
