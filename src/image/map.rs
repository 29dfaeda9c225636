//! `stord map`: where each part of an image is stored, through the whole backing chain.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use serde_json::Value;
use stord_aio::Errno;
use stord_block::drivers::description;
use stord_block::graph::Claim;
use stord_block::{Backend, Contexts, Detail, Location, Permissions};
use stord_qmp::Error;

use super::{IMAGE, Mode, Subject, size};
use crate::mount::guess::Format;
use crate::report::reason;

/// Entries looked up before they are printed.
const BATCH: usize = 4096;

/// Show where each part of an image is stored.
///
/// What is printed as stored reads as something else than zeroes, or may do so; everything else reads as zeroes.
#[derive(Clone, Debug, Args)]
pub struct MapArgs {
    /// The image
    file: PathBuf,
    /// Print every part as JSON, as qemu-img map does, with the name of the file it is stored in
    #[arg(long)]
    json: bool,
    /// Begin at this offset
    #[arg(short, long, value_name = "OFFSET", default_value = "0")]
    start: String,
    /// Show no more than this many bytes
    #[arg(short, long, value_name = "BYTES")]
    length: Option<String>,
    /// Read along although another program writes to the image: what is shown may be inconsistent
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Open the image as this format instead of guessing it
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
}

/// Shows it, and returns the exit status.
pub fn run(args: &MapArgs) -> ExitCode {
    super::run(async |contexts, graph| {
        let shown = args.file.display();
        let subject = Subject::look_at(&graph, &args.file, args.format)?;
        let mode = Mode {
            force_share: args.force_share,
            ..Mode::READ
        };
        graph.blockdev_add(subject.options(mode, false)).await?;
        let claim = Claim {
            permissions: Permissions::CONSISTENT_READ,
            shared: Permissions::all(),
        };
        let backend = graph.attach(IMAGE, "map", claim).await?;
        let start = size::parse(&args.start)?;
        let rest = backend.size().checked_sub(start).ok_or_else(|| {
            Error::generic(format!("'{shown}' has {} bytes only", backend.size()))
        })?;
        let length = args.length.as_deref().map(size::parse).transpose()?;
        let end = start + length.map_or(rest, |length| length.min(rest));
        let mut output = Output::new(args.json);
        let printed = print_all(&contexts, &backend, start..end, &mut output).await;
        graph.detach(backend).await;
        printed.map_err(|error| error.context(format!("cannot map '{shown}'")))?;
        Ok(ExitCode::SUCCESS)
    })
}

async fn print_all(
    contexts: &Contexts,
    backend: &Backend,
    range: std::ops::Range<u64>,
    output: &mut Output,
) -> Result<(), Error> {
    let mut at = range.start;
    while at < range.end {
        let (backend, end) = (backend.clone(), range.end);
        let found = contexts
            .main()
            .run(move || async move { look_up(&backend, at, end).await })
            .await
            .map_err(|gone| Error::generic(gone.to_string()))?;
        let parts = found.map_err(|errno| Error::os(format!("offset {at:#x}"), errno))?;
        for part in parts {
            at = part.start + part.location.len;
            output.add(part)?;
        }
    }
    output.finish()
}

/// A part of the image.
struct Part {
    start: u64,
    location: Location,
}

impl Part {
    /// Whether what follows this part goes on where and as this ends.
    fn goes_on_in(&self, next: &Location) -> bool {
        let own = &self.location;
        let adjacent = match (&own.place, &next.place) {
            (None, None) => true,
            (Some(own_place), Some(next)) => {
                Arc::ptr_eq(&own_place.file, &next.file)
                    && own_place.offset + own.len == next.offset
            }
            _ => false,
        };
        adjacent
            && (own.data, own.zero, own.present, own.compressed, own.depth)
                == (
                    next.data,
                    next.zero,
                    next.present,
                    next.compressed,
                    next.depth,
                )
    }
}

async fn look_up(backend: &Backend, mut at: u64, end: u64) -> Result<Vec<Part>, Errno> {
    let mut parts: Vec<Part> = Vec::new();
    while at < end && parts.len() < BATCH {
        let location = backend.locate(at, end - at, Detail::Storage).await?;
        let len = location.len;
        match parts.last_mut() {
            Some(last) if last.goes_on_in(&location) => last.location.len += len,
            _ => parts.push(Part {
                start: at,
                location,
            }),
        }
        at += len;
    }
    Ok(parts)
}

/// Prints parts, neighbours that go on in each other as one.
struct Output {
    json: bool,
    printed: u64,
    pending: Option<Part>,
    stream: BufWriter<io::Stdout>,
}

impl Output {
    fn new(json: bool) -> Self {
        Self {
            json,
            printed: 0,
            pending: None,
            stream: BufWriter::new(io::stdout()),
        }
    }

    fn add(&mut self, part: Part) -> Result<(), Error> {
        match &mut self.pending {
            Some(last) if last.goes_on_in(&part.location) => {
                last.location.len += part.location.len;
                Ok(())
            }
            pending => match pending.replace(part) {
                Some(whole) => self.print(&whole).map_err(failed),
                None => Ok(()),
            },
        }
    }

    fn finish(&mut self) -> Result<(), Error> {
        let last = self.pending.take();
        let end = match (self.json, self.printed, &last) {
            (true, 0, None) => "[]\n",
            (true, _, _) => "]\n",
            (false, _, _) => "",
        };
        last.map_or(Ok(()), |last| self.print(&last))
            .and_then(|()| self.stream.write_all(end.as_bytes()))
            .and_then(|()| self.stream.flush())
            .map_err(failed)
    }

    fn print(&mut self, part: &Part) -> io::Result<()> {
        let is_first = self.printed == 0;
        if self.json {
            let separator = if is_first { "[" } else { ",\n" };
            self.stream.write_all(separator.as_bytes())?;
            write_json(&mut self.stream, part)?;
        } else {
            if is_first {
                writeln!(
                    self.stream,
                    "{:<16}{:<16}{:<16}File",
                    "Offset", "Length", "Mapped to"
                )?;
            }
            write_line(&mut self.stream, part)?;
        }
        self.printed += 1;
        Ok(())
    }
}

fn failed(error: io::Error) -> Error {
    Error::generic(format!("cannot print: {}", reason(&error))).with_source(error)
}

fn write_json(stream: &mut impl Write, part: &Part) -> io::Result<()> {
    let location = &part.location;
    write!(
        stream,
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}",
        part.start,
        location.len,
        location.depth,
        location.present,
        location.zero,
        location.data,
        location.compressed,
    )?;
    if let Some(place) = &location.place {
        let name = Value::from(description::of_leaf(&place.file));
        write!(
            stream,
            ", \"offset\": {}, \"filename\": {name}",
            place.offset
        )?;
    }
    stream.write_all(b"}")
}

/// A line for what does not read as zeroes.
fn write_line(stream: &mut impl Write, part: &Part) -> io::Result<()> {
    let location = &part.location;
    if !location.data || location.zero {
        return Ok(());
    }
    let (place, name) = match &location.place {
        Some(place) => (
            format!("{:#x}", place.offset),
            description::of_leaf(&place.file),
        ),
        None if location.compressed => ("compressed".to_owned(), String::new()),
        None => (String::new(), String::new()),
    };
    let (start, len) = (format!("{:#x}", part.start), format!("{:#x}", location.len));
    let line = format!("{start:<16}{len:<16}{place:<16}{name}");
    writeln!(stream, "{}", line.trim_end())
}
