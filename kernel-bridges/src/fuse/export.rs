//! The life of a FUSE export: set up, served by its queues, and taken down in an order that loses nothing and cannot hang.
//!
//! Down: the mount is taken from its path while the queues still serve, so that the kernel can write back what it holds; then the
//! queues are told to stop, which ends the connection for whoever has the file open still; when all of them have ended, the backend
//! goes. An unmount by somebody else ends the queues, and the rest follows.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use stord_aio::sync::mpsc;
use stord_aio::{Context, pool};
use stord_block::drivers::protocol::file::own_mounts;
use stord_qmp::Error;
use stord_qmp::schema::export::FuseExportAllowOther;

use crate::export::{Ended, Export, LocalFuture, Parts};

use super::buffers::MAX_PAYLOAD;
use super::classic;
use super::file_system::{FileSystem, Presentation};
use super::kernel;
use super::mount::{Mount, MountError, Mounted, Options};
use super::resize::{ResizeRequest, Resizer};
use super::session::Session;

/// An unmount that takes longer than this waits for requests that do not end; the queues are stopped under it.
const UNMOUNT_PATIENCE: Duration = Duration::from_secs(5);

/// What a FUSE export is to be.
pub(crate) struct FuseOptions {
    /// The regular file to mount over; see [`check_mountpoint`].
    pub(crate) path: PathBuf,
    pub(crate) allow_other: FuseExportAllowOther,
    pub(crate) growable: bool,
    /// Who changes the image's length where the backend may not.
    pub(crate) resizes: Option<mpsc::UnboundedSender<ResizeRequest>>,
}

/// A mounted FUSE export.
pub(crate) struct FuseExport {
    session: Arc<Session>,
    mount: Mount,
}

/// Looks whether a mountpoint can be one, and gives its absolute path.
///
/// # Errors
/// It does not exist, or is no regular file.
pub(crate) async fn check_mountpoint(mountpoint: &str) -> Result<PathBuf, Error> {
    let path = mountpoint.to_owned();
    let looked = pool::run(move || {
        let is_file = std::fs::metadata(&path)?.is_file();
        Ok::<_, io::Error>((is_file, std::fs::canonicalize(&path)?))
    })
    .await;
    match looked {
        Ok((true, path)) => Ok(path),
        Ok((false, _)) => Err(Error::generic(format!(
            "'{mountpoint}' is not a regular file"
        ))),
        Err(error) => Err(cannot_stat(mountpoint, &error)),
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
    /// Mounts the backend and serves it, one queue on each context. The second result resolves when all queues have ended, for
    /// whatever reason; [`finish`](Self::finish) has to follow.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub(crate) async fn start(options: FuseOptions, parts: Parts) -> Result<(Self, Ended), Error> {
        let Parts {
            backend,
            contexts,
            writable,
            writethrough,
        } = parts;
        let (mounted, allow_other) = set_up(&options.path, options.allow_other).await?;
        let Mounted {
            device,
            flags,
            mount,
            attachment,
        } = mounted;
        tracing::debug!(path = %options.path.display(), ?flags, allow_other, "FUSE connection");
        let presentation = Presentation {
            writable,
            growable: options.growable,
            writethrough,
            allow_other,
        };
        let devices = clone_devices(device, contexts.len());
        let resizer = options.resizes.map_or(Resizer::Own, Resizer::Control);
        let file_system = FileSystem::new(backend, presentation, resizer);
        let session = Session::new(file_system, devices.len());
        own_mounts::add(mount.device_number());
        let ended = serve(devices, &contexts, &session);
        let export = Self { session, mount };
        if let Err(error) = pool::run(move || attachment.attach()).await {
            export.session.stop();
            ended.await;
            export.finish().await;
            return Err(cannot_mount(error));
        }
        Ok((export, ended))
    }

    async fn unmount(&self) {
        let mount = self.mount.clone();
        pool::run(move || mount.unmount()).await;
    }
}

impl Export for FuseExport {
    /// Whoever has the file open finds it gone, in either mode, as in the reference.
    fn is_in_use(&self) -> bool {
        false
    }

    fn shut_down(&self) -> LocalFuture<'_> {
        Box::pin(async {
            let unmounting = self.unmount();
            if tokio::time::timeout(UNMOUNT_PATIENCE, unmounting)
                .await
                .is_err()
            {
                tracing::warn!("unmounting takes long, ending the connection");
            }
            self.session.stop();
        })
    }

    fn finish(&self) -> LocalFuture<'_> {
        Box::pin(async {
            // Where the connection was aborted, the dead mount is still there.
            self.unmount().await;
            own_mounts::remove(self.mount.device_number());
        })
    }
}

/// Mounts, the second result being whether other users are let in.
async fn set_up(path: &Path, allow_other: FuseExportAllowOther) -> Result<(Mounted, bool), Error> {
    let max_read = u32::try_from(MAX_PAYLOAD).expect("1 MiB");
    let try_with = |allow_other| {
        let path = path.to_owned();
        let options = Options {
            allow_other,
            max_read,
        };
        async move {
            let mounted = pool::run(move || Mounted::new(&path, options)).await;
            mounted.map(|mounted| (mounted, allow_other))
        }
    };
    let mounted = match allow_other {
        FuseExportAllowOther::On => try_with(true).await,
        FuseExportAllowOther::Off => try_with(false).await,
        FuseExportAllowOther::Auto => match try_with(true).await {
            Err(_) => try_with(false).await,
            mounted => mounted,
        },
    };
    mounted.map_err(cannot_mount)
}

fn cannot_mount(error: MountError) -> Error {
    let hint = error.hint();
    let message = Error::generic("Failed to mount FUSE session to export").with_source(error);
    match hint {
        Some(hint) => message.with_hint(hint),
        None => message,
    }
}

/// Descriptors for up to `wanted` queues.
fn clone_devices(device: OwnedFd, wanted: usize) -> Vec<OwnedFd> {
    let mut devices = vec![device];
    while devices.len() < wanted {
        match kernel::clone_device(devices[0].as_fd()) {
            Ok(device) => devices.push(device),
            Err(errno) => {
                tracing::warn!(%errno, "cannot clone the FUSE device: serving with fewer queues");
                break;
            }
        }
    }
    devices
}

fn serve(devices: Vec<OwnedFd>, contexts: &[Context], session: &Arc<Session>) -> Ended {
    let queues: Vec<_> = devices
        .into_iter()
        .zip(contexts)
        .enumerate()
        .map(|(index, (device, context))| {
            let session = Arc::clone(session);
            context.run(move || classic::serve(device, session, index))
        })
        .collect();
    Box::pin(async move {
        for queue in queues {
            // A context that has ended has ended its queue before.
            let _ = queue.await;
        }
    })
}
