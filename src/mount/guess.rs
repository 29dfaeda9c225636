//! Decides once, by what an image begins and ends with and by its name, how it is to be opened.
//!
//! What a guest wrote to a raw image may look like any other format, so a guess is only good if
//! the name does not speak against it: where the two disagree the user has to say the format.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use clap::ValueEnum;
use stord_qmp::Error;

/// Bytes from the beginning of an image that its format can be told from.
const HEAD: usize = 4096;

/// Bytes from its end.
const TAIL: usize = 512;

/// A format that can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The bytes are the disk's.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl Format {
    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::value_variants()
            .iter()
            .copied()
            .find(|format| format.name() == name)
    }

    /// The name by which users know it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What the content looks like: a format of which we may not have the driver, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    name: &'static str,
    format: Option<Format>,
}

/// Where a format's mark is.
enum Mark {
    /// So many bytes after the beginning.
    Head(usize, &'static [u8]),
    /// So many bytes after the beginning of the last 512.
    Tail(usize, &'static [u8]),
}

const QCOW2: Look = Look {
    name: "qcow2",
    format: Some(Format::Qcow2),
};

const fn unbuilt(name: &'static str) -> Look {
    Look { name, format: None }
}

const LOOKS: &[(Mark, Look)] = &[
    (Mark::Head(0, b"QFI\xfb\0\0\0\x02"), QCOW2),
    (Mark::Head(0, b"QFI\xfb\0\0\0\x03"), QCOW2),
    (Mark::Head(0, b"QFI\xfb"), unbuilt("qcow")),
    (Mark::Head(0, b"QED\0"), unbuilt("qed")),
    (Mark::Head(0, b"KDMV"), unbuilt("vmdk")),
    (Mark::Head(0, b"COWD"), unbuilt("vmdk")),
    (Mark::Head(0, b"# Disk DescriptorFile"), unbuilt("vmdk")),
    (Mark::Head(0, b"vhdxfile"), unbuilt("vhdx")),
    (Mark::Head(0, b"conectix"), unbuilt("vpc")),
    (Mark::Tail(0, b"conectix"), unbuilt("vpc")),
    (Mark::Head(0x40, b"\x7f\x10\xda\xbe"), unbuilt("vdi")),
    (Mark::Head(0, b"WithoutFreeSpace"), unbuilt("parallels")),
    (Mark::Head(0, b"WithouFreSpacExt"), unbuilt("parallels")),
    (Mark::Head(0, b"LUKS\xba\xbe"), unbuilt("luks")),
    (Mark::Head(0, b"Bochs Virtual HD Image"), unbuilt("bochs")),
    (Mark::Head(0, b"#!/bin/sh\n#V2.0 Format"), unbuilt("cloop")),
    (Mark::Tail(0, b"koly"), unbuilt("dmg")),
];

/// File name endings that promise a format.
const ENDINGS: &[(&str, &str)] = &[
    ("raw", "raw"),
    ("qcow2", "qcow2"),
    ("qcow", "qcow"),
    ("qed", "qed"),
    ("vmdk", "vmdk"),
    ("vhdx", "vhdx"),
    ("vhd", "vpc"),
    ("vdi", "vdi"),
    ("dmg", "dmg"),
];

/// Guesses the format of an image of so many bytes.
///
/// # Errors
/// The content and the name disagree, or the format is one that cannot be opened.
pub fn guess(path: &Path, file: &File, size: u64) -> Result<Format, Error> {
    let mut head = vec![0; HEAD];
    let mut tail = vec![0; TAIL];
    let read = read_up_to(file, &mut head, 0).and_then(|head_len| {
        let tail_at = size.saturating_sub(TAIL as u64);
        Ok((head_len, read_up_to(file, &mut tail, tail_at)?))
    });
    let (head_len, tail_len) = read.map_err(|error| {
        let reason = crate::report::reason(&error);
        Error::generic(format!("cannot read '{}': {reason}", path.display())).with_source(error)
    })?;
    head.truncate(head_len);
    tail.truncate(tail_len);
    decide(path, look_at(&head, &tail))
}

fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn look_at(head: &[u8], tail: &[u8]) -> Option<Look> {
    let has = |bytes: &[u8], at: usize, mark: &[u8]| {
        bytes.get(at..).is_some_and(|rest| rest.starts_with(mark))
    };
    LOOKS
        .iter()
        .find(|(mark, _)| match mark {
            Mark::Head(at, mark) => has(head, *at, mark),
            Mark::Tail(at, mark) => has(tail, *at, mark),
        })
        .map(|(_, look)| *look)
}

fn decide(path: &Path, look: Option<Look>) -> Result<Format, Error> {
    let ending = path.extension().and_then(|ending| ending.to_str());
    let promised = ending.and_then(|ending| {
        let known = ENDINGS
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(ending));
        known.map(|(_, format)| *format)
    });
    let file = path.display();
    match (look, promised) {
        (Some(look), Some("raw")) => Err(Error::generic(format!(
            "'{file}' is named like a raw image, but looks like {}",
            look.name
        ))
        .with_hint(
            "A guest can make its raw disk look so. Say which it is with --format raw or \
             --format qcow2.",
        )),
        (Some(Look { name, format: None }), _) => Err(Error::generic(format!(
            "'{file}' looks like {name}, a format that stord cannot open yet"
        ))
        .with_hint("If it is a raw image all the same, say so with --format raw.")),
        (
            Some(Look {
                format: Some(format),
                ..
            }),
            _,
        ) => Ok(format),
        (None, None | Some("raw")) => Ok(Format::Raw),
        (None, Some(promised)) => Err(Error::generic(format!(
            "'{file}' is named like a {promised} image, but does not look like one"
        ))
        .with_hint("If it is a raw image all the same, say so with --format raw.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guess_of(name: &str, head: &[u8], tail: &[u8]) -> Result<Format, String> {
        decide(Path::new(name), look_at(head, tail)).map_err(|error| error.message)
    }

    #[test]
    fn content_decides_where_the_name_says_nothing() {
        assert_eq!(
            guess_of("a.img", b"QFI\xfb\0\0\0\x03...", b""),
            Ok(Format::Qcow2)
        );
        assert_eq!(guess_of("a", b"QFI\xfb\0\0\0\x02", b""), Ok(Format::Qcow2));
        assert_eq!(guess_of("a.img", &[0; 4096], &[0; 512]), Ok(Format::Raw));
        assert_eq!(guess_of("a.img", b"", b""), Ok(Format::Raw));
    }

    #[test]
    fn raw_image_is_not_opened_as_what_its_guest_wrote() {
        assert!(guess_of("a.raw", b"QFI\xfb\0\0\0\x03", b"").is_err());
        assert!(guess_of("a.RAW", b"KDMV", b"").is_err());
    }

    #[test]
    fn misnamed_image_is_not_opened_as_raw() {
        let message = guess_of("a.qcow2", &[0; 512], b"").expect_err("no qcow2 there");
        assert_eq!(
            message,
            "'a.qcow2' is named like a qcow2 image, but does not look like one"
        );
    }

    #[test]
    fn formats_without_a_driver_are_named() {
        assert!(guess_of("a", b"KDMV", b"").is_err_and(|m| m.contains("vmdk")));
        assert!(guess_of("a", b"QFI\xfb\0\0\0\x01", b"").is_err_and(|m| m.contains("qcow,")));
        assert!(guess_of("a", &[0; 512], b"conectix").is_err_and(|m| m.contains("vpc")));
    }

    #[test]
    fn marks_outside_a_short_file_are_not_looked_for() {
        assert_eq!(guess_of("a", b"QFI", b"kol"), Ok(Format::Raw));
    }
}
