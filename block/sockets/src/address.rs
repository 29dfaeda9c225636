//! How addresses of stream sockets are written: in messages, in `query-chardev`, and in the tree of
//! objects.

use socket2::SockAddr;
use stord_qmp::Error;
use stord_qmp::schema::socket::{
    InetSocketAddress, SocketAddress, SocketAddressKind, UnixSocketAddress, VsockSocketAddress,
};

/// The longest path of a Unix domain socket, in bytes, without the terminating zero.
const PATH_MAX: usize = 107;

/// The address as the kernel takes it.
///
/// # Errors
/// The path or the name is too long.
pub fn unix(address: &UnixSocketAddress) -> Result<SockAddr, Error> {
    let UnixSocketAddress {
        path,
        r#abstract,
        tight,
    } = address;
    let is_abstract = r#abstract.unwrap_or(false);
    if path.len() > PATH_MAX {
        let limit = PATH_MAX + usize::from(!is_abstract);
        return Err(
            Error::generic(format!("UNIX socket path '{path}' is too long"))
                .with_hint(format!("Path must be less than {limit} bytes")),
        );
    }
    let mut name = path.clone();
    if is_abstract {
        name.insert(0, '\0');
        if !tight.unwrap_or(true) {
            name.extend(std::iter::repeat_n('\0', PATH_MAX + 1 - name.len()));
        }
    }
    SockAddr::unix(name).map_err(|error| {
        Error::generic(format!("UNIX socket path '{path}' cannot be used")).with_source(error)
    })
}

/// The address as the kernel takes it.
///
/// # Errors
/// It is not made of numbers.
pub fn vsock(address: &VsockSocketAddress) -> Result<SockAddr, Error> {
    let VsockSocketAddress { cid, port } = address;
    let number = |name: &str, text: &str| {
        let parsed = text.parse();
        parsed.map_err(|_| Error::generic(format!("Failed to parse {name} '{text}'")))
    };
    Ok(SockAddr::vsock(number("cid", cid)?, number("port", port)?))
}

/// The address that a socket got in place of the one asked for.
pub fn actual(asked: &SocketAddressKind, local: Option<&SockAddr>) -> SocketAddress {
    let address = match (asked, local.and_then(SockAddr::as_socket)) {
        (SocketAddressKind::Inet(_) | SocketAddressKind::Fd(_), Some(local)) => {
            SocketAddressKind::Inet(InetSocketAddress {
                host: local.ip().to_string(),
                port: local.port().to_string(),
                numeric: None,
                to: None,
                ipv4: local.is_ipv4().then_some(true),
                ipv6: local.is_ipv6().then_some(true),
                keep_alive: None,
                mptcp: None,
            })
        }
        (SocketAddressKind::Unix(unix), _) if unix.r#abstract == Some(true) => {
            SocketAddressKind::Unix(UnixSocketAddress {
                tight: Some(unix.tight.unwrap_or(true)),
                ..unix.clone()
            })
        }
        (SocketAddressKind::Unix(unix), _) => SocketAddressKind::Unix(UnixSocketAddress {
            path: unix.path.clone(),
            r#abstract: None,
            tight: None,
        }),
        (SocketAddressKind::Fd(fd), None) => {
            let path = local.and_then(SockAddr::as_pathname);
            match path.and_then(|path| path.to_str()) {
                Some(path) => SocketAddressKind::Unix(UnixSocketAddress {
                    path: path.to_owned(),
                    r#abstract: None,
                    tight: None,
                }),
                None => SocketAddressKind::Fd(fd.clone()),
            }
        }
        (other, _) => other.clone(),
    };
    SocketAddress { address }
}

/// The address in the reference's notation, `tcp` being the name of what is spoken over TCP.
pub fn describe(address: &SocketAddressKind, tcp: &str) -> String {
    match address {
        SocketAddressKind::Inet(InetSocketAddress { host, port, .. }) => {
            format!("{tcp}:{host}:{port}")
        }
        SocketAddressKind::Unix(unix) => {
            let mut text = format!("unix:{}", unix.path);
            if unix.r#abstract == Some(true) {
                text.push_str(",abstract=on");
                if unix.tight != Some(false) {
                    text.push_str(",tight=on");
                }
            }
            text
        }
        SocketAddressKind::Vsock(VsockSocketAddress { cid, port }) => {
            format!("vsock:{cid}:{port}")
        }
        SocketAddressKind::Fd(fd) => format!("fd:{}", fd.r#str),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_in_the_reference() {
        let unix = |r#abstract, tight| {
            let path = "p".to_owned();
            let asked = SocketAddressKind::Unix(UnixSocketAddress {
                path,
                r#abstract,
                tight,
            });
            describe(&actual(&asked, None).address, "tcp")
        };
        assert_eq!(unix(None, Some(false)), "unix:p");
        assert_eq!(unix(Some(true), None), "unix:p,abstract=on,tight=on");
        assert_eq!(unix(Some(true), Some(false)), "unix:p,abstract=on");
    }

    #[test]
    fn long_names_are_refused() {
        let address = |length, r#abstract| UnixSocketAddress {
            path: "x".repeat(length),
            r#abstract: Some(r#abstract),
            tight: Some(false),
        };
        assert!(unix(&address(PATH_MAX, false)).is_ok());
        assert!(unix(&address(PATH_MAX, true)).is_ok());
        let error = unix(&address(PATH_MAX + 1, false)).expect_err("too long");
        assert_eq!(
            error.hint.as_deref(),
            Some("Path must be less than 108 bytes")
        );
    }
}
