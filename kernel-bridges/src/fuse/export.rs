//! The life of a FUSE export: set up, served by its queues, and taken down in an order that loses nothing and cannot hang.
//!
//! Down: the mount is taken from its path while the queues still serve, so that the kernel can write back what it holds; then the
//! queues are told to stop, which ends the connection for whoever has the file open still; when all of them have ended, the backend
//! goes. An unmount by somebody else ends the queues, and the rest follows.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::geteuid;
use stord_aio::sync::mpsc;
use stord_aio::{Context, pool};
use stord_block::Backend;
use stord_block::drivers::protocol::file::own_mounts;
use stord_qmp::Error;
use stord_qmp::schema::block::OnOffAuto;
use stord_qmp::schema::export::FuseExportAllowOther;

use crate::export::{Ended, Export, LocalFuture};
use crate::mount_table;

use super::abi::{InitFlags, ROOT_ID};
use super::buffers::MAX_PAYLOAD;
use super::connection::{Connection, Transport};
use super::directory::Directory;
use super::disk_file::{DiskFile, Presentation};
use super::entries::Common;
use super::file_system::FileSystem;
use super::fill::{CannotFill, Filler};
use super::held::HeldEntries;
use super::init::Proposal;
use super::kernel;
use super::mount::{Mount, MountError, Mounted, Options, clear_dead};
use super::passthrough::BackingDevice;
use super::queues::{clone_devices, serve_classic, serve_io_uring};
use super::resize::{ResizeRequest, Resizer};
use super::session::Session;

/// An unmount that takes longer than this waits for requests that do not end; the connection is ended under it.
const UNMOUNT_PATIENCE: Duration = Duration::from_secs(5);

/// Requests under way that take longer than this keep a mount from going to another process through io_uring.
const HOLD_PATIENCE: Duration = Duration::from_secs(20);

/// This environment variable, set to `classic`, makes `io-uring=auto` mean `off`: for tests and comparisons.
const TRANSPORT: &str = "STORD_FUSE_TRANSPORT";

/// Likewise, `on` or `off` for `passthrough=auto`.
const PASSTHROUGH: &str = "STORD_FUSE_PASSTHROUGH";

/// What a FUSE export is to be.
pub(crate) struct FuseOptions {
    /// What to mount over; see [`check_mountpoint`].
    pub(crate) path: PathBuf,
    pub(crate) allow_other: FuseExportAllowOther,
    /// Whether requests come through io_uring.
    pub(crate) io_uring: OnOffAuto,
    /// Whether the kernel reads image files by itself where it can: `Auto` where the export is read-only.
    pub(crate) passthrough: OnOffAuto,
    pub(crate) contents: Contents,
}

/// What a file system shows.
pub(crate) enum Contents {
    /// One file.
    File(FileOptions),
    /// A directory of files with these names.
    Directory(Vec<(String, FileOptions)>),
}

/// One file and what may be done to it.
pub(crate) struct FileOptions {
    pub(crate) backend: Backend,
    pub(crate) writable: bool,
    pub(crate) growable: bool,
    pub(crate) writethrough: bool,
    /// What is acknowledged outlives this process.
    pub(crate) outlives: bool,
    /// Who changes the image's length where the backend may not.
    pub(crate) resizes: Option<mpsc::UnboundedSender<ResizeRequest>>,
}

impl Contents {
    fn is_directory(&self) -> bool {
        matches!(self, Self::Directory(_))
    }

    /// The files, some of which the kernel may read past us.
    fn file_system(
        &self,
        allow_other: bool,
        passthrough: impl Fn(&FileOptions) -> Option<Arc<BackingDevice>>,
    ) -> FileSystem {
        let disk_file = |node, file: &FileOptions| {
            let disk_file = file.disk_file(node, allow_other);
            match passthrough(file) {
                Some(device) => disk_file.with_passthrough(device),
                None => disk_file,
            }
        };
        match self {
            Self::File(file) => FileSystem::of_file(disk_file(ROOT_ID, file)),
            Self::Directory(entries) => {
                let names = entries.iter().map(|(name, _)| name.clone()).collect();
                let files = (Directory::FIRST_FILE..).zip(entries);
                let files = files.map(|(node, (_, file))| disk_file(node, file));
                FileSystem::of_directory(Directory::new(names, allow_other), files.collect())
            }
        }
    }
}

