//! What is mounted where, as the kernel lists it in `/proc/self/mountinfo` (proc(5)).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::statfs;

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is.
    pub path: PathBuf,
    /// The file system's type.
    pub kind: String,
    /// What the file system says it comes from.
    pub source: String,
}

impl Mount {
    /// Whether a stord made it.
    pub fn is_ours(&self) -> bool {
        self.kind.starts_with("fuse") && self.source == "stord"
    }
}

/// The mount at the path, the topmost if there are several.
pub fn mount_at(path: &Path) -> Option<Mount> {
    let table = std::fs::read("/proc/self/mountinfo").ok()?;
    let mounts = table.split(|byte| *byte == b'\n').filter_map(parse);
    mounts.rev().find(|mount| mount.path == path)
}

/// Whether the process that served the file system at the path is gone. Waits for one that is not.
pub fn is_dead(path: &Path) -> bool {
    // Unlike a stat, this is not answered from what the kernel remembers. A daemon whose end is not complete yet lets it wait, and
    // then fail in the second way.
    statfs(path).is_err_and(|errno| matches!(errno, Errno::ENOTCONN | Errno::ECONNABORTED))
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let path = unescape(fields.nth(4)?);
    // Optional fields end with a dash.
    fields.find(|field| *field == b"-")?;
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    Some(Mount {
        path: PathBuf::from(OsString::from_vec(path)),
        kind: text(fields.next()?),
        source: text(fields.next()?),
    })
}

/// Undoes the kernel's `\ooo` for blanks and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match octal {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_with_optional_fields_and_blanks_is_read() {
        let line = b"36 35 0:42 / /mnt/a\\040b\\134 rw,nosuid shared:1 master:2 - fuse stord rw";
        let mount = parse(line).expect("a good line");
        assert_eq!(mount.path, Path::new("/mnt/a b\\"));
        assert!(mount.is_ours());
    }

    #[test]
    fn other_mounts_are_not_ours() {
        let line = b"36 35 0:42 / /mnt rw - fuse.sshfs host: rw";
        assert!(!parse(line).expect("a good line").is_ours());
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"1 2 3 4 5 6"), None);
    }

    #[test]
    fn root_is_mounted() {
        assert!(mount_at(Path::new("/")).is_some());
    }
}
