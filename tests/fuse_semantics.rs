//! System calls on an exported file, side by side with the same on an export of QEMU's daemon: the outcomes are the same but
//! where QEMU's are wrong or poor, and these places are listed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{
    FallocateFlags, FcntlArg, Flock, FlockArg, OFlag, copy_file_range, fallocate, fcntl,
};
use nix::libc;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::statvfs::statvfs;
use nix::unistd::{Gid, Uid, Whence, fchown, lseek};

use crate::needs;
use crate::support::daemon::{Daemon, fuse_args, is_qemu, program};
use crate::support::{Scratch, qemu};

const SIZE: u64 = 4 << 20;

/// What was done and what came of it.
type Outcomes = Vec<(String, String)>;

/// A file on which things are done in order.
struct Battery<'a> {
    mount: &'a Path,
    file: File,
    other: File,
    outcomes: Outcomes,
}

impl Battery<'_> {
    fn note<T: std::fmt::Debug, E: Into<io::Error>>(&mut self, what: &str, result: Result<T, E>) {
        let outcome = match result.map_err(Into::into) {
            Ok(value) => format!("{value:?}"),
            Err(error) => match error.raw_os_error() {
                Some(code) => format!("{:?}", Errno::from_raw(code)),
                None => error.to_string(),
            },
        };
        self.outcomes.push((what.to_owned(), outcome));
    }

    fn size(&mut self, after: &str) {
        let size = self.file.metadata().map(|found| found.len());
        self.note(&format!("size after {after}"), size);
    }

    fn attributes(&mut self) {
        let found = self.file.metadata().unwrap();
        self.note(
            "mode, links, owner",
            io::Result::Ok((found.mode(), found.nlink(), found.uid(), found.gid())),
        );
        self.note("block size", io::Result::Ok(found.blksize()));
        let found = statvfs(self.mount).unwrap();
        self.note("statfs blocks", io::Result::Ok(found.blocks()));
        self.note(
            "statfs",
            io::Result::Ok((found.block_size(), found.fragment_size(), found.name_max())),
        );
    }

    fn data(&mut self) {
        let written = self.file.write_at(&[1; 10_000], 100);
        self.note("write inside", written);
        let written = self.file.write_at(&[2; 1024], SIZE - 512);
        self.note("write across the end", written);
        self.size("a write across the end");
        let written = self.file.write_at(&[2; 1024], SIZE + 4096);
        self.note("write past the end", written);
        self.size("a write past the end");
        for size in [SIZE + 65_536, SIZE] {
            let truncated = self.file.set_len(size);
            self.note(&format!("truncate to {size}"), truncated);
            self.size("truncation");
        }
        let read = self.file.read_at(&mut [0; 4096], SIZE - 10);
        self.note("read across the end", read);
        let read = self.file.read_at(&mut [0; 4096], SIZE + 10);
        self.note("read past the end", read);
    }

    fn space(&mut self) {
        for mode in [0, 1, 3, 2, 0x10, 0x11, 8, 0x20, 0x40, 0x41] {
            for (offset, length) in [
                (4096, 8192),
                (SIZE - 4096, 8192),
                (SIZE, 4096),
                (SIZE + 8192, 4096),
                (5, 100),
                (0, 0),
            ] {
                let done = fallocate(
                    &self.file,
                    FallocateFlags::from_bits_retain(mode),
                    i64::try_from(offset).unwrap(),
                    length,
                );
                let what = format!("fallocate {mode:#x} {offset} {length}");
                self.note(&what, done);
                self.size(&what);
                let _ = self.file.set_len(SIZE);
            }
        }
        let end = i64::try_from(SIZE).unwrap();
        for (what, at, whence) in [
            ("data at the end", end, Whence::SeekData),
            ("hole at the end", end, Whence::SeekHole),
            ("data past the end", end + 1, Whence::SeekData),
            ("hole past the end", end + 1, Whence::SeekHole),
            ("end", 0, Whence::SeekEnd),
        ] {
            let found = lseek(&self.file, at, whence);
            self.note(&format!("seek {what}"), found);
        }
    }

    fn copies(&mut self) {
        let copied = copy_file_range(
            &self.file,
            Some(&mut 0),
            &self.file,
            Some(&mut 65_536),
            8192,
        );
        self.note("copy within", copied);
        let copied = copy_file_range(&self.file, Some(&mut 0), &self.file, Some(&mut 100), 8192);
        self.note("copy over itself", copied);
        let copied = copy_file_range(&self.file, Some(&mut 0), &self.other, Some(&mut 0), 8192);
        self.note("copy out", copied);
        let copied = copy_file_range(&self.other, Some(&mut 0), &self.file, Some(&mut 0), 8192);
        self.note("copy in", copied);
    }

    fn locks(&mut self) {
        let mut again = OpenOptions::new();
        again.read(true).write(true);
        let (first, second) = (again.open(self.mount), again.open(self.mount));
        let (first, second) = (first.unwrap(), second.unwrap());
        let lock = libc::flock {
            l_type: i16::try_from(libc::F_WRLCK).unwrap(),
            l_whence: 0,
            l_start: 0,
            l_len: 10,
            l_pid: 0,
        };
        let locked = fcntl(&first, FcntlArg::F_OFD_SETLK(&lock));
        self.note("range lock", locked);
        let locked = fcntl(&second, FcntlArg::F_OFD_SETLK(&lock));
        self.note("range lock held by another", locked);
        let held = Flock::lock(first, FlockArg::LockExclusiveNonblock);
        let held = held.map_err(|(_, errno)| errno);
        self.note("flock", held.as_ref().map(|_| ()).map_err(|errno| *errno));
        let refused = Flock::lock(second, FlockArg::LockSharedNonblock);
        self.note(
            "flock held by another",
            refused.map(|_| ()).map_err(|(_, errno)| errno),
        );
    }

    fn changes_of_attributes(&mut self) {
        for mode in [0o400, 0o666, 0o600] {
            let changed = self.file.set_permissions(PermissionsExt::from_mode(mode));
            self.note(&format!("chmod {mode:o}"), changed);
            let mode = self.file.metadata().unwrap().mode();
            self.note("mode", io::Result::Ok(mode));
        }
        for owner in [1000, 0] {
            let changed = fchown(
                &self.file,
                Some(Uid::from_raw(owner)),
                Some(Gid::from_raw(owner)),
            );
            self.note(&format!("chown {owner}"), changed);
        }
        let modified = self
            .file
            .set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(5));
        self.note("utime", modified);
    }

    fn places(&mut self) {
        self.note("unlink", std::fs::remove_file(self.mount));
        let beside = self.mount.with_extension("beside");
        self.note("rename", std::fs::rename(self.mount, &beside));
        self.note("link", std::fs::hard_link(self.mount, &beside));
        self.note("list", std::fs::read_dir(self.mount).map(|_| ()));
        self.note("open below", File::create(self.mount.join("x")).map(|_| ()));
        let truncated = OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(self.mount);
        self.note("open with O_TRUNC", truncated.map(|_| ()));
        self.size("O_TRUNC");
        self.note("fsync", self.file.sync_all());
        self.note("fdatasync", self.file.sync_data());
    }

    /// O_DIRECT without any alignment, as the daemon serves it.
    fn direct(&mut self) {
        let direct = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(self.mount)
            .unwrap();
        let flags = fcntl(&direct, FcntlArg::F_GETFL).unwrap();
        assert_eq!(flags & OFlag::O_DIRECT.bits(), OFlag::O_DIRECT.bits());
        self.note("O_DIRECT write", direct.write_at(&[7; 4096], 8192));
        self.note("odd O_DIRECT write", direct.write_at(&[7; 100], 3));
        self.note("odd O_DIRECT read", direct.read_at(&mut [0; 777], 5));
    }

    /// Watchers hear of what is done through the mount.
    fn watches(&mut self) {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        let watched = inotify.add_watch(self.mount, AddWatchFlags::IN_ALL_EVENTS);
        self.note("watch", watched.map(|_| ()));
        self.file.write_at(b"x", 0).unwrap();
        self.file.read_at(&mut [0], 0).unwrap();
        drop(File::open(self.mount).unwrap());
        let events = inotify.read_events();
        let masks = events.map(|list| list.iter().map(|event| event.mask).collect::<Vec<_>>());
        self.note("events", masks);
    }

    /// What tools ask of disks; blockdev(8) fails on what is not answered.
    fn ioctls(&mut self) {
        for question in ["--getsize64", "--getbsz", "--getss"] {
            let output = Command::new("blockdev")
                .args([question, self.mount.to_str().unwrap()])
                .output()
                .unwrap();
            let said = String::from_utf8(output.stdout).unwrap().trim().to_owned();
            self.note(
                &format!("blockdev {question}"),
                io::Result::Ok((output.status.success(), said)),
            );
        }
    }
}