impl FileOptions {
    fn disk_file(&self, node: u64, allow_other: bool) -> DiskFile {
        let presentation = Presentation {
            writable: self.writable,
            growable: self.growable,
            writethrough: self.writethrough,
            outlives: self.outlives,
            allow_other,
        };
        let resizes = self.resizes.clone();
        let resizer = resizes.map_or(Resizer::Own, Resizer::Control);
        DiskFile::new(node, self.backend.clone(), presentation, resizer)
    }
}

impl FuseOptions {
    fn preferred_passthrough(&self) -> OnOffAuto {
        match (self.passthrough, std::env::var(PASSTHROUGH).as_deref()) {
            (OnOffAuto::Auto, Ok("on")) => OnOffAuto::On,
            (OnOffAuto::Auto, Ok("off")) => OnOffAuto::Off,
            (passthrough, _) => passthrough,
        }
    }
}

/// A mounted FUSE export.
pub(crate) struct FuseExport {
    session: Arc<Session>,
    mount: Mount,
    /// Requests come through io_uring, to the entries here.
    ring: Option<Arc<Common>>,
    allow_other: bool,
    /// The descriptors of the queues once more, for whoever is to serve them next.
    kept: RefCell<Vec<OwnedFd>>,
    /// Another process serves the mount from now on.
    left: Cell<bool>,
    /// The connection, for passthrough.
    backing: Option<Arc<BackingDevice>>,
}

/// Why an export could not be started.
enum Failure {
    /// The kernel refuses io_uring.
    Ring(Errno),
    Other(Error),
}

/// Looks whether a mountpoint can be one, of one file or of a directory, and gives its absolute path.
///
/// # Errors
/// It does not exist, or is of the other kind.
pub(crate) async fn check_mountpoint(mountpoint: &str, directory: bool) -> Result<PathBuf, Error> {
    let path = mountpoint.to_owned();
    let looked = pool::run(move || {
        clear_dead_mount(Path::new(&path));
        let found = std::fs::metadata(&path)?;
        let is_fit = if directory {
            found.is_dir()
        } else {
            found.is_file()
        };
        Ok::<_, io::Error>((is_fit, std::fs::canonicalize(&path)?))
    })
    .await;
    match looked {
        Ok((true, path)) => Ok(path),
        Ok((false, _)) => {
            let wanted = if directory {
                "directory"
            } else {
                "regular file"
            };
            Err(Error::generic(format!("'{mountpoint}' is not a {wanted}")))
        }
        Err(error) => Err(cannot_stat(mountpoint, &error)),
    }
}

/// Takes away what a dead daemon of ours left at the path.
fn clear_dead_mount(path: &Path) {
    // The name of a dead mount cannot be resolved, only the directory that it is in.
    let directory = path.parent().map(|directory| match directory.as_os_str() {
        name if name.is_empty() => Path::new("."),
        _ => directory,
    });
    let (Some(Ok(directory)), Some(name)) =
        (directory.map(std::fs::canonicalize), path.file_name())
    else {
        return;
    };
    let at = directory.join(name);
    if mount_table::mount_at(&at).is_some_and(|mount| mount.is_ours()) && mount_table::is_dead(&at)
    {
        tracing::warn!(path = %at.display(), "clearing the mount that a dead daemon left");
        clear_dead(&at);
    }
}

fn cannot_stat(mountpoint: &str, error: &io::Error) -> Error {
    let errno = error.raw_os_error().map(Errno::from_raw);
    let reason = errno.map_or_else(|| error.to_string(), |errno| errno.desc().to_owned());
    let message = Error::generic(format!("Failed to stat '{mountpoint}': {reason}"));
    if errno == Some(Errno::ENOTCONN) {
        return message.with_hint(format!(
            "the daemon that was mounted there has died; clean up with 'stord umount {mountpoint}' or 'fusermount3 -u {mountpoint}'"
        ));
    }
    message
}

