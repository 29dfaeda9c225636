//! `--chardev` as it is typed, translated into [`ChardevOptions`].
//!
//! Two defaults differ from the schema's for the sake of old command lines: a socket connects
//! unless `server=on`, and a server waits for its first client unless `wait=off`.

use crate::builtin::parse_size;
use crate::error::Error;
use crate::opts::Opts;
use crate::schema::Data;
use crate::schema::chardev::{
    ChardevBackend, ChardevBackendKind, ChardevCommon, ChardevFile, ChardevHostdev, ChardevHub,
    ChardevMux, ChardevOptions, ChardevPty, ChardevRingbuf, ChardevSocket, ChardevStdio,
    ChardevUdp,
};
use crate::schema::socket::{
    FdSocketAddress, InetSocketAddress, SocketAddressLegacy, SocketAddressLegacyKind,
    UnixSocketAddress,
};

/// The backends that can be created, for `--chardev help`.
pub const BACKENDS: &[&str] = &[
    "file", "hub", "memory", "mux", "null", "parallel", "pipe", "pty", "ringbuf", "serial",
    "socket", "stdio", "udp",
];

/// The most devices that a hub joins.
const HUB_MAX: usize = 4;

/// Translates the options of one `--chardev`, read with the implied key `backend`, into the devices
/// to make: with `mux=on` a multiplexer comes after the device that it shares.
///
/// # Errors
/// An option is missing, contradicts another, or does not belong to the backend.
pub fn translate(mut opts: Opts) -> Result<Vec<ChardevOptions>, Error> {
    let id = (opts.id.take()).ok_or_else(|| Error::generic("chardev: no id specified"))?;
    let backend = (opts.take("backend"))
        .ok_or_else(|| Error::generic(format!("chardev: \"{id}\" missing backend")))?;
    let is_shared = opts.take_bool("mux")?.unwrap_or(false);
    let kind = kind_of(&backend, &mut opts)?;
    opts.finish()?;
    let device = |id: String, kind| ChardevOptions {
        id,
        backend: ChardevBackend { kind },
    };
    if !is_shared {
        return Ok(vec![device(id, kind)]);
    }
    let base = format!("{id}-base");
    let mux = ChardevBackendKind::Mux(Data {
        data: ChardevMux {
            common: ChardevCommon::default(),
            chardev: base.clone(),
        },
    });
    Ok(vec![device(base, kind), device(id, mux)])
}

fn kind_of(backend: &str, opts: &mut Opts) -> Result<ChardevBackendKind, Error> {
    let common = ChardevCommon {
        logfile: opts.take("logfile"),
        logappend: opts.take_bool("logappend")?,
    };
    Ok(match backend {
        "file" => ChardevBackendKind::File(Data {
            data: file(common, opts)?,
        }),
        "hub" => ChardevBackendKind::Hub(Data {
            data: hub(common, opts)?,
        }),
        "memory" => ChardevBackendKind::Memory(Data {
            data: ringbuf(common, opts)?,
        }),
        "mux" => ChardevBackendKind::Mux(Data {
            data: ChardevMux {
                common,
                chardev: required(opts, "chardev", "mux: no chardev given")?,
            },
        }),
        "null" => ChardevBackendKind::Null(Data { data: common }),
        "parallel" => ChardevBackendKind::Parallel(Data {
            data: hostdev(common, opts, "parallel: no device path given")?,
        }),
        "pipe" => ChardevBackendKind::Pipe(Data {
            data: hostdev(common, opts, "pipe: no device path given")?,
        }),
        "pty" => ChardevBackendKind::Pty(Data {
            data: ChardevPty {
                common,
                path: opts.take("path"),
            },
        }),
        "ringbuf" => ChardevBackendKind::Ringbuf(Data {
            data: ringbuf(common, opts)?,
        }),
        "serial" => ChardevBackendKind::Serial(Data {
            data: hostdev(common, opts, "serial/tty: no device path given")?,
        }),
        "socket" => ChardevBackendKind::Socket(Data {
            data: socket(common, opts)?,
        }),
        "stdio" => ChardevBackendKind::Stdio(Data {
            data: ChardevStdio {
                common,
                signal: opts.take_bool("signal")?,
            },
        }),
        "udp" => ChardevBackendKind::Udp(Data {
            data: udp(common, opts)?,
        }),
        unknown => {
            let message = format!("'{unknown}' is not a valid char driver name");
            return Err(Error::generic(message));
        }
    })
}

fn required(opts: &mut Opts, name: &str, complaint: &str) -> Result<String, Error> {
    let value = opts.take(name);
    value.ok_or_else(|| Error::generic(format!("chardev: {complaint}")))
}

