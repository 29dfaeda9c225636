//! `stord convert`: copies an image into a new one of another format, several parts at a time, without what reads as zeroes. What was there
//! under the new name is replaced when the copy is complete and on disk, and stays as it is until then.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;
use stord_aio::{Errno, IoBuffer, IoVec, join_all};
use stord_block::driver::ZeroFlags;
use stord_block::graph::Claim;
use stord_block::{Backend, Contexts, Detail, Graph, Permissions};
use stord_qmp::{Error, from_json};

use super::create::{self, CreateArgs, Place};
use super::{IMAGE, Mode, Subject};
use crate::mount::guess::Format;
use crate::mount::size_text;
use crate::remote;

/// Bytes that a worker takes at a time: no cluster is larger.
const PART: u64 = 2 << 20;
/// Parts under way at a time.
const WORKERS: usize = 8;
/// Zeroes are looked for in so many bytes of a raw image.
const RAW_UNIT: u64 = 4096;

/// The node of the copy.
const COPY: &str = "copy";

/// Copy an image into a new one.
///
/// Backing files are copied, too: the new image stands on its own. Snapshots and bitmaps inside the
/// image are not copied.
#[derive(Clone, Debug, Args)]
pub struct ConvertArgs {
    /// The image to copy: a file, a block device, or the URI of an NBD export
    source: PathBuf,
    /// The file to make, or the URI of an NBD export to fill
    target: PathBuf,
    /// The format of the copy [default: qcow2, unless its name ends in .raw or .img]
    #[arg(short = 'O', long, value_name = "FORMAT")]
    output_format: Option<Format>,
    /// Store it compressed
    #[arg(short, long)]
    compress: bool,
    /// An option of the copy's format, as for stord create
    #[arg(short, long, value_name = "KEY=VALUE")]
    option: Vec<String>,
    /// Write over a file that exists
    #[arg(long)]
    force: bool,
    /// Open the image as this format instead of guessing it
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,
}

/// Copies, and returns the exit status.
pub fn run(args: &ConvertArgs) -> ExitCode {
    super::run(async |contexts, graph| {
        let converted = convert(&contexts, &graph, args).await;
        let (format, bytes) = converted.map_err(|error| {
            let (from, to) = (args.source.display(), args.target.display());
            error.context(format!("cannot convert '{from}' to '{to}'"))
        })?;
        let (shown, size) = (args.target.display(), size_text(bytes));
        let done = if remote::is_remote(&args.target) {
            "Filled"
        } else {
            "Made"
        };
        println!("{done} '{shown}' ({}, {size}).", format.name());
        Ok(ExitCode::SUCCESS)
    })
}

async fn convert(
    contexts: &Contexts,
    graph: &Graph,
    args: &ConvertArgs,
) -> Result<(Format, u64), Error> {
    let subject = Subject::look_at(graph, &args.source, args.format)?;
    if remote::is_remote(&args.target) {
        return fill(contexts, graph, args, &subject).await;
    }
    let place = Place::look_at(&args.target, args.force)?;
    let is_itself =
        fs::metadata(&args.source).is_ok_and(|source| place.is_file((source.dev(), source.ino())));
    if is_itself {
        return Err(Error::generic("an image cannot be copied over itself"));
    }
    if args
        .option
        .iter()
        .any(|option| option.contains("data-file"))
    {
        return Err(Error::generic("copies with a data file are not made"));
    }
    let source = open_source(graph, &subject).await?;
    let creation = CreateArgs {
        file: args.target.clone(),
        size: Some(source.size().to_string()),
        format: args.output_format,
        backing: None,
        backing_format: None,
        option: args.option.clone(),
        force: args.force,
    };
    let format = creation.format();
    if args.compress && format == Format::Raw {
        return Err(Error::generic("raw images store nothing compressed"));
    }
    let made = create::make(graph, &creation, format, place).await?;
    graph
        .blockdev_add(from_json(json!({
            "driver": format.name(),
            "node-name": COPY,
            "file": made.file,
        }))?)
        .await?;
    let writing = Claim {
        permissions: Permissions::WRITE,
        shared: Permissions::empty(),
    };
    let target = graph.attach(COPY, "convert", writing).await?;
    let nodes = graph.query_named_block_nodes(true).await?;
    let cluster = nodes
        .iter()
        .find(|node| node.node_name.as_deref() == Some(COPY))
        .and_then(|node| u64::try_from(node.image.cluster_size?).ok());
    let copy = Copy {
        source: source.clone(),
        target: target.clone(),
        unit: cluster.unwrap_or(RAW_UNIT).min(PART),
        compress: args.compress,
    };
    let copied = contexts.main().run(move || copy.all()).await;
    graph.detach(source).await;
    graph.detach(target).await;
    copied
        .map_err(|gone| Error::generic(gone.to_string()))?
        .map_err(at)?;
    graph.blockdev_del(COPY).await?;
    Ok((format, made.put_in_place()?))
}

fn at((offset, errno): (u64, Errno)) -> Error {
    Error::os(format!("offset {offset:#x}"), errno)
}

