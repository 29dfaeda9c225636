//! `stord snapshot`: snapshots inside a qcow2 image.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::Value;
use stord_block::Graph;
use stord_qmp::schema::node_info::SnapshotInfo;
use stord_qmp::{Error, to_json};

use super::{IMAGE, Mode, Subject};
use crate::mount::guess::Format;
use crate::mount::size_text;

/// Make, list, bring back and delete snapshots inside a qcow2 image.
#[derive(Clone, Debug, Args)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Clone, Debug, Subcommand)]
enum Action {
    /// Show the snapshots
    List {
        /// The image
        file: PathBuf,
        /// Print them as JSON, as qemu-img info does
        #[arg(long)]
        json: bool,
        /// Read along although another program writes to the image: what is shown may be inconsistent
        #[arg(short = 'U', long)]
        force_share: bool,
    },
    /// Keep the present content under a name
    Create {
        /// The image
        file: PathBuf,
        /// The name of the snapshot
        name: String,
    },
    /// Bring a snapshot's content back; what the image holds now is lost
    Apply {
        /// The image
        file: PathBuf,
        /// The name of the snapshot, or its id
        name: String,
    },
    /// Delete a snapshot, and give its space back
    Delete {
        /// The image
        file: PathBuf,
        /// The name of the snapshot, or its id
        name: String,
    },
}

/// Does it, and returns the exit status.
pub fn run(args: &SnapshotArgs) -> ExitCode {
    let action = args.action.clone();
    super::run(async move |_, graph| {
        act(&graph, &action).await?;
        Ok(ExitCode::SUCCESS)
    })
}

async fn act(graph: &Graph, action: &Action) -> Result<(), Error> {
    match action {
        Action::List {
            file,
            json,
            force_share,
        } => {
            let mode = Mode {
                force_share: *force_share,
                ..Mode::READ
            };
            open(graph, file, mode).await?;
            let list = graph.snapshots(IMAGE)?;
            if *json {
                let list: Vec<Value> = list.iter().map(to_json).collect();
                println!("{:#}", Value::Array(list));
            } else {
                print!("{}", table(&list));
            }
            Ok(())
        }
        Action::Create { file, name } => {
            open(graph, file, Mode::WRITE).await?;
            graph.create_snapshot(IMAGE, name).await?;
            println!("'{}' has the snapshot '{name}' now.", file.display());
            Ok(())
        }
        Action::Apply { file, name } => {
            open(graph, file, Mode::WRITE).await?;
            let snapshot = find(graph, name)?;
            graph.apply_snapshot(IMAGE, &snapshot.id).await?;
            println!("'{}' holds what it held in '{name}'.", file.display());
            Ok(())
        }
        Action::Delete { file, name } => {
            open(graph, file, Mode::WRITE).await?;
            let snapshot = find(graph, name)?;
            let (id, tag) = (snapshot.id.as_str(), snapshot.name.as_str());
            graph.delete_snapshot(IMAGE, Some(id), Some(tag)).await?;
            println!("Deleted the snapshot '{tag}' of '{}'.", file.display());
            Ok(())
        }
    }
}

async fn open(graph: &Graph, file: &std::path::Path, mode: Mode) -> Result<(), Error> {
    let subject = Subject::look_at(graph, file, None)?;
    if subject.format == Format::Raw {
        return Err(Error::generic(format!(
            "'{}' is a raw image, and those have no snapshots",
            file.display()
        )));
    }
    // What lies behind the image does not matter here.
    graph.blockdev_add(subject.options(mode, true)).await
}

/// The one snapshot that has this name or this id.
fn find(graph: &Graph, name: &str) -> Result<SnapshotInfo, Error> {
    let list = graph.snapshots(IMAGE)?;
    let mut found = list
        .iter()
        .filter(|snapshot| snapshot.name == name || snapshot.id == name);
    match (found.next(), found.next()) {
        (Some(snapshot), None) => Ok(snapshot.clone()),
        (None, _) => Err(Error::generic(format!("there is no snapshot '{name}'"))
            .with_hint("See what there is with: stord snapshot list IMAGE")),
        (Some(_), Some(_)) => Err(Error::generic(format!(
            "several snapshots have '{name}' for a name or an id"
        ))
        .with_hint("Take the name or the id that is unique: stord snapshot list IMAGE")),
    }
}

fn table(list: &[SnapshotInfo]) -> String {
    let mut text = format!(
        "{:<6} {:<24} {:<20} {}\n",
        "ID", "NAME", "MADE (UTC)", "STATE"
    );
    for snapshot in list {
        let state = u64::try_from(snapshot.vm_state_size).unwrap_or(0);
        text.push_str(&format!(
            "{:<6} {:<24} {:<20} {}\n",
            snapshot.id,
            snapshot.name,
            date(snapshot.date_sec),
            if state == 0 {
                "-".to_owned()
            } else {
                size_text(state)
            },
        ));
    }
    text
}

/// A time in seconds since 1970 as a date of the Gregorian calendar, in UTC.
fn date(seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years that begin in March have the leap day at their end; 400 of them are an era.
    let day = days + 719_468;
    let (era, day) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = year + era * 400 + carry;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_709_251_199, "2024-02-29 23:59:59"),
            (1_709_251_200, "2024-03-01 00:00:00"),
            (4_294_967_295, "2106-02-07 06:28:15"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}