fn file(common: ChardevCommon, opts: &mut Opts) -> Result<ChardevFile, Error> {
    Ok(ChardevFile {
        common,
        out: required(opts, "path", "file: no filename given")?,
        r#in: opts.take("input-path"),
        append: opts.take_bool("append")?,
    })
}

fn hostdev(
    common: ChardevCommon,
    opts: &mut Opts,
    complaint: &str,
) -> Result<ChardevHostdev, Error> {
    let device = required(opts, "path", complaint)?;
    Ok(ChardevHostdev { common, device })
}

fn hub(common: ChardevCommon, opts: &mut Opts) -> Result<ChardevHub, Error> {
    let member = |index: usize| opts.take(&format!("chardevs.{index}"));
    let chardevs = (0..HUB_MAX).map_while(member).collect();
    Ok(ChardevHub { common, chardevs })
}

fn ringbuf(common: ChardevCommon, opts: &mut Opts) -> Result<ChardevRingbuf, Error> {
    let size = opts.take("size").map(|text| {
        let size = parse_size(&text).and_then(|size| i64::try_from(size).ok());
        size.ok_or_else(|| {
            Error::generic("Parameter 'size' expects a non-negative number below 2^64").with_hint(
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                 and exabytes, respectively.",
            )
        })
    });
    Ok(ChardevRingbuf {
        common,
        size: size.transpose()?,
    })
}

fn socket(common: ChardevCommon, opts: &mut Opts) -> Result<ChardevSocket, Error> {
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
    let address = match (opts.take("path"), opts.take("host"), opts.take("fd")) {
        (Some(path), None, None) => SocketAddressLegacyKind::Unix(Data {
            data: unix(path, opts)?,
        }),
        (None, Some(host), None) => SocketAddressLegacyKind::Inet(Data {
            data: InetSocketAddress {
                port: required(opts, "port", "socket: no port given")?,
                to: opts.take_number("to")?,
                ..inet(host, opts)?
            },
        }),
        (None, None, Some(r#str)) => SocketAddressLegacyKind::Fd(Data {
            data: FdSocketAddress { r#str },
        }),
        _ => {
            let message = "None or one of 'path', 'fd' or 'host' option required.";
            return Err(Error::generic(message));
        }
    };
    Ok(ChardevSocket {
        common,
        addr: SocketAddressLegacy { address },
        tls_creds: opts.take("tls-creds"),
        tls_authz: opts.take("tls-authz"),
        server: Some(server),
        wait: server.then(|| wait.unwrap_or(true)),
        nodelay,
        telnet: opts.take_bool("telnet")?,
        tn3270: opts.take_bool("tn3270")?,
        websocket: opts.take_bool("websocket")?,
        reconnect: opts.take_number("reconnect")?,
        reconnect_ms: opts.take_number("reconnect-ms")?,
    })
}

fn udp(common: ChardevCommon, opts: &mut Opts) -> Result<ChardevUdp, Error> {
    let address = |inet| SocketAddressLegacy {
        address: SocketAddressLegacyKind::Inet(Data { data: inet }),
    };
    let host = opts.take("host").filter(|host| !host.is_empty());
    let port = opts.take("port").filter(|port| !port.is_empty());
    let port = port.ok_or_else(|| Error::generic("chardev: udp: remote port not specified"))?;
    let remote = InetSocketAddress {
        port,
        ..inet(host.unwrap_or_else(|| "localhost".to_owned()), opts)?
    };
    let local = match (opts.take("localaddr"), opts.take("localport")) {
        (None, None) => None,
        (host, port) => Some(InetSocketAddress {
            port: (port.filter(|port| !port.is_empty())).unwrap_or_else(|| "0".to_owned()),
            ..inet(host.unwrap_or_default(), opts)?
        }),
    };
    Ok(ChardevUdp {
        common,
        remote: address(remote),
        local: local.map(address),
    })
}

fn unix(path: String, opts: &mut Opts) -> Result<UnixSocketAddress, Error> {
    Ok(UnixSocketAddress {
        path,
        r#abstract: opts.take_bool("abstract")?,
        tight: opts.take_bool("tight")?,
    })
}

/// An address without its port.
fn inet(host: String, opts: &mut Opts) -> Result<InetSocketAddress, Error> {
    Ok(InetSocketAddress {
        host,
        port: String::new(),
        numeric: None,
        to: None,
        ipv4: opts.take_bool("ipv4")?,
        ipv6: opts.take_bool("ipv6")?,
        keep_alive: None,
        mptcp: None,
    })
}