async fn open_source(graph: &Graph, subject: &Subject) -> Result<Backend, Error> {
    graph
        .blockdev_add(subject.options(Mode::READ, false))
        .await?;
    let reading = Claim {
        permissions: Permissions::CONSISTENT_READ,
        shared: Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED,
    };
    graph.attach(IMAGE, "convert", reading).await
}

/// Copies into an export of a server, which is a raw disk that is there already and has to be large enough.
async fn fill(
    contexts: &Contexts,
    graph: &Graph,
    args: &ConvertArgs,
    subject: &Subject,
) -> Result<(Format, u64), Error> {
    let is_raw = args
        .output_format
        .is_none_or(|format| format == Format::Raw);
    if !is_raw || args.compress || !args.option.is_empty() {
        return Err(Error::generic(
            "an export of a server is filled as a raw disk",
        ));
    }
    if !args.force {
        return Err(Error::generic("the export has a content already")
            .with_hint("Say that it may be overwritten: --force"));
    }
    let source = open_source(graph, subject).await?;
    let driver = remote::driver(&args.target, graph.credentials())?;
    let disk = super::node(COPY, driver, Mode::WRITE);
    graph.blockdev_add(disk).await?;
    let writing = Claim {
        permissions: Permissions::WRITE,
        shared: Permissions::all(),
    };
    let target = graph.attach(COPY, "convert", writing).await?;
    let (size, room) = (source.size(), target.size());
    if size > room {
        return Err(Error::generic(format!(
            "the export has {room} bytes, and the image {size}"
        )));
    }
    let copy = Copy {
        source: source.clone(),
        target: target.clone(),
        unit: RAW_UNIT,
        compress: false,
    };
    let filling = async move || {
        let all = copy
            .target
            .write_zeroes(0, copy.target.size(), ZeroFlags::MAY_UNMAP);
        all.await.map_err(|errno| (0, errno))?;
        copy.all().await
    };
    let copied = contexts.main().run(filling).await;
    graph.detach(source).await;
    graph.detach(target).await;
    copied
        .map_err(|gone| Error::generic(gone.to_string()))?
        .map_err(at)?;
    graph.blockdev_del(COPY).await?;
    Ok((Format::Raw, size))
}

/// A copy under way.
struct Copy {
    source: Backend,
    /// Reads as zeroes where nothing has been written yet.
    target: Backend,
    /// Bytes that are written together or not at all, beginning at a multiple of it.
    unit: u64,
    compress: bool,
}

impl Copy {
    /// Copies everything, and has it on disk. The error is where and why.
    async fn all(self) -> Result<(), (u64, Errno)> {
        let next = Cell::new(0);
        let workers = (0..WORKERS).map(|_| self.work(&next));
        for result in join_all(workers.collect()).await {
            result?;
        }
        self.target.flush().await.map_err(|errno| (0, errno))
    }

    /// Copies one part after the other, until none is left.
    async fn work(&self, next: &Cell<u64>) -> Result<(), (u64, Errno)> {
        let size = self.source.size();
        while next.get() < size {
            let start = next.get();
            let end = size.min(start + PART);
            next.set(end);
            let skipped = match self.part(start, end).await {
                Ok(skipped) => skipped,
                Err(failure) => {
                    next.set(size);
                    return Err(failure);
                }
            };
            // The parts that the zeroes cover whole.
            next.set(next.get().max(skipped / PART * PART));
        }
        Ok(())
    }

    /// Copies a part; gives the offset up to which there are zeroes behind it.
    async fn part(&self, start: u64, end: u64) -> Result<u64, (u64, Errno)> {
        let mut at = start;
        while at < end {
            let rest = self.source.size() - at;
            let found = self.source.locate(at, rest, Detail::Storage).await;
            let found = found.map_err(|errno| (at, errno))?;
            if found.zero {
                at += found.len;
                continue;
            }
            let from = at - at % self.unit;
            let to = (at + found.len).next_multiple_of(self.unit).min(end);
            let copied = self.run(from, to).await;
            copied.map_err(|errno| (from, errno))?;
            at = to;
        }
        Ok(at)
    }

    /// Copies what is not zero in a run of units, of which the last may end with the image.
    async fn run(&self, from: u64, to: u64) -> Result<(), Errno> {
        // A disk has whole sectors, though a raw file may end within one.
        let len = to.next_multiple_of(self.unit).min(self.target.size()) - from;
        let buffer: IoVec =
            IoBuffer::zeroed(usize::try_from(len).map_err(|_| Errno::ENOMEM)?).into();
        self.source.read(from, buffer.slice(0..to - from)).await?;
        let mut data = None;
        for at in (0..len).step_by(usize::try_from(self.unit).map_err(|_| Errno::EINVAL)?) {
            let unit = at..len.min(at + self.unit);
            match (buffer.slice(unit).is_zero(), data) {
                (false, None) => data = Some(at),
                (true, Some(begin)) => {
                    self.write(from + begin, buffer.slice(begin..at)).await?;
                    data = None;
                }
                _ => {}
            }
        }
        match data {
            Some(begin) => self.write(from + begin, buffer.slice(begin..len)).await,
            None => Ok(()),
        }
    }

    async fn write(&self, offset: u64, data: IoVec) -> Result<(), Errno> {
        if self.compress {
            self.target.write_compressed(offset, data).await
        } else {
            self.target.write(offset, data, false).await
        }
    }
}
