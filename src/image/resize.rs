//! `stord resize`: makes an image longer or shorter.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use stord_block::Permissions;
use stord_block::graph::Claim;
use stord_qmp::Error;
use stord_qmp::schema::create::PreallocMode;

use super::{IMAGE, Mode, Subject, size};
use crate::mount::guess::Format;

/// Make an image longer or shorter.
///
/// What is new reads as zeroes. The partitions and file systems inside are not changed.
#[derive(Clone, Debug, Args)]
pub struct ResizeArgs {
    /// The image
    file: PathBuf,
    /// The new size, or by how much to change it: 20G, +5G, -512M
    #[arg(allow_hyphen_values = true)]
    size: String,
    /// Allow the image to get shorter; what is behind the new end is lost
    #[arg(long)]
    shrink: bool,
    /// Reserve the space of what is new: its metadata only, by allocating it, or by writing it
    #[arg(long, value_name = "HOW", default_value = "off")]
    preallocation: Preallocation,
    /// Open the image as this format instead of guessing it
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
}

/// How space is reserved.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Preallocation {
    /// Not at all
    Off,
    /// Its metadata only
    Metadata,
    /// By allocating it
    Falloc,
    /// By writing zeroes
    Full,
}

impl Preallocation {
    fn mode(self) -> PreallocMode {
        match self {
            Self::Off => PreallocMode::Off,
            Self::Metadata => PreallocMode::Metadata,
            Self::Falloc => PreallocMode::Falloc,
            Self::Full => PreallocMode::Full,
        }
    }
}

/// Resizes, and returns the exit status.
pub fn run(args: &ResizeArgs) -> ExitCode {
    super::run(async |_, graph| {
        let shown = args.file.display();
        let subject = Subject::look_at(&graph, &args.file, args.format)?;
        graph
            .blockdev_add(subject.options(Mode::WRITE, false))
            .await?;
        let claim = Claim {
            permissions: Permissions::CONSISTENT_READ,
            shared: Permissions::all(),
        };
        let backend = graph.attach(IMAGE, "resize", claim).await?;
        let old = backend.size();
        graph.detach(backend).await;
        let new = target(&args.size, old)?;
        if new < old && !args.shrink {
            return Err(Error::generic(format!(
                "'{shown}' would get shorter: {old} bytes now, {new} then"
            ))
            .with_hint("What is behind the new end would be lost. If so be it, add --shrink."));
        }
        let resized = graph
            .resize_preallocating(IMAGE, new, args.preallocation.mode())
            .await;
        resized.map_err(|error| error.context(format!("cannot resize '{shown}'")))?;
        println!("'{shown}' has {new} bytes now; it had {old}.");
        Ok(ExitCode::SUCCESS)
    })
}

/// The size in bytes that is asked for.
fn target(text: &str, old: u64) -> Result<u64, Error> {
    let impossible = || Error::generic(format!("'{text}' cannot be: the image has {old} bytes"));
    let bytes = match text.split_at_checked(1) {
        Some(("+", more)) => old.checked_add(size::parse(more)?),
        Some(("-", less)) => old.checked_sub(size::parse(less)?),
        _ => Some(size::parse(text)?),
    };
    let bytes = bytes.ok_or_else(impossible)?;
    bytes.checked_next_multiple_of(512).ok_or_else(impossible)
}
