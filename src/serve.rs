//! `stord serve`: lets others have an image, for people: one image, one server, and the URI to find it by, or the socket where a
//! virtual machine finds it.

use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use stord_qmp::Error;
use stord_qmp::schema::block::BlockdevOptions;
use stord_qmp::schema::export::{
    BlockExportKind, BlockExportOptions, BlockExportOptionsNbd, BlockExportOptionsVhostUserBlk,
};
use stord_qmp::schema::nbd::NbdServerOptions;
use stord_qmp::schema::socket::{
    InetSocketAddress, SocketAddress, SocketAddressKind, UnixSocketAddress, VsockSocketAddress,
};

use crate::daemon::{Daemon, run_local};
use crate::daemonize::Background;
use crate::mount::guess::{self, Format};
use crate::mount::{disk_options, image_options};
use crate::notify;
use crate::remote;
use crate::report::{self, Origin};

const NODE: &str = "image";
const EXPORT: &str = "serve";
const NBD_PORT: &str = "10809";

/// Let others have a disk image, over the network or as the disk of a virtual machine.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// The disk image, a file or a block device, or the URI of another NBD export
    image: PathBuf,
    /// Where the NBD server listens: unix:PATH, HOST:PORT, HOST, :PORT or vsock:CID:PORT [default:
    /// unix:IMAGE.nbd]
    #[arg(long, value_name = "ADDR")]
    nbd: Option<String>,
    /// The name that clients ask for [default: none]
    #[arg(long, default_value = "", hide_default_value = true)]
    name: String,
    /// Be a disk of a virtual machine instead, whose monitor finds it at this vhost-user socket
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["nbd", "name"])]
    vhost_user: Option<PathBuf>,
    /// How many queues that disk can have: one for each of the machine's processors is best
    #[arg(long, value_name = "N", default_value_t = 16, requires = "vhost_user")]
    queues: u16,
    /// Do not let anybody write
    #[arg(short, long)]
    read_only: bool,
    /// Open the image as this format instead of guessing it
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Go into the background once clients can come
    #[arg(short, long)]
    pub background: bool,
}

/// Serves until it is told to end, and returns the exit status.
pub fn run(args: ServeArgs, background: Option<Background>) -> ExitCode {
    run_local(async move {
        match serve(&args, background).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                Origin::none().error(&error);
                ExitCode::FAILURE
            }
        }
    })
}

/// Where the image is to be had.
enum Place {
    Nbd(SocketAddressKind),
    /// The path of a socket.
    VhostUser(String),
}

async fn serve(args: &ServeArgs, background: Option<Background>) -> Result<(), Error> {
    let place = match (&args.vhost_user, &args.nbd) {
        (Some(socket), _) => Place::VhostUser(absolute(socket)?),
        (None, Some(text)) => Place::Nbd(parse(text)?),
        (None, None) => Place::Nbd(beside(&args.image)?),
    };
    let daemon = Daemon::start()?;
    let started = start(&daemon, args, &place).await;
    let started = started.and_then(|()| {
        daemon.announce();
        let found_at = match &place {
            Place::Nbd(address) => uri(address, &args.name),
            Place::VhostUser(socket) => socket.clone(),
        };
        report::print(&format!("{found_at}\n"));
        background.map_or(Ok(()), Background::complete)
    });
    if started.is_ok() {
        notify::ready();
        daemon.shutdown.requested().await;
        notify::stopping();
    }
    let closed = daemon.close().await;
    started.and(closed)
}

async fn start(daemon: &Daemon, args: &ServeArgs, place: &Place) -> Result<(), Error> {
    let image = if remote::is_remote(&args.image) {
        let driver = remote::driver(&args.image, daemon.objects.credentials())?;
        let format = args.format.unwrap_or(Format::Raw);
        disk_options(driver, format, args.read_only)
    } else {
        local(args)?
    };
    daemon.graph.blockdev_add(image.named(NODE)).await?;
    let export = match place {
        Place::Nbd(address) => {
            start_nbd_server(daemon, address).await?;
            BlockExportKind::Nbd(BlockExportOptionsNbd {
                name: Some(args.name.clone()),
                ..BlockExportOptionsNbd::default()
            })
        }
        Place::VhostUser(socket) => BlockExportKind::VhostUserBlk(BlockExportOptionsVhostUserBlk {
            addr: SocketAddress {
                address: unix(socket),
            },
            logical_block_size: None,
            num_queues: Some(args.queues),
        }),
    };
    let options = BlockExportOptions {
        writable: Some(!args.read_only),
        ..BlockExportOptions::new(export, EXPORT, NODE)
    };
    daemon.exports.add(options).await
}

async fn start_nbd_server(daemon: &Daemon, address: &SocketAddressKind) -> Result<(), Error> {
    let server = NbdServerOptions {
        handshake_max_seconds: None,
        tls_creds: None,
        tls_authz: None,
        max_connections: None,
        addr: SocketAddress {
            address: address.clone(),
        },
    };
    let credentials = daemon.objects.credentials().clone();
    daemon.exports.nbd_server_start(server, credentials).await
}

