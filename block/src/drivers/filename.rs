//! File names that lead to images: plain paths, `file:` names and `json:` descriptions.

use std::path::Path;

use serde_json::{Map, Value};
use stord_qmp::schema::block::{
    BlockdevDriver, BlockdevOptions, BlockdevOptionsFile, BlockdevOptionsQcow2, BlockdevOptionsRaw,
    BlockdevRef,
};
use stord_qmp::{Error, from_json};

use super::format::Probed;
use super::protocol::nbd::uri;

/// The file name that an image stored in `base` means by `name`.
///
/// # Errors
/// The protocol is unknown.
pub fn full_name(name: &str, base: &str) -> Result<String, Error> {
    resolve(name, Some(base))
}

/// Options that open what `name` says, with the driver `format` above it where one is given.
///
/// A relative path is taken from the directory of `base`, the image that holds the name.
///
/// # Errors
/// The description after `json:` is wrong, the protocol or the format is unknown.
pub fn parse(
    name: &str,
    base: Option<&str>,
    format: Option<&str>,
) -> Result<BlockdevOptions, Error> {
    if let Some(description) = name.strip_prefix("json:") {
        return parse_description(description);
    }
    let file = BlockdevOptions::new(if uri::is_uri(name) {
        BlockdevDriver::Nbd(uri::parse(name)?)
    } else {
        BlockdevDriver::File(BlockdevOptionsFile::new(resolve(name, base)?))
    });
    match format {
        None | Some("file" | "nbd") => Ok(file),
        Some("raw") => Ok(with_format(file, Probed::Raw)),
        Some("qcow2") => Ok(with_format(file, Probed::Qcow2)),
        Some(other) => Err(Error::generic(format!("Unknown driver '{other}'"))),
    }
}

/// Puts a format above the file that `file` opens.
pub fn with_format(file: BlockdevOptions, format: Probed) -> BlockdevOptions {
    let below = BlockdevRef::Definition(Box::new(file));
    BlockdevOptions::new(match format {
        Probed::Raw => BlockdevDriver::Raw(BlockdevOptionsRaw::new(below)),
        Probed::Qcow2 => BlockdevDriver::Qcow2(BlockdevOptionsQcow2::new(below)),
    })
}

fn parse_description(description: &str) -> Result<BlockdevOptions, Error> {
    let value: Value = serde_json::from_str(description)
        .map_err(|source| Error::generic("Could not parse the JSON options").with_source(source))?;
    let Value::Object(members) = value else {
        return Err(Error::generic(
            "Could not parse the JSON options: they must be an object",
        ));
    };
    from_json(nest(members)?)
}

/// Turns members with dotted names into objects within objects.
fn nest(members: Map<String, Value>) -> Result<Value, Error> {
    let mut nested = Map::new();
    for (name, value) in members {
        let mut place = &mut nested;
        let mut parts = name.split('.').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                place.insert(part.to_owned(), value);
                break;
            }
            let below = place
                .entry(part)
                .or_insert_with(|| Value::Object(Map::new()));
            place = below.as_object_mut().ok_or_else(|| {
                Error::generic(format!("Cannot mix scalar and non-scalar keys at '{part}'"))
            })?;
        }
    }
    Ok(Value::Object(nested))
}

fn resolve(name: &str, base: Option<&str>) -> Result<String, Error> {
    let (path, had_prefix) = match name.strip_prefix("file:") {
        Some(path) => (path, true),
        None => (name, false),
    };
    if !had_prefix && let Some(protocol) = protocol_of(path) {
        return Err(Error::generic(format!("Unknown protocol '{protocol}'")));
    }
    let directory = base.and_then(|base| Path::new(base).parent());
    match directory {
        Some(directory) if !path.starts_with('/') => {
            let joined = directory.join(path);
            joined
                .into_os_string()
                .into_string()
                .map_err(|_| Error::generic(format!("The path of '{name}' is not valid UTF-8")))
        }
        _ => Ok(path.to_owned()),
    }
}

/// The protocol in front of the first colon, unless a slash comes before it.
fn protocol_of(name: &str) -> Option<&str> {
    let (protocol, _) = name.split_once(':')?;
    (!protocol.contains('/')).then_some(protocol)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filename_of(options: &BlockdevOptions) -> &str {
        match &options.driver {
            BlockdevDriver::File(file) => &file.filename,
            BlockdevDriver::Raw(raw) => match &raw.file {
                BlockdevRef::Definition(below) => filename_of(below),
                BlockdevRef::Reference(name) => name,
            },
            BlockdevDriver::Qcow2(qcow2) => match &qcow2.file {
                BlockdevRef::Definition(below) => filename_of(below),
                BlockdevRef::Reference(name) => name,
            },
            other => panic!("no file name in {}", other.name()),
        }
    }

    #[test]
    fn relative_names_start_at_the_image_that_holds_them() {
        let options = parse("base.img", Some("/images/top.qcow2"), Some("raw")).unwrap();
        assert_eq!(filename_of(&options), "/images/base.img");
        assert_eq!(options.driver.name(), "raw");
    }

    #[test]
    fn absolute_and_prefixed_names_are_taken_as_they_are() {
        assert_eq!(
            filename_of(&parse("/a/b", Some("/c/d"), None).unwrap()),
            "/a/b"
        );
        assert_eq!(filename_of(&parse("file:x:y", None, None).unwrap()), "x:y");
        assert_eq!(filename_of(&parse("./x:y", None, None).unwrap()), "./x:y");
    }

    #[test]
    fn unknown_protocols_and_formats_are_named() {
        assert_eq!(
            parse("http://localhost/", None, None).unwrap_err().message,
            "Unknown protocol 'http'"
        );
        assert_eq!(
            parse("x", None, Some("vmdk")).unwrap_err().message,
            "Unknown driver 'vmdk'"
        );
    }

    #[test]
    fn json_names_describe_a_node() {
        let options = parse(
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/a"}}"#,
            None,
            None,
        )
        .unwrap();
        assert_eq!(options.driver.name(), "qcow2");
        assert_eq!(filename_of(&options), "/a");
        let dotted = parse(
            r#"json:{"driver":"raw","file.driver":"file","file.filename":"/b"}"#,
            None,
            None,
        )
        .unwrap();
        assert_eq!(filename_of(&dotted), "/b");
        assert!(parse("json:{", None, None).is_err());
    }
}
