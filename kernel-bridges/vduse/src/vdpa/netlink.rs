//! Generic netlink as far as one family needs it: requests and their answers, one at a time.
//!
//! See netlink(7) and Documentation/userspace-api/netlink/intro.rst of the kernel.

// UNSAFETY: setsockopt(2) for an option without a safe binding, and close_range(2), which closes descriptors of a thread that has a table
// of its own and does nothing with any but the one that stays.
#![expect(unsafe_code, reason = "two system calls have no safe binding")]

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use super::Error;
use super::attributes::{Attribute, Attributes, Payload};

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct genlmsghdr`.
const GENERIC: usize = 4;

const FLAG_REQUEST: u16 = 1;
const FLAG_ACK: u16 = 4;
const FLAG_DUMP: u16 = 0x300;
/// Of an acknowledgement: the request is not repeated in it, and attributes follow.
const FLAG_CAPPED: u16 = 0x100;
const FLAG_ACK_ATTRIBUTES: u16 = 0x200;

const KIND_ERROR: u16 = 2;
const KIND_DONE: u16 = 3;
/// The attribute of an acknowledgement that says in words what is wrong.
const ACK_MESSAGE: u16 = 1;

/// The family that tells of families, always there.
const CONTROL: u16 = 0x10;
const CONTROL_GET_FAMILY: u8 = 3;
const CONTROL_FAMILY_ID: u16 = 1;
const CONTROL_FAMILY_NAME: u16 = 2;

/// Longer than any message of these families.
const LONGEST: usize = 64 << 10;

/// A generic netlink family, and a connection to ask it.
#[derive(Debug)]
pub(super) struct Family {
    socket: OwnedFd,
    id: u16,
}

/// A message of the family.
#[derive(Debug)]
pub(super) struct Answer(Vec<u8>);

impl Answer {
    pub(super) fn attributes(&self) -> &[u8] {
        &self.0
    }

    #[cfg(test)]
    pub(super) fn of(attributes: &[Attribute<'_>]) -> Self {
        let mut bytes = Vec::new();
        for attribute in attributes {
            attribute.append_to(&mut bytes);
        }
        Self(bytes)
    }
}

impl Family {
    /// Finds a family.
    ///
    /// # Errors
    /// `NotFound` if the kernel has none of that name.
    pub(super) fn connect(name: &str) -> Result<Self, Error> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkGeneric,
        )?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            // Without it, errors have no words.
            let _ = set_option(&socket, option);
        }
        let control = Self {
            socket,
            id: CONTROL,
        };
        let name = [Attribute::new(CONTROL_FAMILY_NAME, Payload::Text(name))];
        let answers = control.request(CONTROL_GET_FAMILY, &name)?;
        let id = answers
            .first()
            .and_then(|answer| Attributes::new(answer.attributes()).u16(CONTROL_FAMILY_ID));
        Ok(Self {
            socket: control.socket,
            id: id.ok_or(Errno::ENOENT)?,
        })
    }

    /// Has a command done, and gives what it answers.
    pub(super) fn request(
        &self,
        command: u8,
        attributes: &[Attribute<'_>],
    ) -> Result<Vec<Answer>, Error> {
        let request = encode(self.id, command, FLAG_REQUEST | FLAG_ACK, attributes);
        exchange(&self.socket, &request)
    }

    /// Has a command done that lists things.
    pub(super) fn dump(&self, command: u8) -> Result<Vec<Answer>, Error> {
        let request = encode(self.id, command, FLAG_REQUEST | FLAG_DUMP, &[]);
        exchange(&self.socket, &request)
    }

    /// The same as [`request`](Self::request), on a thread that shares no descriptors with the process. Descriptors of a process go when the last thread
    /// does that shares them, and one that waits for a device in the kernel may not go before another process serves the device: which
    /// could not open it then.
    pub(super) fn request_alone(
        self,
        command: u8,
        attributes: &[Attribute<'_>],
    ) -> Result<Vec<Answer>, Error> {
        let request = encode(self.id, command, FLAG_REQUEST | FLAG_ACK, attributes);
        let thread = std::thread::Builder::new()
            .name("vdpa".into())
            .spawn(move || {
                keep_only(&self.socket)?;
                exchange(&self.socket, &request)
            })?;
        thread.join().expect("it does not panic")
    }
}

/// Leaves the calling thread with that descriptor only; the process keeps all.
fn keep_only(kept: &OwnedFd) -> Result<(), Errno> {
    let kept = libc::c_uint::try_from(kept.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    let close = |first: libc::c_uint, last: libc::c_uint| {
        // SAFETY: the flag gives this thread a table of its own before anything is closed in it. It holds no other descriptor.
        let result = unsafe {
            libc::syscall(
                libc::SYS_close_range,
                first,
                last,
                libc::CLOSE_RANGE_UNSHARE,
            )
        };
        Errno::result(result).map(drop)
    };
    close(kept + 1, libc::c_uint::MAX)?;
    match kept.checked_sub(1) {
        Some(last) => close(0, last),
        None => Ok(()),
    }
}

fn set_option(socket: &OwnedFd, option: libc::c_int) -> Result<(), Errno> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).expect("four");
    // SAFETY: reads one int, which lives across the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            (&raw const on).cast(),
            length,
        )
    };
    Errno::result(result).map(drop)
}

fn encode(family: u16, command: u8, flags: u16, attributes: &[Attribute<'_>]) -> Vec<u8> {
    let mut message = vec![0; HEADER];
    message.extend([command, 1, 0, 0]);
    for attribute in attributes {
        attribute.append_to(&mut message);
    }
    let length = u32::try_from(message.len()).expect("names are short");
    message[0..4].copy_from_slice(&length.to_ne_bytes());
    message[4..6].copy_from_slice(&family.to_ne_bytes());
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
    // There is one request at a time.
    message[8..12].copy_from_slice(&1u32.to_ne_bytes());
    message
}

fn exchange(socket: &OwnedFd, request: &[u8]) -> Result<Vec<Answer>, Error> {
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), request, &kernel, MsgFlags::empty())?;
    let mut answers = Vec::new();
    let mut buffer = vec![0; LONGEST];
    loop {
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(Errno::EINTR) => continue,
            received => received?,
        };
        if take(&buffer[..length], &mut answers)? {
            return Ok(answers);
        }
    }
}

/// Takes the messages of one datagram. True after the last of the answer.
fn take(datagram: &[u8], answers: &mut Vec<Answer>) -> Result<bool, Error> {
    let mut rest = datagram;
    while let Some((head, _)) = rest.split_first_chunk::<HEADER>() {
        let word = |at: usize| [head[at], head[at + 1]];
        let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]);
        let length = usize::try_from(length).map_err(|_| Errno::EBADMSG)?;
        let (kind, flags) = (u16::from_ne_bytes(word(4)), u16::from_ne_bytes(word(6)));
        let payload = rest.get(HEADER..length).ok_or(Errno::EBADMSG)?;
        match kind {
            KIND_ERROR | KIND_DONE => {
                return acknowledgement(kind, flags, payload).map(|()| true);
            }
            _ => {
                let attributes = payload.get(GENERIC..).ok_or(Errno::EBADMSG)?;
                answers.push(Answer(attributes.to_vec()));
            }
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(false)
}

fn acknowledgement(kind: u16, flags: u16, payload: &[u8]) -> Result<(), Error> {
    let Some((code, rest)) = payload.split_first_chunk::<4>() else {
        // A list may end without a word.
        return Ok(());
    };
    let code = i32::from_ne_bytes(*code);
    if code == 0 {
        return Ok(());
    }
    let mut message = None;
    if flags & FLAG_ACK_ATTRIBUTES != 0 {
        // The header of the request is in front of them, or all of it.
        let skipped = match (kind, rest.first_chunk::<4>()) {
            (KIND_ERROR, _) if flags & FLAG_CAPPED != 0 => HEADER,
            (KIND_ERROR, Some(length)) => {
                let length = usize::try_from(u32::from_ne_bytes(*length));
                length.unwrap_or(usize::MAX).saturating_add(3) & !3
            }
            _ => 0,
        };
        let attributes = rest.get(skipped..).unwrap_or(&[]);
        message = Attributes::new(attributes).text(ACK_MESSAGE);
    }
    Err(Error::new(Errno::from_raw(code.saturating_neg()), message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + payload.len()).expect("short");
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_request_has_its_length_family_and_command() {
        let request = encode(30, 4, 5, &[Attribute::new(4, Payload::Text("d"))]);
        assert_eq!(request.len(), 16 + 4 + 8);
        assert_eq!(request[0..4], 28u32.to_ne_bytes());
        assert_eq!(request[4..6], 30u16.to_ne_bytes());
        assert_eq!(request[6..8], 5u16.to_ne_bytes());
        assert_eq!(request[16..18], [4, 1]);
    }

    #[test]
    fn answers_come_before_the_acknowledgement() {
        let mut answers = Vec::new();
        let answer = message(30, 0, &[1, 1, 0, 0, 8, 0, 5, 0, 2, 0, 0, 0]);
        let done = message(KIND_ERROR, FLAG_CAPPED, &[0; 20]);
        let both = [answer, done].concat();
        assert!(take(&both, &mut answers).expect("whole"));
        assert_eq!(answers.len(), 1);
        assert_eq!(Attributes::new(answers[0].attributes()).u32(5), Some(2));
    }

    #[test]
    fn a_refusal_is_told_in_the_words_of_the_kernel() {
        let mut payload = (-libc::EINVAL).to_ne_bytes().to_vec();
        payload.extend([0; HEADER]);
        Attribute::new(ACK_MESSAGE, Payload::Text("no such thing")).append_to(&mut payload);
        let flags = FLAG_CAPPED | FLAG_ACK_ATTRIBUTES;
        let refusal = message(KIND_ERROR, flags, &payload);
        let error = take(&refusal, &mut Vec::new()).expect_err("a refusal");
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
        assert_eq!(error.message(), Some("no such thing"));
    }

    #[test]
    fn broken_messages_are_errors() {
        for bytes in [
            message(30, 0, &[1]),
            vec![255; 16],
            [vec![8, 0, 0, 0], vec![0; 12]].concat(),
        ] {
            assert!(take(&bytes, &mut Vec::new()).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn a_family_that_is_always_there_is_found_and_others_are_not() {
        let found = Family::connect("nlctrl").expect("the kernel has netlink");
        assert_eq!(found.id, CONTROL);
        let error = Family::connect("no-such-thing").expect_err("there is none");
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    }

    #[test]
    fn a_request_made_alone_leaves_the_descriptors_of_the_process() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("sockets");
        let family = Family::connect("nlctrl").expect("the kernel has netlink");
        let name = [Attribute::new(CONTROL_FAMILY_NAME, Payload::Text("nlctrl"))];
        let answers = family.request_alone(CONTROL_GET_FAMILY, &name);
        assert_eq!(answers.expect("an answer").len(), 1);
        assert!(ours.local_addr().is_ok());
    }
}
