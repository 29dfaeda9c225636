//! `stord ps`: which daemons of this user run, and what they export.

use std::fmt::Write as _;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use stord_qmp::Error;

use crate::mount::registry::Registry;
use crate::presence::ENDING;
use crate::report::{self, Origin, reason};

/// How long a daemon may take to say what it does.
const PATIENCE: Duration = Duration::from_secs(3);

/// List the running daemons of this user, and what they export.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Print the list as JSON.
    #[arg(long)]
    json: bool,
}

/// Does what the arguments say, and returns the exit status.
pub fn run(args: &PsArgs) -> ExitCode {
    let daemons = match list(&Registry::of_user()) {
        Ok(daemons) => daemons,
        Err(error) => {
            let reason = reason(&error);
            let message = format!("cannot list the daemons: {reason}");
            Origin::none().error(&Error::generic(message).with_source(error));
            return ExitCode::FAILURE;
        }
    };
    report::print(&match args.json {
        true => format!("{:#}\n", Value::Array(daemons)),
        false => table(&daemons),
    });
    ExitCode::SUCCESS
}

/// What every daemon that runs says of itself, by process id.
fn list(registry: &Registry) -> io::Result<Vec<Value>> {
    let directory = registry.directory()?;
    let mut found = Vec::new();
    for item in std::fs::read_dir(directory)? {
        let path = item?.path();
        let is_socket = path.extension().is_some_and(|ending| ending == ENDING);
        let pid = path
            .file_stem()
            .and_then(|name| name.to_str()?.parse().ok());
        if let Some(pid) = pid.filter(|_| is_socket) {
            found.extend(ask(&path, pid).map(|daemon| (pid, daemon)));
        }
    }
    // Nothing is kept there for nobody.
    let _ = std::fs::remove_dir(directory);
    found.sort_by_key(|(pid, _)| *pid);
    Ok(found.into_iter().map(|(_, daemon)| daemon).collect())
}

/// What a daemon says of itself; none if it is gone, and then its socket is removed.
fn ask(path: &Path, pid: u32) -> Option<Value> {
    let silent = |reason: String| json!({"pid": pid, "error": reason});
    let mut stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => {
                let _ = std::fs::remove_file(path);
                return None;
            }
            io::ErrorKind::NotFound => return None,
            _ => return Some(silent(reason(&error))),
        },
    };
    let mut text = String::new();
    let read = stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.read_to_string(&mut text));
    match read {
        // It ended while we asked.
        Ok(0) => None,
        Ok(_) => match serde_json::from_str(&text) {
            Ok(daemon) => Some(daemon),
            Err(_) => Some(silent("it does not make sense".to_owned())),
        },
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Some(silent("it does not answer".to_owned()))
        }
        Err(error) => Some(silent(reason(&error))),
    }
}

/// The list for people: one line for each export, with the daemon's number and monitors at the first.
fn table(daemons: &[Value]) -> String {
    if daemons.is_empty() {
        return "No daemon runs.\n".to_owned();
    }
    let mut rows = vec![["PID", "MONITOR", "EXPORT", "IMAGE", "AT"].map(str::to_owned)];
    for daemon in daemons {
        let mut monitors = texts(&daemon["monitors"]).map(|name| shorten(&name));
        let mut exports: Vec<[String; 3]> = Vec::new();
        for export in daemon["exports"].as_array().into_iter().flatten() {
            let text = |key: &str| export[key].as_str().unwrap_or_default().to_owned();
            let what = format!("{} {}", text("type"), text("id"));
            let place = text(if export["device"].is_null() {
                "mountpoint"
            } else {
                "device"
            });
            exports.push([what, text("image"), place]);
        }
        if let Some(error) = daemon["error"].as_str() {
            exports.push([format!("({error})"), String::new(), String::new()]);
        }
        let mut exports = exports.into_iter();
        let mut pid = Some(daemon["pid"].to_string());
        loop {
            let (monitor, export) = (monitors.next(), exports.next());
            if pid.is_none() && monitor.is_none() && export.is_none() {
                break;
            }
            let [what, image, place] = export.unwrap_or_default();
            let pid = pid.take().unwrap_or_default();
            rows.push([pid, monitor.unwrap_or_default(), what, image, place]);
        }
    }
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..5).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            // Writing to a string does not fail.
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn texts(list: &Value) -> impl Iterator<Item = String> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned)
}

/// The address of a monitor without what is the same for all.
fn shorten(name: &str) -> String {
    let name = name.strip_prefix("disconnected:").unwrap_or(name);
    name.split(",server=on").next().unwrap_or(name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_export_and_monitor_has_its_line() {
        let export = |id: &str, place: Option<&str>| json!({"id": id, "type": "fuse", "image": "/i", "mountpoint": place});
        let daemons = [
            json!({"pid": 1, "monitors": ["disconnected:unix:/m,server=on"],
                "exports": [export("a", Some("/at")), export("b", None)]}),
            json!({"pid": 22, "monitors": [], "exports": []}),
            json!({"pid": 333, "error": "it does not answer"}),
        ];
        assert_eq!(
            table(&daemons),
            "PID  MONITOR  EXPORT                IMAGE  AT\n\
             1    unix:/m  fuse a                /i     /at\n     \
                           fuse b                /i\n\
             22\n\
             333           (it does not answer)\n"
                .replace("\n     fuse b", "\n              fuse b")
        );
        assert_eq!(table(&[]), "No daemon runs.\n");
    }
}
