//! `stord ls`: which images are attached, and as what.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use nix::unistd::geteuid;
use serde_json::{Value, json};
use stord_qmp::Error;

use super::detach::forget;
use super::in_use;
use crate::mount::registry::{Found, Registry};
use crate::mount::size_text;
use crate::report::{self, Origin};

/// List the attached devices.
#[derive(Clone, Debug, Args)]
pub struct LsArgs {
    /// Print the list as JSON.
    #[arg(long)]
    json: bool,
}

/// A device in the list.
struct Row {
    found: Found,
    is_served: bool,
    /// In bytes; none if the kernel has no such device.
    size: Option<u64>,
}

/// Does what the arguments say, and returns the exit status.
pub fn run(args: &LsArgs) -> ExitCode {
    if !geteuid().is_root() {
        let error = Error::generic("only root attaches devices, and sees which there are");
        Origin::none().error(&error.with_hint("Mounts of yours are listed with: stord ps"));
        return ExitCode::FAILURE;
    }
    let rows = list(&Registry::of_user());
    report::print(&match args.json {
        true => format!(
            "{:#}\n",
            Value::Array(rows.iter().map(Row::to_json).collect())
        ),
        false => table(&rows),
    });
    ExitCode::SUCCESS
}

fn list(registry: &Registry) -> Vec<Row> {
    let mut rows = Vec::new();
    for found in registry.devices() {
        let is_served = found.is_alive();
        if !is_served && !in_use::is_served_by_vduse(&found.entry.at) {
            forget(&found);
            continue;
        }
        rows.push(Row {
            is_served,
            size: size_of(&found.entry.at),
            found,
        });
    }
    rows.sort_by(|one, other| one.found.entry.at.cmp(&other.found.entry.at));
    rows
}

fn size_of(device: &Path) -> Option<u64> {
    let directory = Path::new("/sys/class/block").join(device.file_name()?);
    let sectors = std::fs::read_to_string(directory.join("size")).ok()?;
    sectors.trim().parse::<u64>().ok()?.checked_mul(512)
}

impl Row {
    fn to_json(&self) -> Value {
        let entry = &self.found.entry;
        let device = entry.device.as_ref();
        json!({
            "device": entry.at.to_str(),
            "image": entry.image.to_str(),
            "via": device.map(|device| &device.via),
            "pid": entry.pid,
            "size": self.size,
            "read-only": device.map(|device| device.read_only),
            "serial": device.and_then(|device| device.serial.as_ref()),
            "cdi": device.and_then(|device| device.cdi.as_ref()),
            "served": self.is_served,
        })
    }

    fn cells(&self) -> [String; 5] {
        let entry = &self.found.entry;
        let device = entry.device.as_ref();
        let mut via = device.map_or(String::new(), |device| device.via.clone());
        if device.is_some_and(|device| device.read_only) {
            via.push_str(" (read-only)");
        }
        let pid = if self.is_served {
            entry.pid.to_string()
        } else {
            "dead".to_owned()
        };
        [
            entry.at.display().to_string(),
            self.size.map_or_else(String::new, size_text),
            via,
            pid,
            entry.image.display().to_string(),
        ]
    }
}

/// The list for people.
fn table(rows: &[Row]) -> String {
    if rows.is_empty() {
        return "No device is attached.\n".to_owned();
    }
    let mut lines = vec![["DEVICE", "SIZE", "VIA", "PID", "IMAGE"].map(str::to_owned)];
    lines.extend(rows.iter().map(Row::cells));
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..5).map(width).collect();
    let mut text = String::new();
    for cells in &lines {
        let mut line = String::new();
        for (cell, width) in cells.iter().zip(&widths) {
            // Writing to a string does not fail.
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