impl FuseExport {
    /// Mounts the file system and serves it on the contexts. The second result resolves when all queues have ended, for whatever reason;
    /// [`finish`](Self::finish) has to follow.
    ///
    /// # Errors
    /// It cannot be mounted, or not with io_uring where that is demanded.
    pub(crate) async fn start(
        options: &FuseOptions,
        contexts: &[Context],
    ) -> Result<(Self, Ended), Error> {
        if options.passthrough == OnOffAuto::On && !geteuid().is_root() {
            return Err(no_passthrough());
        }
        let has_rings = contexts.iter().all(Context::uses_ring);
        if options.io_uring == OnOffAuto::On && !has_rings {
            return Err(no_io_uring());
        }
        let is_wanted = match options.io_uring {
            OnOffAuto::On => true,
            OnOffAuto::Off => false,
            OnOffAuto::Auto => {
                is_better_with_ring(contexts)
                    && std::env::var_os(TRANSPORT).is_none_or(|name| name != "classic")
            }
        };
        if is_wanted && has_rings {
            match Self::start_with(options, true, contexts).await {
                Ok(started) => return Ok(started),
                Err(Failure::Other(error)) => return Err(error),
                Err(Failure::Ring(errno)) if options.io_uring == OnOffAuto::On => {
                    return Err(no_io_uring().with_source(errno));
                }
                Err(Failure::Ring(errno)) => {
                    tracing::info!(%errno, "no FUSE over io_uring, serving /dev/fuse");
                }
            }
        }
        match Self::start_with(options, false, contexts).await {
            Ok(started) => Ok(started),
            Err(Failure::Other(error)) => Err(error),
            Err(Failure::Ring(_)) => unreachable!("io_uring was not asked for"),
        }
    }

    async fn start_with(
        options: &FuseOptions,
        io_uring: bool,
        contexts: &[Context],
    ) -> Result<(Self, Ended), Failure> {
        let mounted = set_up(options, io_uring).await;
        let (mounted, allow_other) = mounted.map_err(Failure::Other)?;
        let Mounted {
            device,
            flags,
            mount,
            attachment,
        } = mounted;
        tracing::debug!(path = %options.path.display(), ?flags, allow_other, "FUSE connection");
        let io_uring = flags.contains(InitFlags::OVER_IO_URING);
        let backing = backing_device(options, &device, flags).map_err(Failure::Other);
        let passthrough = options.preferred_passthrough();
        let may_pass = |file: &FileOptions| !file.writable || passthrough == OnOffAuto::On;
        let file_system = options.contents.file_system(allow_other, |file| {
            let device = backing.as_ref().ok()?.as_ref()?;
            may_pass(file).then(|| Arc::clone(device))
        });
        own_mounts::add(mount.device_number());
        let (served, (mut export, ended)) = if io_uring {
            let session = Session::new(file_system, 1);
            let started = Self::serve_ring(
                device,
                mount,
                allow_other,
                &session,
                contexts,
                HeldEntries::default(),
            );
            let (registered, started) = started.await;
            (registered.map_err(Failure::Ring), started)
        } else {
            let devices = clone_devices(vec![device], contexts);
            let started = Self::serve(devices, mount, allow_other, file_system, contexts);
            (Ok(()), started)
        };
        let served = served.and_then(|()| {
            export.backing = backing?;
            Ok(())
        });
        let lacks_ring = !io_uring && options.io_uring == OnOffAuto::On;
        let attached = match served {
            Ok(()) if lacks_ring => Err(Failure::Ring(Errno::EOPNOTSUPP)),
            Ok(()) => pool::run(move || attachment.attach())
                .await
                .map_err(|error| Failure::Other(cannot_mount(error))),
            Err(failure) => {
                // Unmounts what had not appeared yet.
                pool::run(move || drop(attachment)).await;
                Err(failure)
            }
        };
        if let Err(failure) = attached {
            export.shut_down().await;
            ended.await;
            export.finish().await;
            return Err(failure);
        }
        Ok((export, ended))
    }

    /// Serves a connection on classic queues.
    fn serve(
        devices: Vec<OwnedFd>,
        mount: Mount,
        allow_other: bool,
        file_system: FileSystem,
        contexts: &[Context],
    ) -> (Self, Ended) {
        let kept = devices.iter().map(OwnedFd::try_clone).collect();
        let kept: io::Result<Vec<OwnedFd>> = kept;
        let session = Session::new(file_system, devices.len());
        let ended = serve_classic(devices, contexts, &session);
        let export = Self {
            session,
            mount,
            ring: None,
            allow_other,
            // Without them, the mount cannot be handed over.
            kept: RefCell::new(kept.unwrap_or_default()),
            left: Cell::new(false),
            backing: None,
        };
        (export, ended)
    }

