//! `stord create`: makes an image. A file that was there is replaced when the new one is complete, and stays as it is until then.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use nix::fcntl::OFlag;
use serde_json::{Map, Value, json};
use stord_block::graph::Claim;
use stord_block::job::{JobControl, create};
use stord_block::{Backend, Graph, Permissions};
use stord_qmp::schema::block::{BlockdevDriver, BlockdevOptionsFile};
use stord_qmp::{Error, from_json};

use super::replacement::{Replacement, exists_already};
use super::{Mode, Subject, size, text_of};
use crate::mount::guess::Format;
use crate::mount::size_text;
use crate::remote;
use crate::report::reason;

/// Make an image.
///
/// Without --format it is qcow2, unless the name ends in .raw or .img.
#[derive(Clone, Debug, Args)]
pub struct CreateArgs {
    /// The file to make
    pub(super) file: PathBuf,
    /// The size that the guest sees: 20G [default: that of the backing file]
    pub(super) size: Option<String>,
    /// The format
    #[arg(short, long, value_name = "FORMAT")]
    pub(super) format: Option<Format>,
    /// The image behind this one: what is not written here is read from there
    #[arg(short, long, value_name = "FILE")]
    pub(super) backing: Option<String>,
    /// The format of the backing file [default: guessed now, and noted in the image]
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing")]
    pub(super) backing_format: Option<Format>,
    /// An option of the format: cluster-size=4k, preallocation=metadata, lazy-refcounts=on,
    /// refcount-bits=8, compression-type=zstd, extended-l2=on, version=v2, data-file=FILE
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(super) option: Vec<String>,
    /// Write over a file that exists
    #[arg(long)]
    pub(super) force: bool,
}

impl CreateArgs {
    pub(super) fn format(&self) -> Format {
        self.format.unwrap_or_else(|| {
            let ending = self.file.extension().and_then(|ending| ending.to_str());
            match ending {
                Some("raw" | "img") => Format::Raw,
                _ => Format::Qcow2,
            }
        })
    }
}

/// Makes it, and returns the exit status.
pub fn run(args: &CreateArgs) -> ExitCode {
    super::run(async |_, graph| {
        let shown = args.file.display();
        let format = args.format();
        let place = Place::look_at(&args.file, args.force)?;
        let bytes = make(&graph, args, format, place)
            .await
            .and_then(|made| made.put_in_place());
        let bytes = bytes.map_err(|error| error.context(format!("cannot make '{shown}'")))?;
        println!("Made '{shown}' ({}, {}).", format.name(), size_text(bytes));
        Ok(ExitCode::SUCCESS)
    })
}

/// An image that is complete but for its name.
pub(super) struct Made {
    /// What the guest sees, in bytes.
    pub(super) bytes: u64,
    /// The options to open its file with.
    pub(super) file: Value,
    /// What is to get its name, the image itself last, and whether a file that is there is replaced.
    unnamed: Vec<(Replacement, bool)>,
    /// Keeps others away from what is replaced.
    _claims: Vec<Backend>,
}

impl Made {
    /// Gives the files their names; gives the size.
    pub(super) fn put_in_place(self) -> Result<u64, Error> {
        for (new, replaces) in self.unnamed {
            new.put_in_place(replaces)?;
        }
        Ok(self.bytes)
    }
}

/// Where a file is to be made.
pub(super) enum Place {
    /// On a block device, which loses what it holds.
    Device(PathBuf),
    /// In a directory.
    File {
        path: PathBuf,
        /// The device and inode number of a file that is there and is to be replaced.
        replaces: Option<(u64, u64)>,
    },
}

