//! Opening a file: access mode, kind, alignment, locks; with messages in the reference's wording.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open as open_path};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{Whence, lseek};
use stord_aio::{Engine, Errno, File, pool};
use stord_qmp::Error;
use stord_qmp::schema::block::{
    BlockdevAioOptions, BlockdevDriver, BlockdevOptionsFile, BlockdevOptionsIoUring, OnOffAuto,
};
use stord_sockets::fdset::Unopenable;

use super::lock::Locks;
use super::{Access, FileDriver, alignment, own_mounts, supplied};
use crate::contexts::Contexts;
use crate::driver::{Limits, Protocol};
use crate::graph::{NodeOptions, cannot_change};

/// Opens the file on the blocking pool.
pub(crate) async fn open(
    contexts: &Contexts,
    driver_name: &'static str,
    options: BlockdevOptionsFile,
    node: NodeOptions,
) -> Result<FileDriver, Error> {
    contexts
        .main()
        .run(move || pool::run(move || open_here(driver_name, &options, &node)))
        .await
        .map_err(|gone| Error::generic(gone.to_string()))?
}

/// The options of `file` that do what the `io_uring` driver is asked for.
pub(crate) fn by_io_uring(options: &BlockdevOptionsIoUring) -> BlockdevOptionsFile {
    BlockdevOptionsFile {
        aio: Some(BlockdevAioOptions::IoUring),
        ..BlockdevOptionsFile::new(options.filename.clone())
    }
}

/// Opens the file that `fd` is open on once more, whatever its name leads to by now.
pub(super) fn reopen(fd: BorrowedFd<'_>, writable: bool, direct: bool) -> Result<OwnedFd, Errno> {
    open_path(
        format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str(),
        flags(writable, direct),
        Mode::empty(),
    )
}

fn flags(writable: bool, direct: bool) -> OFlag {
    let mut flags = OFlag::O_CLOEXEC
        | if writable {
            OFlag::O_RDWR
        } else {
            OFlag::O_RDONLY
        };
    flags.set(OFlag::O_DIRECT, direct);
    flags
}

fn open_here(
    driver_name: &'static str,
    options: &BlockdevOptionsFile,
    node: &NodeOptions,
) -> Result<FileDriver, Error> {
    let filename = &options.filename;
    if filename.is_empty() {
        return Err(Error::generic(format!(
            "The '{driver_name}' block driver requires a file name"
        )));
    }
    check_engine(options, node)?;
    check_no_fdset(filename)?;
    let dynamic = node.auto_read_only && !node.read_only;
    let writable = !node.read_only && !dynamic;
    let fd = open_path(
        supplied::path_of(filename).as_str(),
        flags(writable, node.direct) | OFlag::O_NONBLOCK,
        Mode::empty(),
    )
    .map_err(|errno| cannot_open(filename, errno, node.direct))?;
    let stat = fstat(&fd).map_err(|errno| cannot_open(filename, errno, false))?;
    let is_device = check_kind(driver_name, filename, stat.st_mode)?;
    if own_mounts::contains(stat.st_dev) {
        return Err(Error::generic(format!(
            "Could not open '{filename}': it is on a mount of this daemon's own"
        ))
        .with_hint("Open the image that is exported there instead"));
    }
    let locks = Locks::new(lock_descriptor(&fd, options)?);
    let end = lseek(&fd, 0, Whence::SeekEnd)
        .map_err(|errno| Error::os(format!("Could not get the size of '{filename}'"), errno))?;
    // It was for the opening alone.
    fcntl(&fd, FcntlArg::F_SETFL(flags(writable, node.direct)))
        .map_err(|errno| cannot_open(filename, errno, false))?;
    let access = access(options, node, writable)?;
    Ok(FileDriver {
        filename: filename.clone(),
        limits: limits(&fd, node.direct)?,
        file: ArcSwap::from_pointee(File::new(fd, access.engine).with_batch(access.batch)),
        access,
        prepared: Mutex::new(None),
        locks: Arc::new(locks),
        discards: Arc::default(),
        length: AtomicU64::new(u64::try_from(end).unwrap_or(0)),
        is_device,
        identity: (stat.st_dev, stat.st_ino),
        no_zero_range: AtomicBool::new(false),
        no_punch_hole: AtomicBool::new(false),
        found: Default::default(),
        flush_failed: AtomicBool::new(false),
    })
}

