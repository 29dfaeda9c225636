//! Takes descriptors that whoever started the daemon left open for it: by their number, or by the
//! name that a service manager gave them (`FileDescriptorName=` of a systemd socket unit).

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use stord_qmp::Error;

/// The first descriptor that a service manager passes (sd_listen_fds(3)).
const FIRST_PASSED: RawFd = 3;

/// The name of descriptors that were given none.
const UNNAMED: &str = "unknown";

/// Duplicates of the descriptors of that name, or of the one of that number; they stay open.
/// Several have one name where a service manager listens on several addresses for one purpose.
///
/// # Errors
/// No descriptor has the number or the name.
pub fn duplicate_all(text: &str) -> Result<Vec<OwnedFd>, Error> {
    let numbers = match text.parse::<RawFd>() {
        Ok(number) => vec![number],
        Err(_) => Passed::of_process().find(text)?,
    };
    let mut numbers = numbers.into_iter();
    numbers.try_fold(Vec::new(), |mut all, number| {
        all.push(get(number).map_err(|error| {
            let reason = Error::reason(&error);
            Error::generic(format!("Could not use file descriptor '{text}': {reason}"))
                .with_source(error)
        })?);
        Ok(all)
    })
}

/// What a service manager has passed, by name.
#[derive(Debug, Default, PartialEq, Eq)]
struct Passed(Vec<(String, RawFd)>);

impl Passed {
    /// What was passed to this process.
    fn of_process() -> Self {
        let variable = |name: &str| std::env::var(name).ok();
        Self::read(variable, std::process::id()).unwrap_or_default()
    }

    /// What the variables say; none if they are not for the process of that id.
    fn read(variable: impl Fn(&str) -> Option<String>, process: u32) -> Option<Self> {
        if variable("LISTEN_PID")?.parse() != Ok(process) {
            return None;
        }
        let count: RawFd = variable("LISTEN_FDS")?.parse().ok()?;
        let names = variable("LISTEN_FDNAMES").unwrap_or_default();
        let names = names.split(':').map(str::to_owned);
        let names = names.chain(std::iter::repeat(String::new()));
        let named = names.map(|name| match name.is_empty() {
            true => UNNAMED.to_owned(),
            false => name,
        });
        let last = FIRST_PASSED.checked_add(count)?;
        Some(Self(named.zip(FIRST_PASSED..last).collect()))
    }

    fn find(&self, name: &str) -> Result<Vec<RawFd>, Error> {
        let found = self.0.iter().filter(|(other, _)| other == name);
        let found: Vec<_> = found.map(|(_, number)| *number).collect();
        if !found.is_empty() {
            return Ok(found);
        }
        let error = Error::generic(format!("Unable to parse FD number {name}"));
        if self.0.is_empty() {
            return Err(error);
        }
        let mut names: Vec<&str> = self.0.iter().map(|(name, _)| name.as_str()).collect();
        names.dedup();
        let names = names.join(", ");
        Err(error.with_hint(format!("The service manager has passed: {names}")))
    }
}

fn get(number: RawFd) -> io::Result<OwnedFd> {
    let process = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Option<Passed> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Passed::read(variable, 7)
    }

    #[test]
    fn names_lead_to_all_their_descriptors() {
        let variables = [
            ("LISTEN_PID", "7"),
            ("LISTEN_FDS", "4"),
            ("LISTEN_FDNAMES", "monitor:nbd:nbd"),
        ];
        let passed = read(&variables).expect("they are for us");
        let find = |name: &str| {
            passed
                .find(name)
                .map_err(|error| (error.message, error.hint))
        };
        assert_eq!(find("monitor"), Ok(vec![3]));
        assert_eq!(find("nbd"), Ok(vec![4, 5]));
        assert_eq!(find("unknown"), Ok(vec![6]));
        assert_eq!(
            find("other"),
            Err((
                "Unable to parse FD number other".to_owned(),
                Some("The service manager has passed: monitor, nbd, unknown".to_owned())
            ))
        );
    }

    #[test]
    fn variables_for_another_process_count_for_nothing() {
        assert_eq!(read(&[("LISTEN_PID", "8"), ("LISTEN_FDS", "1")]), None);
        assert_eq!(read(&[("LISTEN_PID", "7"), ("LISTEN_FDS", "x")]), None);
        assert_eq!(read(&[("LISTEN_FDS", "1")]), None);
        let empty = read(&[("LISTEN_PID", "7"), ("LISTEN_FDS", "-1")]);
        assert_eq!(empty, Some(Passed::default()));
        let huge = read(&[("LISTEN_PID", "7"), ("LISTEN_FDS", "2147483647")]);
        assert_eq!(huge, None);
        let error = Passed::default()
            .find("abc")
            .expect_err("nothing was passed");
        assert_eq!(error.hint, None);
    }
}