fn outcomes(program: &Path, format: &str, export: &str) -> Outcomes {
    let scratch = Scratch::new();
    let image = scratch.path("image");
    let size = SIZE.to_string();
    qemu::img(&["create", "-q", "-f", format, image.to_str().unwrap(), &size]);
    let mount = scratch.empty_file("mount");
    let args = fuse_args(&image, format, ",discard=unmap", &mount, export);
    let daemon = Daemon::start_as(&scratch, Command::new(program), &args);
    let mut battery = Battery {
        mount: &mount,
        file: OpenOptions::new()
            .read(true)
            .write(true)
            .open(&mount)
            .unwrap(),
        other: File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(scratch.path("other"))
            .unwrap(),
        outcomes: Vec::new(),
    };
    battery.other.set_len(SIZE).unwrap();
    battery.attributes();
    battery.data();
    battery.space();
    battery.copies();
    battery.locks();
    battery.changes_of_attributes();
    battery.direct();
    battery.watches();
    battery.places();
    battery.ioctls();
    let outcomes = std::mem::take(&mut battery.outcomes);
    drop(battery);
    daemon.stop();
    outcomes
}

/// Runs all of it on both daemons and compares; `better` says where ours is to differ, and how.
#[track_caller]
fn compare(format: &str, export: &str, better: &[(&str, &str)]) {
    let theirs = outcomes(Path::new("qemu-storage-daemon"), format, export);
    let ours = outcomes(&program(), format, export);
    let mut different = Vec::new();
    for ((what, got), (_, reference)) in ours.iter().zip(&theirs) {
        let wanted = better.iter().find(|(place, _)| place == what);
        let wanted = wanted.map_or(reference.as_str(), |(_, wanted)| wanted);
        if got != wanted {
            different.push(format!("{what}: {got} instead of {wanted} ({reference})"));
        }
    }
    assert_eq!(ours.len(), theirs.len());
    assert!(different.is_empty(), "{format}{export}: {different:#?}");
}

