//! `/dev/fdset/N`: the names under which QEMU finds descriptors that `add-fd` collected. A storage
//! daemon has no such command, so that no set is ever there: such a name is never a path, and
//! opening it fails as it does in the reference.

use std::io;

use rustix::io::Errno;

/// What is before the number.
const PREFIX: &str = "/dev/fdset/";

/// Why a name of a set of descriptors leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unopenable {
    /// What stands in the place of the number is none.
    Malformed,
    /// There are no sets.
    Absent,
}

impl Unopenable {
    /// Why that path cannot be opened, if it names a set.
    pub fn of(path: &str) -> Option<Self> {
        let number = path.strip_prefix(PREFIX)?;
        Some(match number.parse::<u32>() {
            Ok(number) if i32::try_from(number).is_ok() => Self::Absent,
            _ => Self::Malformed,
        })
    }

    /// The number of the system's error that says so.
    pub fn errno(self) -> i32 {
        let errno = match self {
            Self::Malformed => Errno::INVAL,
            Self::Absent => Errno::NOSYS,
        };
        errno.raw_os_error()
    }
}

/// Refuses paths that name a set.
///
/// # Errors
/// The path does.
pub fn refuse(path: &str) -> io::Result<()> {
    Unopenable::of(path).map_or(Ok(()), |why| Err(io::Error::from_raw_os_error(why.errno())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_told_from_paths() {
        for (path, expected) in [
            ("/dev/fdset", None),
            ("/dev/null", None),
            ("dev/fdset/1", None),
            ("/dev/fdset/1", Some(Unopenable::Absent)),
            ("/dev/fdset/+1", Some(Unopenable::Absent)),
            ("/dev/fdset/", Some(Unopenable::Malformed)),
            ("/dev/fdset/-1", Some(Unopenable::Malformed)),
            ("/dev/fdset/1x", Some(Unopenable::Malformed)),
            ("/dev/fdset/4294967296", Some(Unopenable::Malformed)),
        ] {
            assert_eq!(Unopenable::of(path), expected, "{path}");
        }
        assert_eq!(
            refuse("/dev/fdset/1").map_err(|error| error.raw_os_error()),
            Err(Some(Errno::NOSYS.raw_os_error()))
        );
        assert!(refuse("/dev/null").is_ok());
    }
}
