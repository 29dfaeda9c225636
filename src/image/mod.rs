//! Commands about images for people: `stord create`, `convert`, `info`, `check`, `map`, `resize`, `snapshot`. No daemon runs; an image that is in use
//! is refused by its locks.

pub mod check;
pub mod convert;
pub mod create;
pub mod info;
pub mod map;
mod replacement;
pub mod resize;
mod size;
pub mod snapshot;

use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use stord_block::{Contexts, Graph};
use stord_qmp::Error;
use stord_qmp::schema::block::{
    BlockdevDiscardOptions, BlockdevDriver, BlockdevOptions, BlockdevOptionsFile,
    BlockdevOptionsQcow2, BlockdevOptionsRaw, BlockdevRef, BlockdevRefOrNull,
};

use crate::daemon::run_local;
use crate::mount::guess::{self, Format};
use crate::remote;
use crate::report::{Origin, reason};

/// The node with the image's content.
const IMAGE: &str = "image";
/// The node with its file.
const FILE: &str = "file";

/// An image that exists, and its format.
struct Subject {
    /// What opens its file.
    file: BlockdevDriver,
    format: Format,
}

/// How a file is opened.
#[derive(Clone, Copy)]
struct Mode {
    writable: bool,
    force_share: bool,
}

impl Mode {
    const READ: Self = Self {
        writable: false,
        force_share: false,
    };
    const WRITE: Self = Self {
        writable: true,
        force_share: false,
    };
}

impl Subject {
    /// Looks at a file, or at what a URI leads to: a disk, unless it is said to be something else.
    fn look_at(graph: &Graph, path: &Path, format: Option<Format>) -> Result<Self, Error> {
        if remote::is_remote(path) {
            return Ok(Self {
                file: remote::driver(path, graph.credentials())?,
                format: format.unwrap_or(Format::Raw),
            });
        }
        let shown = path.display();
        let failed = |error: std::io::Error| {
            let reason = reason(&error);
            Error::generic(format!("cannot open '{shown}': {reason}")).with_source(error)
        };
        let kind = fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::generic(format!(
                "'{shown}' is no disk image: it is neither a file nor a block device"
            )));
        }
        let format = match format {
            Some(format) => format,
            None => {
                let file = File::open(path).map_err(failed)?;
                let size = std::io::Seek::seek(&mut &file, std::io::SeekFrom::End(0));
                guess::guess(path, &file, size.map_err(failed)?)?
            }
        };
        let file = BlockdevOptionsFile::new(text_of(path)?);
        let file = if kind.is_block_device() {
            BlockdevDriver::HostDevice(file)
        } else {
            BlockdevDriver::File(file)
        };
        Ok(Self { file, format })
    }

    fn file_options(&self, mode: Mode) -> BlockdevOptions {
        node(FILE, self.file.clone(), mode)
    }

    /// The image over its file; without what lies behind it if `alone`.
    fn options(&self, mode: Mode, alone: bool) -> BlockdevOptions {
        let file = BlockdevRef::Definition(Box::new(self.file_options(mode)));
        let driver = match self.format {
            Format::Raw => BlockdevDriver::Raw(BlockdevOptionsRaw::new(file)),
            Format::Qcow2 => {
                let mut qcow2 = BlockdevOptionsQcow2::new(file);
                qcow2.backing = alone.then_some(BlockdevRefOrNull::Null);
                BlockdevDriver::Qcow2(qcow2)
            }
        };
        node(IMAGE, driver, mode)
    }
}

fn node(name: &str, driver: BlockdevDriver, mode: Mode) -> BlockdevOptions {
    BlockdevOptions {
        node_name: Some(name.to_owned()),
        read_only: Some(!mode.writable),
        force_share: Some(mode.force_share),
        discard: Some(BlockdevDiscardOptions::Unmap),
        ..BlockdevOptions::new(driver)
    }
}

fn text_of(path: &Path) -> Result<&str, Error> {
    path.to_str()
        .ok_or_else(|| Error::generic(format!("the path '{}' is not valid UTF-8", path.display())))
}

/// Runs a command on a graph of its own, closes everything, and reports its failure.
fn run<F>(command: impl FnOnce(Rc<Contexts>, Rc<Graph>) -> F) -> ExitCode
where
    F: Future<Output = Result<ExitCode, Error>>,
{
    run_local(async move {
        let contexts = match Contexts::start() {
            Ok(contexts) => Rc::new(contexts),
            Err(error) => {
                let reason = reason(&error);
                Origin::none().error(&Error::generic(format!("cannot start: {reason}")));
                return ExitCode::FAILURE;
            }
        };
        let graph = Rc::new(Graph::new(Rc::clone(&contexts)));
        let result = command(contexts, Rc::clone(&graph)).await;
        graph.close_all().await;
        result.unwrap_or_else(|error| {
            Origin::none().error(&advise(error));
            ExitCode::FAILURE
        })
    })
}

/// Says what to do about an image in use.
fn advise(error: Error) -> Error {
    let in_use = error.message.contains("lock") && error.hint.is_none();
    if in_use {
        return error.with_hint(
            "Another program has the image open. Close it first; stord info reads along with \
             --force-share.",
        );
    }
    error
}
