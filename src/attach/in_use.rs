//! Who uses a block device: asked before it is taken away, and said when it is not.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::libc;
use nix::unistd::syncfs;
use stord_qmp::Error;

use crate::report::reason;

/// Programs that look at every new device, such as udev's, may have it open for so long.
const PATIENCE: Duration = Duration::from_secs(2);
/// Time between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Makes sure that nobody uses the device and that all of it is written out. As long as the result is held, nobody can mount it.
/// With `force`, whatever can be done of that is done.
///
/// # Errors
/// Somebody uses it, or what the kernel holds cannot be written.
pub fn seize(device: &Path, force: bool) -> Result<Option<File>, Error> {
    let shown = device.display();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let opened = exclusively(device);
        let users = users(device);
        match opened {
            Ok(file) if users.is_empty() || force => {
                return match file.sync_all() {
                    Err(error) if !force => {
                        let reason = reason(&error);
                        Err(
                            Error::generic(format!("cannot write '{shown}' out: {reason}"))
                                .with_hint("What was written may be lost with --force."),
                        )
                    }
                    _ => Ok(Some(file)),
                };
            }
            Err(error) if error.kind() != io::ErrorKind::ResourceBusy => {
                if force {
                    return Ok(None);
                }
                let reason = reason(&error);
                return Err(Error::generic(format!("cannot open '{shown}': {reason}")));
            }
            _ if force => {
                write_out(device);
                return Ok(None);
            }
            _ if Instant::now() > deadline => return Err(in_use(device, &users)),
            _ => sleep(LOOK_AGAIN),
        }
    }
}

/// Writes out what can be written of a device that is in use, mounted file systems first.
fn write_out(device: &Path) {
    let parts = with_partitions(device);
    for mount in mounts().iter().filter(|mount| mount.is_of(&parts)) {
        if let Ok(directory) = File::open(&mount.at) {
            let _ = syncfs(&directory);
        }
    }
    let _ = File::open(device).and_then(|file| file.sync_all());
}

fn in_use(device: &Path, users: &BTreeSet<String>) -> Error {
    let list: Vec<&str> = users.iter().map(String::as_str).collect();
    let shown = device.display();
    let error = Error::generic(match list.join("; ") {
        list if list.is_empty() => format!("'{shown}' is in use"),
        list => format!("'{shown}' is in use: {list}"),
    });
    error.with_hint("Its users get errors if you detach it with --force.")
}

/// Opens the device unless somebody has claimed it, or a partition of it, for a mount and the like.
fn exclusively(device: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_EXCL).open(device)
}

/// Whether the device is a virtio disk of VDUSE, with a daemon or waiting for one.
pub fn is_served_by_vduse(device: &Path) -> bool {
    let name = device.file_name().unwrap_or_default();
    let place = fs::canonicalize(Path::new("/sys/class/block").join(name));
    place.is_ok_and(|place| place.components().any(|part| part.as_os_str() == "vduse"))
}

/// Who uses the device or a partition of it, but this process.
fn users(device: &Path) -> BTreeSet<String> {
    let parts = with_partitions(device);
    let mut users = BTreeSet::new();
    let has = |path: &str| parts.iter().any(|part| part.path == Path::new(path));
    for mount in mounts() {
        if mount.is_of(&parts) {
            users.insert(format!("mounted at '{}'", mount.at));
        }
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for path in swaps.lines().filter_map(|line| line.split(' ').next()) {
        if has(path) {
            users.insert("used for swapping".to_owned());
        }
    }
    for part in &parts {
        users
            .extend(names(&part.directory.join("holders")).map(|name| format!("part of '{name}'")));
    }
    users.extend(openers(&parts));
    users
}

/// The device, or a partition of it.
struct Part {
    path: PathBuf,
    directory: PathBuf,
    /// As in `/proc/self/mountinfo`.
    number: String,
}

fn with_partitions(device: &Path) -> Vec<Part> {
    let name = device.file_name().unwrap_or_default();
    let whole = Path::new("/sys/class/block").join(name);
    let part = |directory: PathBuf| {
        let number = fs::read_to_string(directory.join("dev")).unwrap_or_default();
        Part {
            path: Path::new("/dev").join(directory.file_name().unwrap_or_default()),
            number: number.trim().to_owned(),
            directory,
        }
    };
    let mut parts = vec![part(whole.clone())];
    let inside = names(&whole).map(|name| whole.join(name));
    parts.extend(
        inside
            .filter(|directory| directory.join("partition").exists())
            .map(part),
    );
    parts
}

/// The names in a directory; none if it is not there.
fn names(directory: &Path) -> impl Iterator<Item = String> + use<> {
    let items = fs::read_dir(directory).into_iter().flatten().flatten();
    items.filter_map(|item| item.file_name().into_string().ok())
}

struct Mount {
    at: String,
    source: String,
    device: String,
}

impl Mount {
    fn is_of(&self, parts: &[Part]) -> bool {
        let source = Path::new(&self.source);
        let mut parts = parts.iter();
        parts.any(|part| part.path == source || part.number == self.device)
    }
}

fn mounts() -> Vec<Mount> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let table = String::from_utf8_lossy(&table);
    let parse = |line: &str| {
        let mut fields = line.split(' ');
        let device = fields.nth(2)?.to_owned();
        let at = fields.nth(1)?.replace("\\040", " ");
        fields.find(|field| *field == "-")?;
        let source = fields.nth(1)?.to_owned();
        Some(Mount { at, source, device })
    };
    table.lines().filter_map(parse).collect()
}

/// The processes that have one of the parts open. Only links are read, which never waits for a disk.
fn openers(parts: &[Part]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let own = std::process::id();
    for name in names(Path::new("/proc")) {
        let Some(pid) = name.parse::<u32>().ok().filter(|pid| *pid != own) else {
            continue;
        };
        let process = Path::new("/proc").join(&name);
        let has_it = names(&process.join("fd")).any(|number| {
            fs::read_link(process.join("fd").join(number))
                .is_ok_and(|target| parts.iter().any(|part| part.path == target))
        });
        if has_it {
            let program = fs::read_to_string(process.join("comm")).unwrap_or_default();
            found.insert(format!("open in process {pid} ({})", program.trim()));
        }
    }
    found
}