/// A second driver on the file of `old`, for other options.
pub(super) fn reopened(
    old: &FileDriver,
    driver: &BlockdevDriver,
    node: &NodeOptions,
) -> Result<FileDriver, Error> {
    let uring;
    let options = match driver {
        BlockdevDriver::File(options) | BlockdevDriver::HostDevice(options) => options,
        BlockdevDriver::IoUring(options) => {
            uring = by_io_uring(options);
            &uring
        }
        _ => return Err(cannot_change("driver")),
    };
    if options.filename != old.filename {
        return Err(cannot_change("filename"));
    }
    if options.locking.unwrap_or(OnOffAuto::Auto) != old.access.locking.unwrap_or(OnOffAuto::Auto) {
        return Err(cannot_change("locking"));
    }
    check_engine(options, node)?;
    let was_writable = old.access.writable.load(Ordering::Acquire);
    let dynamic = node.auto_read_only && !node.read_only;
    let writable = if dynamic {
        old.access.dynamic && was_writable
    } else {
        !node.read_only
    };
    let fd = reopen(old.file().fd().as_fd(), writable, node.direct)
        .map_err(|errno| cannot_open(&old.filename, errno, node.direct))?;
    let access = access(options, node, writable)?;
    Ok(FileDriver {
        filename: old.filename.clone(),
        limits: limits(&fd, node.direct)?,
        file: ArcSwap::from_pointee(File::new(fd, access.engine).with_batch(access.batch)),
        access,
        prepared: Mutex::new(None),
        locks: Arc::clone(&old.locks),
        discards: Arc::clone(&old.discards),
        length: AtomicU64::new(old.length()),
        is_device: old.is_device,
        identity: old.identity,
        no_zero_range: AtomicBool::new(false),
        no_punch_hole: AtomicBool::new(false),
        found: Default::default(),
        flush_failed: AtomicBool::new(old.flush_failed.load(Ordering::Acquire)),
    })
}

fn limits(fd: &OwnedFd, direct: bool) -> Result<Limits, Error> {
    alignment::limits(fd, direct).map_err(|errno| {
        Error::os("Could not find working O_DIRECT alignment", errno)
            .with_hint("Try cache.direct=off")
    })
}

fn check_engine(options: &BlockdevOptionsFile, node: &NodeOptions) -> Result<(), Error> {
    if options.aio == Some(BlockdevAioOptions::Native) && !node.direct {
        return Err(Error::generic(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    Ok(())
}

fn access(
    options: &BlockdevOptionsFile,
    node: &NodeOptions,
    writable: bool,
) -> Result<Access, Error> {
    Ok(Access {
        engine: match options.aio {
            None => Engine::Auto,
            Some(BlockdevAioOptions::Threads) => Engine::Threads,
            Some(BlockdevAioOptions::Native | BlockdevAioOptions::IoUring) => Engine::Uring,
        },
        batch: batch(options.aio_max_batch)?,
        drop_cache: options.drop_cache.unwrap_or(true) && !node.direct,
        check_dropped: options.x_check_cache_dropped.unwrap_or(false) && !node.direct,
        locking: options.locking,
        direct: node.direct,
        dynamic: node.auto_read_only && !node.read_only,
        writable: AtomicBool::new(writable),
        read_only: node.read_only,
    })
}

fn batch(wanted: Option<i64>) -> Result<u32, Error> {
    u32::try_from(wanted.unwrap_or(0)).map_err(|_| {
        Error::generic("Parameter 'aio-max-batch' expects a number between 0 and 4294967295")
    })
}

fn check_no_fdset(filename: &str) -> Result<(), Error> {
    match Unopenable::of(filename) {
        None => Ok(()),
        Some(Unopenable::Malformed) => {
            Err(Error::generic(format!("Could not parse fdset {filename}")))
        }
        Some(why) => Err(cannot_open(filename, Errno::from_raw(why.errno()), false)),
    }
}

fn cannot_open(filename: &str, errno: Errno, direct: bool) -> Error {
    if direct && errno == Errno::EINVAL {
        return Error::generic(format!(
            "Could not open '{filename}': filesystem does not support O_DIRECT"
        ));
    }
    let error = Error::os(format!("Could not open '{filename}'"), errno);
    match errno {
        Errno::EACCES | Errno::EPERM | Errno::EROFS => {
            error.with_hint("Is read-only=on what you want?")
        }
        _ => error,
    }
}

/// Whether the file is a device, if it is what the driver is for.
fn check_kind(driver_name: &str, filename: &str, mode: u32) -> Result<bool, Error> {
    let kind = SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits());
    let is_device = kind == SFlag::S_IFBLK || kind == SFlag::S_IFCHR;
    let (fits, wanted) = match driver_name {
        "host_device" => (is_device, "either a character or block device"),
        "io_uring" => (
            kind == SFlag::S_IFREG || kind == SFlag::S_IFBLK,
            "either a regular file or a block device",
        ),
        _ => (kind == SFlag::S_IFREG, "a regular file"),
    };
    if !fits {
        return Err(Error::generic(format!(
            "'{driver_name}' driver requires '{filename}' to be {wanted}"
        )));
    }
    Ok(is_device)
}

/// The descriptor to hold locks on: the same open file as `fd`, kept when the node switches to another.
fn lock_descriptor(fd: &OwnedFd, options: &BlockdevOptionsFile) -> Result<Option<OwnedFd>, Error> {
    let wanted = options.locking.unwrap_or(OnOffAuto::Auto);
    if wanted == OnOffAuto::Off {
        return Ok(None);
    }
    if !Locks::supported(fd) {
        return match wanted {
            OnOffAuto::On => Err(Error::generic(format!(
                "Could not lock '{}': the file system has no locks",
                options.filename
            ))
            .with_hint("Use locking=off, and make sure that nobody else writes to the image")),
            _ => Ok(None),
        };
    }
    let kept = fd.as_fd().try_clone_to_owned();
    kept.map(Some).map_err(|source| {
        Error::generic("Could not duplicate a file descriptor").with_source(source)
    })
}