impl Place {
    pub(super) fn look_at(path: &Path, force: bool) -> Result<Self, Error> {
        let shown = path.display();
        let found = match fs::metadata(path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self::File {
                    path: path.to_path_buf(),
                    replaces: None,
                });
            }
            Err(error) => {
                return Err(Error::generic(format!(
                    "cannot look at '{shown}': {}",
                    reason(&error)
                )));
            }
        };
        let kind = found.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::generic(format!(
                "'{shown}' is neither a file nor a block device"
            )));
        }
        if !force && (found.len() > 0 || kind.is_block_device()) {
            return Err(exists_already(path));
        }
        if !kind.is_block_device() {
            return Ok(Self::File {
                path: path.to_path_buf(),
                replaces: Some((found.dev(), found.ino())),
            });
        }
        // The kernel refuses this for what is mounted or otherwise in use.
        let alone = OFlag::O_EXCL.bits();
        match fs::File::options()
            .read(true)
            .custom_flags(alone)
            .open(path)
        {
            Ok(_) => Ok(Self::Device(path.to_path_buf())),
            Err(error) => Err(Error::generic(format!(
                "cannot use the device '{shown}': {}",
                reason(&error)
            ))),
        }
    }

    /// Sees to it that nobody else uses what is to be replaced, as long as the claim is kept.
    async fn claim(&self, graph: &Graph, node_name: &str) -> Result<Option<Backend>, Error> {
        let Self::File {
            path,
            replaces: Some(_),
        } = self
        else {
            return Ok(None);
        };
        let file = BlockdevDriver::File(BlockdevOptionsFile::new(text_of(path)?));
        graph
            .blockdev_add(super::node(node_name, file, Mode::WRITE))
            .await?;
        let claim = Claim {
            permissions: Permissions::WRITE | Permissions::RESIZE,
            shared: Permissions::empty(),
        };
        graph.attach(node_name, "create", claim).await.map(Some)
    }

    pub(super) fn is_file(&self, other: (u64, u64)) -> bool {
        matches!(self, Self::File { replaces: Some(own), .. } if *own == other)
    }

    /// Makes ready to write there: the description of the node to write to, and the file that is to get the name.
    fn begin(&self) -> Result<(Value, Option<(Replacement, bool)>), Error> {
        match self {
            Self::Device(path) => {
                let device = json!({"driver": "host_device", "filename": text_of(path)?});
                Ok((device, None))
            }
            Self::File { path, replaces } => {
                let new = Replacement::new(path)?;
                let file = json!({"driver": "file", "filename": text_of(&new.name())?});
                Ok((file, Some((new, replaces.is_some()))))
            }
        }
    }
}

pub(super) async fn make(
    graph: &Graph,
    args: &CreateArgs,
    format: Format,
    place: Place,
) -> Result<Made, Error> {
    let options = options(&args.option)?;
    let backing = backing(graph, args).await?;
    let bytes = match (&args.size, &backing) {
        (Some(text), _) => size::parse(text)?
            .checked_next_multiple_of(512)
            .ok_or_else(|| Error::generic("the size is too large"))?,
        (None, Some(backing)) => backing.size,
        (None, None) => {
            return Err(Error::generic("no size is given")
                .with_hint("Say how large the image is to be: stord create FILE 20G"));
        }
    };
    if backing
        .as_ref()
        .and_then(|backing| backing.identity)
        .is_some_and(|identity| place.is_file(identity))
    {
        return Err(Error::generic("the image would lie behind itself"));
    }
    match format {
        Format::Raw => make_raw(graph, bytes, options, backing.is_some(), place).await,
        Format::Qcow2 => make_qcow2(graph, args, bytes, options, backing, place).await,
    }
}

async fn make_raw(
    graph: &Graph,
    bytes: u64,
    mut options: Map<String, Value>,
    has_backing: bool,
    place: Place,
) -> Result<Made, Error> {
    if has_backing {
        return Err(Error::generic("a raw image cannot have a backing file"));
    }
    let Place::File { path, .. } = &place else {
        return Err(Error::generic("a block device is a raw image already"));
    };
    options.insert("driver".to_owned(), "file".into());
    options.insert("filename".to_owned(), text_of(path)?.into());
    options.insert("size".to_owned(), bytes.into());
    create::check(&from_json(Value::Object(options.clone()))?)?;
    let claim = place.claim(graph, "old").await?;
    let (file, new) = place.begin()?;
    options.insert("filename".to_owned(), file["filename"].clone());
    let options = from_json(Value::Object(options))?;
    create::make(graph, options, &JobControl::default())
        .await
        .map_err(|failure| failure.error)?;
    Ok(Made {
        bytes,
        file,
        unnamed: new.into_iter().collect(),
        _claims: claim.into_iter().collect(),
    })
}