/// How an image of this machine is opened.
fn local(args: &ServeArgs) -> Result<BlockdevOptions, Error> {
    let shown = args.image.display();
    let failed = |error| Error::os(format!("cannot open '{shown}'"), error);
    let path = fs::canonicalize(&args.image).map_err(failed)?;
    let kind = fs::metadata(&path).map_err(failed)?.file_type();
    let format = match args.format {
        Some(format) => format,
        None => {
            let file = File::open(&path).map_err(failed)?;
            let size = std::io::Seek::seek(&mut &file, std::io::SeekFrom::End(0));
            guess::guess(&args.image, &file, size.map_err(failed)?)?
        }
    };
    let text = path.to_str();
    let text = text.ok_or_else(|| Error::generic(format!("'{shown}' is not valid UTF-8")))?;
    Ok(image_options(
        text,
        kind.is_block_device(),
        format,
        args.read_only,
    ))
}

/// The socket beside an image.
fn beside(image: &Path) -> Result<SocketAddressKind, Error> {
    if remote::is_remote(image) {
        return Err(
            Error::generic("no address is given").with_hint("Say where to listen: --nbd ADDR")
        );
    }
    let mut path = image.to_path_buf().into_os_string();
    path.push(".nbd");
    let path = absolute(Path::new(&path));
    path.map(|path| unix(&path))
        .map_err(|error| error.with_hint("Say where to listen: --nbd ADDR"))
}

/// A path that holds wherever the daemon works.
fn absolute(path: &Path) -> Result<String, Error> {
    let path = std::path::absolute(path)
        .map_err(|error| Error::os("cannot find the working directory", error))?;
    match path.to_str() {
        Some(path) => Ok(path.to_owned()),
        None => Err(Error::generic(format!(
            "'{}' is not valid UTF-8",
            path.display()
        ))),
    }
}

fn unix(path: &str) -> SocketAddressKind {
    SocketAddressKind::Unix(UnixSocketAddress {
        path: path.to_owned(),
        r#abstract: None,
        tight: None,
    })
}

/// An address as people write it.
fn parse(text: &str) -> Result<SocketAddressKind, Error> {
    let malformed = || {
        Error::generic(format!("'{text}' is no address"))
            .with_hint("Addresses are unix:PATH, HOST:PORT, HOST, :PORT and vsock:CID:PORT")
    };
    if let Some(path) = text.strip_prefix("unix:") {
        let path = std::path::absolute(path).map_err(|_| malformed())?;
        return Ok(unix(path.to_str().ok_or_else(malformed)?));
    }
    if let Some(rest) = text.strip_prefix("vsock:") {
        let (cid, port) = rest.split_once(':').ok_or_else(malformed)?;
        return Ok(SocketAddressKind::Vsock(VsockSocketAddress {
            cid: cid.to_owned(),
            port: port.to_owned(),
        }));
    }
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(malformed)?;
            (host, rest.strip_prefix(':').unwrap_or(NBD_PORT))
        }
        None => text.split_once(':').unwrap_or((text, NBD_PORT)),
    };
    let port: u16 = port.parse().map_err(|_| malformed())?;
    if text.is_empty() || host.contains('/') {
        return Err(malformed());
    }
    Ok(SocketAddressKind::Inet(InetSocketAddress {
        host: host.to_owned(),
        port: port.to_string(),
        numeric: None,
        to: None,
        ipv4: None,
        ipv6: None,
        keep_alive: None,
        mptcp: None,
    }))
}

/// What clients find the export by.
fn uri(address: &SocketAddressKind, name: &str) -> String {
    let mut address = address.clone();
    match &mut address {
        SocketAddressKind::Inet(inet) if inet.host.is_empty() => inet.host.push_str("localhost"),
        SocketAddressKind::Unix(unix) => unix.path = escaped(&unix.path),
        _ => {}
    }
    stord_block::drivers::protocol::nbd::uri::of(&address, &escaped(name))
}

/// The text with everything that means something in a URI written as `%XX`.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(byte.into());
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_as_people_write_them() {
        let uri_of = |text: &str| parse(text).map(|address| uri(&address, "x")).ok();
        assert_eq!(
            uri_of("unix:/a/b").as_deref(),
            Some("nbd+unix:///x?socket=/a/b")
        );
        assert_eq!(
            uri_of("unix:/a b?").as_deref(),
            Some("nbd+unix:///x?socket=/a%20b%3F")
        );
        assert_eq!(uri_of("host").as_deref(), Some("nbd://host:10809/x"));
        assert_eq!(uri_of(":7").as_deref(), Some("nbd://localhost:7/x"));
        assert_eq!(uri_of("[::1]:7").as_deref(), Some("nbd://[::1]:7/x"));
        assert_eq!(uri_of("vsock:2:9").as_deref(), Some("nbd+vsock://2:9/x"));
        for nonsense in ["", "/a/b", "host:port", "host:99999", "vsock:2", "[::1"] {
            assert_eq!(uri_of(nonsense), None, "{nonsense}");
        }
    }
}
