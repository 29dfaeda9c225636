//! Rules read from a file, and read again when told that it has changed. While the file cannot be
//! read, or holds no rules, nobody is let in.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use stord_qmp::schema::object::AuthZListProperties;
use stord_qmp::{Error, from_json, json};

use super::{Authorization, List};

/// The largest file that is read, in bytes; rules for thousands of names are smaller.
const SIZE_LIMIT: u64 = 16 << 20;

/// Rules in a file.
pub struct ListFile {
    path: PathBuf,
    list: RwLock<Option<List>>,
}

impl ListFile {
    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read, or holds no rules.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self {
            path: path.to_owned(),
            list: RwLock::new(Some(read(path)?)),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file again.
    ///
    /// # Errors
    /// It cannot be read, or holds no rules; nobody is let in then.
    pub fn reload(&self) -> Result<(), Error> {
        let (list, result) = match read(&self.path) {
            Ok(list) => (Some(list), Ok(())),
            Err(error) => (None, Err(error)),
        };
        *self.list.write().unwrap_or_else(PoisonError::into_inner) = list;
        result
    }
}

impl Authorization for ListFile {
    fn is_allowed(&self, identity: &str) -> bool {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        list.as_ref().is_some_and(|list| list.is_allowed(identity))
    }
}

fn read(path: &Path) -> Result<List, Error> {
    let shown = path.display();
    let failed = |error: std::io::Error| {
        let reason = Error::reason(&error);
        Error::generic(format!("Unable to read '{shown}': {reason}")).with_source(error)
    };
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > SIZE_LIMIT {
        return Err(Error::generic(format!("File '{shown}' is too large")));
    }
    let text = std::fs::read(path).map_err(failed)?;
    let unparsable = |error: Error| error.context(format_args!("Unable to parse '{shown}'"));
    let value = json::parse(&text).map_err(unparsable)?;
    if !value.is_object() {
        return Err(Error::generic(format!(
            "File '{shown}' must contain a JSON object"
        )));
    }
    let rules: AuthZListProperties = from_json(value).map_err(unparsable)?;
    Ok(List::new(rules))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn rules_follow_the_file() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("rules.json");
        let write = |text: &str| fs::write(&path, text).expect("room for a line");
        write(r#"{"rules": [{"match": "fred", "policy": "allow"}]}"#);
        let rules = ListFile::open(&path).expect("the file holds rules");
        assert!(rules.is_allowed("fred") && !rules.is_allowed("bob"));

        write(r#"{"policy": "allow"}"#);
        assert!(!rules.is_allowed("bob"), "it was not told to read it again");
        rules.reload().expect("the file holds rules");
        assert!(rules.is_allowed("bob"));

        write("{");
        assert!(rules.reload().is_err());
        assert!(!rules.is_allowed("bob"), "in doubt the answer is no");
        fs::remove_file(&path).expect("it is there");
        assert!(rules.reload().is_err());
    }

    #[test]
    fn file_without_rules_is_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("rules.json");
        let shown = path.display();
        for (text, message) in [
            ("[]", format!("File '{shown}' must contain a JSON object")),
            (
                r#"{"policy": "x"}"#,
                format!("Unable to parse '{shown}': Parameter 'policy' does not accept value 'x'"),
            ),
            (
                r#"{"rules": [{}]}"#,
                format!("Unable to parse '{shown}': Parameter 'rules[0].match' is missing"),
            ),
        ] {
            fs::write(&path, text).expect("room for a line");
            let error = ListFile::open(&path).err().map(|error| error.message);
            assert_eq!(error, Some(message));
        }
    }
}
