//! `stord create`: makes an image.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::{Map, Value, json};
use stord_block::Graph;
use stord_block::job::{JobControl, create};
use stord_qmp::{Error, from_json};

use super::{Mode, Subject, size, text_of};
use crate::mount::guess::Format;
use crate::mount::size_text;

/// Make an image.
///
/// Without --format it is qcow2, unless the name ends in .raw or .img.
#[derive(Clone, Debug, Args)]
pub struct CreateArgs {
    /// The file to make
    file: PathBuf,
    /// The size that the guest sees: 20G [default: that of the backing file]
    size: Option<String>,
    /// The format
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,
    /// The image behind this one: what is not written here is read from there
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,
    /// The format of the backing file [default: guessed now, and noted in the image]
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<Format>,
    /// An option of the format: cluster-size=4k, preallocation=metadata, lazy-refcounts=on,
    /// refcount-bits=8, compression-type=zstd, extended-l2=on, version=v2, data-file=FILE
    #[arg(short, long, value_name = "KEY=VALUE")]
    option: Vec<String>,
    /// Write over a file that exists
    #[arg(long)]
    force: bool,
}

/// Makes it, and returns the exit status.
pub fn run(args: &CreateArgs) -> ExitCode {
    super::run(async |_, graph| {
        let shown = args.file.display();
        if !args.force && std::fs::metadata(&args.file).is_ok_and(|found| found.len() > 0) {
            return Err(Error::generic(format!("'{shown}' exists already"))
                .with_hint("Choose another name, or write over it with --force."));
        }
        let format = args.format.unwrap_or_else(|| {
            let ending = args.file.extension().and_then(|ending| ending.to_str());
            match ending {
                Some("raw" | "img") => Format::Raw,
                _ => Format::Qcow2,
            }
        });
        let bytes = make(&graph, args, format).await;
        let bytes = bytes.map_err(|error| error.context(format!("cannot make '{shown}'")))?;
        println!("Made '{shown}' ({}, {}).", format.name(), size_text(bytes));
        Ok(ExitCode::SUCCESS)
    })
}

async fn make(graph: &Graph, args: &CreateArgs, format: Format) -> Result<u64, Error> {
    let path = text_of(&args.file)?;
    let mut options = options(&args.option)?;
    let backing = backing(graph, args).await?;
    let bytes = match (&args.size, &backing) {
        (Some(text), _) => size::parse(text)?
            .checked_next_multiple_of(512)
            .ok_or_else(|| Error::generic("the size is too large"))?,
        (None, Some((_, size))) => *size,
        (None, None) => {
            return Err(Error::generic("no size is given")
                .with_hint("Say how large the image is to be: stord create FILE 20G"));
        }
    };
    let mut file = Map::new();
    file.insert("driver".to_owned(), "file".into());
    file.insert("filename".to_owned(), path.into());
    if format == Format::Raw {
        if backing.is_some() {
            return Err(Error::generic("a raw image cannot have a backing file"));
        }
        file.insert("size".to_owned(), bytes.into());
        file.extend(options);
        create::make(
            graph,
            from_json(Value::Object(file))?,
            &JobControl::default(),
        )
        .await?;
        return Ok(bytes);
    }
    if let Some(Value::String(name)) = options.get("data-file").cloned() {
        make_empty(graph, &name).await?;
        options.insert(
            "data-file".to_owned(),
            json!({"driver": "file", "filename": name}),
        );
    }
    if let (Some((format, _)), Some(name)) = (&backing, &args.backing) {
        options.insert("backing-file".to_owned(), name.as_str().into());
        options.insert("backing-fmt".to_owned(), format.name().into());
    }
    make_empty(graph, path).await?;
    options.insert("driver".to_owned(), "qcow2".into());
    options.insert(
        "file".to_owned(),
        json!({"driver": "file", "filename": path}),
    );
    options.insert("size".to_owned(), bytes.into());
    let made = match from_json(Value::Object(options)) {
        Ok(options) => create::make(graph, options, &JobControl::default()).await,
        Err(error) => Err(error),
    };
    if made.is_err() {
        // Nothing but what was made here; a file that was there before is empty by now.
        let _ = std::fs::remove_file(&args.file);
    }
    made.map(|()| bytes)
}

async fn make_empty(graph: &Graph, path: &str) -> Result<(), Error> {
    let options = from_json(json!({"driver": "file", "filename": path, "size": 0}))?;
    create::make(graph, options, &JobControl::default()).await
}

/// The backing file's format and size, as far as it can be opened.
async fn backing(graph: &Graph, args: &CreateArgs) -> Result<Option<(Format, u64)>, Error> {
    let Some(name) = &args.backing else {
        return Ok(None);
    };
    // A relative name is meant from where the image lies.
    let directory = args.file.parent().unwrap_or_else(|| "".as_ref());
    let subject = Subject::look_at(&directory.join(name), args.backing_format)?;
    graph
        .blockdev_add(subject.options(Mode::READ, false)?)
        .await?;
    let nodes = graph.query_named_block_nodes(true).await?;
    let size = nodes
        .iter()
        .find(|node| node.node_name.as_deref() == Some(super::IMAGE))
        .and_then(|node| u64::try_from(node.image.virtual_size).ok());
    graph.blockdev_del(super::IMAGE).await?;
    let size = size.ok_or_else(|| Error::generic("the backing file has gone"))?;
    Ok(Some((subject.format, size)))
}

/// The options as the members of `blockdev-create`: `_` counts as `-`, sizes may have suffixes.
fn options(list: &[String]) -> Result<Map<String, Value>, Error> {
    const SIZES: [&str; 2] = ["cluster-size", "extent-size-hint"];
    let mut members = Map::new();
    for option in list.iter().flat_map(|option| option.split(',')) {
        let (key, value) = option.split_once('=').ok_or_else(|| {
            Error::generic(format!("'{option}' is no option"))
                .with_hint("Options look like cluster-size=4k")
        })?;
        let key = key.replace('_', "-");
        let value = match value {
            "on" | "true" | "yes" => Value::Bool(true),
            "off" | "false" | "no" if key != "preallocation" => Value::Bool(false),
            _ if SIZES.contains(&key.as_str()) => size::parse(value)?.into(),
            _ => value
                .parse::<u64>()
                .map_or_else(|_| Value::from(value), Value::from),
        };
        members.insert(key, value);
    }
    Ok(members)
}