    /// Serves a connection through io_uring. The first result tells whether the kernel took all entries that there were not yet.
    async fn serve_ring(
        device: OwnedFd,
        mount: Mount,
        allow_other: bool,
        session: &Arc<Session>,
        contexts: &[Context],
        held: HeldEntries,
    ) -> (Result<(), Errno>, (Self, Ended)) {
        let kept = device.try_clone();
        let queues = serve_io_uring(device, contexts, session, held).await;
        let export = Self {
            session: Arc::clone(session),
            mount,
            ring: Some(queues.common),
            allow_other,
            kept: RefCell::new(kept.into_iter().collect()),
            left: Cell::new(false),
            backing: None,
        };
        (queues.registered, (export, queues.ended))
    }

    /// Serves a connection that another process served before. The rest is as for [`start`](Self::start).
    ///
    /// # Errors
    /// The connection has ended.
    pub(crate) async fn adopt(
        connection: Connection,
        contents: &Contents,
        contexts: &[Context],
    ) -> Result<(Self, Ended), Error> {
        let (mount, allow_other) = (connection.mount.clone(), connection.allow_other);
        // Files that are open in passthrough now stay so.
        let file_system = contents.file_system(allow_other, |_| None);
        file_system.take_over(&connection.attributes);
        let failed = |errno| Error::os("Failed to take over the FUSE mount", errno);
        let held = match connection.transport {
            Transport::Classic => None,
            Transport::Ring(None) => return Err(failed(Errno::EINVAL)),
            Transport::Ring(Some(_)) if !contexts.iter().all(Context::uses_ring) => {
                return Err(no_io_uring());
            }
            Transport::Ring(Some(held)) => Some(held),
        };
        let mut devices = connection.devices;
        if let (Some(held), Some(device)) = (held, devices.pop()) {
            own_mounts::add(mount.device_number());
            let session = Session::new(file_system, 1);
            let started =
                Self::serve_ring(device, mount, allow_other, &session, contexts, held).await;
            if let (Err(errno), _) = started {
                tracing::warn!(%errno, "a queue of io_uring cannot be served");
            }
            return Ok(started.1);
        }
        let devices = Connection::resend(devices, contexts.len()).map_err(|errno| {
            failed(errno).with_hint("It has been unmounted, or its connection has been ended.")
        })?;
        let devices = clone_devices(devices, contexts);
        own_mounts::add(mount.device_number());
        Ok(Self::serve(
            devices,
            mount,
            allow_other,
            file_system,
            contexts,
        ))
    }

    /// Closes the descriptor that would keep the connection alive when the queues have closed theirs.
    fn let_go(&self) {
        if let Some(backing) = &self.backing {
            backing.close();
        }
    }

    /// Gets a request into every entry of io_uring and keeps them there.
    async fn hold(&self, ring: &Arc<Common>) -> Result<HeldEntries, Error> {
        let failed = |reason: CannotFill| {
            Error::generic(format!(
                "the requests of the mount cannot be passed on: {reason}"
            ))
            .with_hint("Unmount it and mount it again, or mount it with 'stord mount --keep'.")
        };
        let mount = self.mount.clone();
        let queues = ring.queues();
        let filler = pool::run(move || Filler::new(&mount, queues)).await;
        let filler = filler.map_err(failed)?;
        ring.hold();
        let filled = filler.fill(ring).await;
        if filled.is_ok() {
            let _ = tokio::time::timeout(HOLD_PATIENCE, ring.ended()).await;
        }
        match (ring.take_held(), filled) {
            (Some(held), _) => Ok(HeldEntries::new(held)),
            (None, Err(reason)) => Err(failed(reason)),
            (None, Ok(())) => Err(failed(CannotFill::Late)),
        }
    }

    /// False when the file system was not at its path any more.
    async fn unmount(&self, abort: bool) -> bool {
        let mount = self.mount.clone();
        pool::run(move || mount.unmount(abort)).await
    }
}

impl Export for FuseExport {
    fn connection(&self) -> Option<Connection> {
        let files = self.session.file_system.files();
        if files.iter().any(DiskFile::is_read_past_us) {
            // The kernel would refuse to open them in any other way.
            return None;
        }
        let kept = self.kept.borrow();
        let devices: io::Result<Vec<OwnedFd>> = kept.iter().map(OwnedFd::try_clone).collect();
        let devices = devices.ok().filter(|devices| !devices.is_empty())?;
        Some(Connection {
            devices,
            mount: self.mount.clone(),
            allow_other: self.allow_other,
            attributes: self.session.file_system.save_attributes(),
            transport: match &self.ring {
                None => Transport::Classic,
                Some(_) => Transport::Ring(None),
            },
        })
    }