async fn make_qcow2(
    graph: &Graph,
    args: &CreateArgs,
    bytes: u64,
    mut options: Map<String, Value>,
    backing: Option<Backing>,
    place: Place,
) -> Result<Made, Error> {
    let data_file = match options.get("data-file").cloned() {
        Some(Value::String(name)) => {
            // Not every program looks for a relative name where the image lies.
            let path =
                std::path::absolute(&name).map_err(|error| Error::generic(reason(&error)))?;
            let place = Place::look_at(&path, args.force)?;
            let image = std::path::absolute(&args.file);
            if image.is_ok_and(|image| image == path)
                || fs::canonicalize(&path).is_ok_and(|path| is_same(&path, &args.file))
            {
                return Err(Error::generic("the image cannot be its own data file"));
            }
            Some((text_of(&path)?.to_owned(), place))
        }
        Some(_) => return Err(Error::generic("'data-file' is to be the name of a file")),
        None => None,
    };
    if let (Some(backing), Some(name)) = (&backing, &args.backing) {
        options.insert("backing-file".to_owned(), name.as_str().into());
        options.insert("backing-fmt".to_owned(), backing.format.name().into());
    }
    options.insert("driver".to_owned(), "qcow2".into());
    options.insert("size".to_owned(), bytes.into());
    // What is wrong with the options shows before anything is made.
    options.insert("file".to_owned(), "not yet there".into());
    create::check(&from_json(Value::Object(options.clone()))?)?;
    let mut claims = Vec::new();
    claims.extend(place.claim(graph, "old").await?);
    let (file, new) = place.begin()?;
    options.insert("file".to_owned(), file.clone());
    let mut unnamed = Vec::new();
    let mut data_file_name = None;
    if let Some((name, place)) = &data_file {
        claims.extend(place.claim(graph, "old-data").await?);
        let (file, new) = place.begin()?;
        options.insert("data-file".to_owned(), file);
        data_file_name = Some(name.clone());
        unnamed.extend(new);
    }
    unnamed.extend(new);
    let on_device = matches!(place, Place::Device(_));
    let options = from_json(Value::Object(options))?;
    create::make_named(graph, options, data_file_name, &JobControl::default())
        .await
        .map_err(|failure| {
            if on_device {
                failure.into()
            } else {
                failure.error
            }
        })?;
    Ok(Made {
        bytes,
        file,
        unnamed,
        _claims: claims,
    })
}

fn is_same(one: &Path, other: &Path) -> bool {
    fs::canonicalize(other).is_ok_and(|other| one == other)
}

/// The path of a file whose name the image keeps: a relative one is meant from where the image lies.
fn beside(args: &CreateArgs, name: &str) -> PathBuf {
    let directory = args.file.parent().unwrap_or_else(|| "".as_ref());
    directory.join(name)
}

/// What lies behind the image.
struct Backing {
    format: Format,
    /// Bytes.
    size: u64,
    /// Its file's device and inode number, if it is a file here.
    identity: Option<(u64, u64)>,
}

/// What is to lie behind the image, as far as it can be opened.
async fn backing(graph: &Graph, args: &CreateArgs) -> Result<Option<Backing>, Error> {
    let Some(name) = &args.backing else {
        return Ok(None);
    };
    let is_remote = remote::is_remote(Path::new(name));
    let path = match is_remote {
        true => PathBuf::from(name),
        false => beside(args, name),
    };
    let subject = Subject::look_at(graph, &path, args.backing_format)?;
    let found = fs::metadata(&path);
    graph
        .blockdev_add(subject.options(Mode::READ, false))
        .await?;
    let nodes = graph.query_named_block_nodes(true).await?;
    let size = nodes
        .iter()
        .find(|node| node.node_name.as_deref() == Some(super::IMAGE))
        .and_then(|node| u64::try_from(node.image.virtual_size).ok());
    graph.blockdev_del(super::IMAGE).await?;
    let gone = || Error::generic("the backing file has gone");
    let identity = match found {
        Ok(found) => Some((found.dev(), found.ino())),
        Err(_) if is_remote => None,
        Err(error) => return Err(gone().with_source(error)),
    };
    Ok(Some(Backing {
        format: subject.format,
        size: size.ok_or_else(gone)?,
        identity,
    }))
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
