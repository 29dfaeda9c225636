//! Tells a service manager, through the socket it named in `NOTIFY_SOCKET`, that the daemon is
//! ready or about to end, and has it keep descriptors for the next start. Without that variable,
//! and whatever goes wrong, nothing else happens.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Start-up is complete; this process is the daemon.
pub fn ready() {
    send(&format!("READY=1\nMAINPID={}\n", std::process::id()));
}

/// The daemon is shutting down.
pub fn stopping() {
    send("STOPPING=1\n");
}

/// Whether there is a service manager.
pub fn is_heard() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Gives the service manager a descriptor to keep under this name until the next start.
///
/// # Errors
/// There is none, or it does not read.
pub fn keep(name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let socket = connect()?.ok_or(io::ErrorKind::NotFound)?;
    let text = format!("FDSTORE=1\nFDNAME={name}\n");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let parts = [IoSlice::new(text.as_bytes())];
    // Losing one of them would be worse than waiting for a moment.
    socket.set_nonblocking(false)?;
    sendmsg(&socket, &parts, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Has the service manager forget the descriptors of this name.
pub fn forget(name: &str) {
    send(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"));
}

fn send(state: &str) {
    let sent = connect().and_then(|socket| match socket {
        Some(socket) => socket.send(state.as_bytes()).map(drop),
        None => Ok(()),
    });
    if let Err(error) = sent {
        tracing::debug!(%error, "service manager not notified");
    }
}

fn connect() -> io::Result<Option<UnixDatagram>> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(None);
    };
    let bytes = path.as_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address?)?;
    // A manager that does not read must not keep us.
    socket.set_nonblocking(true)?;
    Ok(Some(socket))
}