/// Where we mean to be better.
const BETTER: &[(&str, &str)] = &[
    ("block size", "4096"),
    ("statfs blocks", "8192"),
    ("seek hole at the end", "ENXIO"),
    ("utime", "()"),
    ("blockdev --getsize64", "(true, \"4194304\")"),
    ("blockdev --getbsz", "(true, \"4096\")"),
    // As on a local file system: past the end there is nothing to do.
    ("fallocate 0x3 4202496 4096", "()"),
    ("fallocate 0x11 4202496 4096", "()"),
];

#[test]
fn raw_file_behaves_as_qemus() {
    needs!(root, "qemu-img", "qemu-storage-daemon", "blockdev");
    if !is_qemu() {
        compare("raw", ",writable=on", BETTER);
        compare("raw", ",writable=on,growable=on", BETTER);
    }
}

#[test]
fn qcow2_file_behaves_as_qemus() {
    needs!(root, "qemu-img", "qemu-storage-daemon", "blockdev");
    if !is_qemu() {
        // QEMU punches no holes where it would have to write a part of a cluster.
        let punches = [
            ("fallocate 0x3 4096 8192", "()"),
            ("fallocate 0x3 4190208 8192", "()"),
            ("fallocate 0x3 5 100", "()"),
        ];
        let better = [BETTER, &punches].concat();
        compare("qcow2", ",writable=on", &better);
        compare("qcow2", ",writable=on,growable=on", &better);
    }
}
