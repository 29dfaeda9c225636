//! `--chardev` as it is typed, translated into [`ChardevOptions`].
//!
//! Two defaults differ from the schema's for the sake of old command lines: a socket connects
//! unless `server=on`, and a server waits for its first client unless `wait=off`.

use crate::error::Error;
use crate::opts::Opts;
use crate::schema::Data;
use crate::schema::chardev::{
    ChardevBackend, ChardevBackendKind, ChardevFile, ChardevNull, ChardevOptions, ChardevSocket,
    ChardevStdio,
};
use crate::schema::socket::{
    InetSocketAddress, SocketAddressLegacy, SocketAddressLegacyKind, UnixSocketAddress,
};

/// The backends that can be created, for `--chardev help`.
pub const BACKENDS: &[&str] = &["file", "socket", "null", "stdio"];

/// Translates the options of one `--chardev`, read with the implied key `backend`.
///
/// # Errors
/// An option is missing, contradicts another, or does not belong to the backend.
pub fn translate(mut opts: Opts) -> Result<ChardevOptions, Error> {
    let id = (opts.id.take()).ok_or_else(|| Error::generic("chardev: no id specified"))?;
    let backend = (opts.take("backend"))
        .ok_or_else(|| Error::generic(format!("chardev: \"{id}\" missing backend")))?;
    let kind = match backend.as_str() {
        "file" => ChardevBackendKind::File(Data {
            data: file(&mut opts)?,
        }),
        "socket" => ChardevBackendKind::Socket(Data {
            data: socket(&mut opts)?,
        }),
        "null" => ChardevBackendKind::Null(Data {
            data: ChardevNull {},
        }),
        "stdio" => ChardevBackendKind::Stdio(Data {
            data: ChardevStdio {
                signal: opts.take_bool("signal")?,
            },
        }),
        unknown => {
            let message = format!("'{unknown}' is not a valid char driver name");
            return Err(Error::generic(message));
        }
    };
    opts.finish()?;
    Ok(ChardevOptions {
        id,
        backend: ChardevBackend { kind },
    })
}

fn file(opts: &mut Opts) -> Result<ChardevFile, Error> {
    let path = opts.take("path");
    Ok(ChardevFile {
        out: path.ok_or_else(|| Error::generic("chardev: file: no filename given"))?,
        r#in: opts.take("input-path"),
        append: opts.take_bool("append")?,
    })
}

fn socket(opts: &mut Opts) -> Result<ChardevSocket, Error> {
    let server = opts.take_bool("server")?.unwrap_or(false);
    let wait = opts.take_bool("wait")?;
    if wait.is_some() && !server {
        return Err(Error::generic(
            "'wait' option is incompatible with socket in client connect mode",
        ));
    }
    let nodelay = match opts.take_bool("delay")? {
        Some(delay) => Some(!delay),
        None => opts.take_bool("nodelay")?,
    };
    let address = match (opts.take("path"), opts.take("host")) {
        (Some(path), None) => SocketAddressLegacyKind::Unix(Data {
            data: unix(path, opts)?,
        }),
        (None, Some(host)) => SocketAddressLegacyKind::Inet(Data {
            data: inet(host, opts)?,
        }),
        (None, None) if opts.take("fd").is_some() => {
            return Err(Error::generic("Invalid parameter 'fd'"));
        }
        _ => {
            let message = "None or one of 'path', 'fd' or 'host' option required.";
            return Err(Error::generic(message));
        }
    };
    Ok(ChardevSocket {
        addr: SocketAddressLegacy { address },
        server: Some(server),
        wait: server.then(|| wait.unwrap_or(true)),
        nodelay,
    })
}

fn unix(path: String, opts: &mut Opts) -> Result<UnixSocketAddress, Error> {
    Ok(UnixSocketAddress {
        path,
        r#abstract: opts.take_bool("abstract")?,
        tight: opts.take_bool("tight")?,
    })
}

fn inet(host: String, opts: &mut Opts) -> Result<InetSocketAddress, Error> {
    let port = opts.take("port");
    Ok(InetSocketAddress {
        host,
        port: port.ok_or_else(|| Error::generic("chardev: socket: no port given"))?,
        numeric: None,
        to: opts.take_number("to")?,
        ipv4: opts.take_bool("ipv4")?,
        ipv6: opts.take_bool("ipv6")?,
        keep_alive: None,
    })
}
