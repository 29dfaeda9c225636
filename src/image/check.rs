//! `stord check`: looks for damage in an image, and repairs it if asked to.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};
use stord_block::Permissions;
use stord_block::drivers::format::qcow2::check::{Repair, Report, check};
use stord_block::graph::Claim;
use stord_qmp::Error;

use super::{FILE, Mode, Subject};
use crate::mount::guess::Format;

/// Exit status: the format has nothing to check.
const UNCHECKED: u8 = 63;
/// Findings that are shown.
const SHOWN: usize = 50;

/// Look for damage in a qcow2 image, and repair it.
///
/// The exit status is 0 for a sound image, 2 for errors, 3 for leaked space only, 1 if the check failed.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// The image
    file: PathBuf,
    /// Repair leaked space only, or everything that can be repaired
    #[arg(short, long, value_name = "WHAT")]
    repair: Option<What>,
    /// Print the counts as JSON, as qemu-img check does
    #[arg(long)]
    json: bool,
    /// Open the image as this format instead of guessing it
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Space that nothing uses
    Leaks,
    /// Errors too
    All,
}

/// Checks, and returns the exit status.
pub fn run(args: &CheckArgs) -> ExitCode {
    super::run(async |contexts, graph| {
        let subject = Subject::look_at(&graph, &args.file, args.format)?;
        let shown = args.file.display();
        if subject.format == Format::Raw {
            crate::report::Origin::none().error(&Error::generic(format!(
                "'{shown}' is a raw image, and those have nothing to check"
            )));
            return Ok(ExitCode::from(UNCHECKED));
        }
        let (repair, mode) = match args.repair {
            None => (Repair::Nothing, Mode::READ),
            Some(What::Leaks) => (Repair::Leaks, Mode::WRITE),
            Some(What::All) => (Repair::All, Mode::WRITE),
        };
        graph.blockdev_add(subject.file_options(mode)).await?;
        let mut permissions = Permissions::CONSISTENT_READ;
        if mode.writable {
            permissions |= Permissions::WRITABLE | Permissions::RESIZE;
        }
        let claim = Claim {
            permissions,
            shared: Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED,
        };
        let backend = graph.attach(FILE, "check", claim).await?;
        let checked = {
            let backend = backend.clone();
            let work = move || async move { check(&backend, repair).await };
            contexts.main().run(work).await
        };
        graph.detach(backend).await;
        let report = checked
            .map_err(|gone| Error::generic(gone.to_string()))?
            .map_err(|error| error.context(format!("cannot check '{shown}'")))?;
        if args.json {
            println!("{:#}", json(&report, &args.file.to_string_lossy()));
        } else {
            print!("{}", prose(&report, &shown.to_string()));
        }
        Ok(status(&report))
    })
}

fn status(report: &Report) -> ExitCode {
    ExitCode::from(if report.check_errors > 0 {
        1
    } else if report.corruptions > 0 {
        2
    } else if report.leaks > 0 {
        3
    } else {
        0
    })
}

fn json(report: &Report, filename: &str) -> Value {
    let mut members = Map::new();
    members.insert("filename".to_owned(), filename.into());
    members.insert("format".to_owned(), "qcow2".into());
    members.insert("check-errors".to_owned(), report.check_errors.into());
    for (name, count) in [
        ("image-end-offset", report.image_end_offset),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if count > 0 {
            members.insert(name.to_owned(), count.into());
        }
    }
    Value::Object(members)
}

fn prose(report: &Report, shown: &str) -> String {
    let mut text = String::new();
    for note in report.notes.iter().take(SHOWN) {
        text.push_str(&format!("  {note}\n"));
    }
    let more = (report.notes.len().saturating_sub(SHOWN) as u64) + report.notes_omitted;
    if more > 0 {
        text.push_str(&format!("  and {more} more findings\n"));
    }
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        text.push_str(&format!(
            "Repaired {} errors and {} leaked clusters.\n",
            report.corruptions_fixed, report.leaks_fixed
        ));
    }
    let verdict = match (report.check_errors, report.corruptions, report.leaks) {
        (0, 0, 0) => format!("'{shown}' is sound."),
        (0, 0, leaks) => format!(
            "'{shown}' has {leaks} leaked clusters: space is lost, but no data.\n\
             Get it back with: stord check --repair leaks '{shown}'"
        ),
        (0, errors, leaks) => format!(
            "'{shown}' has {errors} errors and {leaks} leaked clusters: data may be damaged, and \
             writing to it may damage more.\nMake a copy, then try: stord check --repair all '{shown}'"
        ),
        (failed, errors, leaks) => format!(
            "'{shown}' could not be checked in full: {failed} failures, {errors} errors and {leaks} \
             leaked clusters so far.\nMake a copy, then try: stord check --repair all '{shown}'"
        ),
    };
    text.push_str(&verdict);
    let total = report.total_clusters.max(1);
    text.push_str(&format!(
        "\n{} of {} clusters are stored ({}%), {} of them compressed, {} apart from their neighbours.\n",
        report.allocated_clusters,
        report.total_clusters,
        report.allocated_clusters.saturating_mul(100) / total,
        report.compressed_clusters,
        report.fragmented_clusters,
    ));
    text
}