    fn leave<'a>(&'a self, connection: &'a mut Connection) -> LocalFuture<'a, Result<(), Error>> {
        Box::pin(async {
            if let Some(ring) = &self.ring {
                connection.transport = Transport::Ring(Some(self.hold(ring).await?));
            }
            self.left.set(true);
            self.session.stop();
            Ok(())
        })
    }

    /// Whoever has the file open finds it gone, in either mode, as in the reference.
    fn is_in_use(&self) -> LocalFuture<'_, bool> {
        Box::pin(std::future::ready(false))
    }

    fn shut_down(&self) -> LocalFuture<'_> {
        Box::pin(async {
            let has_ring = self.ring.is_some();
            let unmounting = self.unmount(has_ring);
            let unmounted = tokio::time::timeout(UNMOUNT_PATIENCE, unmounting).await;
            self.kept.take();
            self.session.stop();
            self.let_go();
            if unmounted.is_err() {
                tracing::warn!("unmounting takes long, ending the connection");
            }
            // Entries of io_uring end with the connection only, which users keep alive that have the file open still.
            if unmounted.is_err() || (unmounted == Ok(false) && has_ring) {
                let (mount, session) = (self.mount.clone(), Arc::clone(&self.session));
                pool::run(move || mount.abort(|| session.is_closed())).await;
            }
        })
    }

    fn finish(&self) -> LocalFuture<'_> {
        Box::pin(async {
            self.kept.take();
            self.let_go();
            // Where the connection was aborted, the dead mount is still there.
            if !self.left.get() {
                self.unmount(false).await;
            }
            own_mounts::remove(self.mount.device_number());
        })
    }
}

/// Mounts, the second result being whether other users are let in.
async fn set_up(options: &FuseOptions, io_uring: bool) -> Result<(Mounted, bool), Error> {
    let proposal = Proposal {
        max_transfer: u32::try_from(MAX_PAYLOAD).expect("1 MiB"),
        io_uring,
        passthrough: options.preferred_passthrough() != OnOffAuto::Off && geteuid().is_root(),
    };
    let try_with = |allow_other| {
        let path = options.path.clone();
        let options = Options {
            allow_other,
            directory: options.contents.is_directory(),
            proposal,
        };
        async move {
            let mounted = pool::run(move || Mounted::new(&path, options)).await;
            mounted.map(|mounted| (mounted, allow_other))
        }
    };
    let mounted = match options.allow_other {
        FuseExportAllowOther::On => try_with(true).await,
        FuseExportAllowOther::Off => try_with(false).await,
        FuseExportAllowOther::Auto => match try_with(true).await {
            Err(_) => try_with(false).await,
            mounted => mounted,
        },
    };
    mounted.map_err(cannot_mount)
}

/// Whether io_uring is the faster transport: on one context it is level for small requests, and slower for large ones
/// (docs/performance.md).
fn is_better_with_ring(contexts: &[Context]) -> bool {
    let mut indices = contexts.iter().map(Context::index);
    let first = indices.next();
    indices.any(|other| Some(other) != first)
}

/// What tells the kernel of image files, where it takes that.
fn backing_device(
    options: &FuseOptions,
    device: &OwnedFd,
    flags: InitFlags,
) -> Result<Option<Arc<BackingDevice>>, Error> {
    let is_demanded = options.passthrough == OnOffAuto::On;
    if !flags.contains(InitFlags::PASSTHROUGH) {
        return if is_demanded {
            Err(no_passthrough())
        } else {
            Ok(None)
        };
    }
    match kernel::clone_device(device.as_fd()) {
        Ok(clone) => Ok(Some(BackingDevice::new(clone))),
        Err(errno) if is_demanded => Err(no_passthrough().with_source(errno)),
        Err(_) => Ok(None),
    }
}

fn no_passthrough() -> Error {
    Error::generic("FUSE passthrough is not available")
        .with_hint("it needs Linux 6.9 or newer, built with CONFIG_FUSE_PASSTHROUGH, and root")
}

fn no_io_uring() -> Error {
    Error::generic("FUSE over io_uring is not available").with_hint(
        "it needs Linux 6.14 or newer, root, io_uring, and 'echo Y > /sys/module/fuse/parameters/enable_uring'",
    )
}

fn cannot_mount(error: MountError) -> Error {
    let hint = error.hint();
    let message = Error::generic("Failed to mount FUSE session to export").with_source(error);
    match hint {
        Some(hint) => message.with_hint(hint),
        None => message,
    }
}
