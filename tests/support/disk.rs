//! An exported image beside a plain model of what it must hold, and a writer that does random things to both.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use rand::RngExt;
use rand::rngs::StdRng;

use super::daemon::{Daemon, fuse_args, is_qemu};
use super::direct::{self, Aligned};
use super::model::{assert_same, noise, rng};
use super::{Scratch, qemu};

/// One mebibyte.
pub const MIB: usize = 1 << 20;

/// What is exported and how.
#[derive(Clone, Copy)]
pub struct Setup {
    /// The format of the image, `qcow2` or `raw`.
    pub format: &'static str,
    /// Options of `qemu-img create`; qcow2 only.
    pub create: &'static str,
    /// Whether the image lies over two others full of data.
    pub backing: bool,
    /// Further options of the format node.
    pub node: &'static str,
    /// Further options of the protocol node.
    pub protocol: &'static str,
    /// Of the disk, in bytes.
    pub size: usize,
}

/// An empty qcow2 image that gives space back.
pub const PLAIN: Setup = Setup {
    format: "qcow2",
    create: "",
    backing: false,
    node: ",discard=unmap",
    protocol: "",
    size: 8 * MIB,
};

/// The image with the content that a reader has to find in it.
pub struct Disk {
    /// Where the image is.
    pub image: PathBuf,
    /// The content.
    pub model: Vec<u8>,
    format: &'static str,
}

impl Disk {
    /// A qcow2 image that somebody else made.
    pub fn of(image: PathBuf, model: Vec<u8>) -> Disk {
        Disk {
            image,
            model,
            format: "qcow2",
        }
    }
}

impl Setup {
    /// Makes the image: a raw one full of data, a qcow2 one empty or over others full of data.
    pub fn make(&self, scratch: &Scratch) -> Disk {
        let format = self.format;
        if format == "raw" {
            let model = noise(16, self.size);
            let image = scratch.file("disk.raw", &model);
            return Disk {
                image,
                model,
                format,
            };
        }
        let image = scratch.path("disk.qcow2");
        let mut options: Vec<String> = Vec::new();
        let mut model = vec![0; self.size];
        if !self.create.is_empty() {
            options.push(self.create.to_owned());
        }
        if self.create.contains("data_file") {
            options.push(format!("data_file={}", scratch.path("data.raw").display()));
        }
        if self.backing {
            let (middle, content) = self.chain(scratch);
            model = content;
            options.push(format!(
                "backing_file={},backing_fmt=qcow2",
                middle.display()
            ));
        }
        qemu::create(&image, self.size as u64, &options.join(","));
        Disk {
            image,
            model,
            format,
        }
    }

    /// An image over another; every other 200 KB are the upper one's, so that a reader needs both.
    fn chain(&self, scratch: &Scratch) -> (PathBuf, Vec<u8>) {
        let mut content = noise(17, self.size);
        let base = scratch.file("base.raw", &content);
        let middle = scratch.path("middle.qcow2");
        let options = format!(
            "cluster_size=4096,backing_file={},backing_fmt=raw",
            base.display()
        );
        qemu::create(&middle, self.size as u64, &options);
        let mut commands = Vec::new();
        for at in (0..self.size).step_by(400_384) {
            let len = 200_192.min(self.size - at);
            commands.push(format!("write -P {} {at} {len}", at % 251));
            content[at..at + len].fill(u8::try_from(at % 251).unwrap());
        }
        qemu::io(&middle, "qcow2", &commands);
        (middle, content)
    }

    /// Exports it with these options.
    pub fn start(&self, scratch: &Scratch, disk: &Disk, export: &str) -> (Daemon, PathBuf) {
        let mount = scratch.empty_file("mount");
        let mut args = fuse_args(&disk.image, disk.format, self.node, &mount, export);
        args[1].push_str(self.protocol);
        args[1].push_str(",discard=unmap");
        (Daemon::start(scratch, &args), mount)
    }
}

/// One open mount with the means to do random things to a part of it.
pub struct Writer {
    /// Through the page cache, if the export has one.
    pub buffered: File,
    /// With O_DIRECT.
    pub past_cache: File,
    /// What decides what is done.
    pub rng: StdRng,
}

impl Writer {
    /// Opens the mount in both ways.
    pub fn open(mount: &Path, seed: u64) -> Writer {
        Writer {
            buffered: OpenOptions::new()
                .read(true)
                .write(true)
                .open(mount)
                .unwrap(),
            past_cache: direct::open(mount, true),
            rng: rng(seed),
        }
    }

    /// Does one thing within `part` of the disk, to the mount and to the model; `part` begins and ends at sectors.
    pub fn act(&mut self, model: &mut [u8], part: std::ops::Range<usize>, largest: usize) {
        // QEMU's daemon corrupts data when the kernel splits a write into several requests.
        let largest = if is_qemu() {
            largest.min(30_000)
        } else {
            largest
        };
        let len = self.rng.random_range(1..=largest.min(part.len()));
        let start = self.rng.random_range(part.start..=part.end - len);
        let range = start..start + len;
        let sectors = start / 512 * 512..range.end.next_multiple_of(512);
        let what = format!("{range:?}");
        match self.rng.random_range(0..100) {
            0..25 => {
                let data = noise(self.rng.random(), len);
                self.buffered
                    .write_all_at(&data, start as u64)
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                model[range].copy_from_slice(&data);
            }
            25..50 => {
                let data = noise(self.rng.random(), sectors.len());
                let aligned = Aligned::copy_of(&data);
                let written = self
                    .past_cache
                    .write_all_at(aligned.as_ref(), sectors.start as u64);
                written.unwrap_or_else(|error| panic!("{sectors:?}: {error}"));
                model[sectors].copy_from_slice(&data);
            }
            50..55 => {
                // Zeroes as data, which the format may store in another way.
                let zeroes = Aligned::zeroed(sectors.len());
                self.past_cache
                    .write_all_at(zeroes.as_ref(), sectors.start as u64)
                    .unwrap();
                model[sectors].fill(0);
            }
            55..70 => {
                let mode = if self.rng.random() {
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE
                } else {
                    FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE
                };
                // Mostly whole blocks as file systems do, sometimes odd bytes.
                let range = if !is_qemu() && self.rng.random_bool(0.3) {
                    range
                } else {
                    let unit = 4096;
                    start.next_multiple_of(unit)..range.end / unit * unit
                };
                if range.start < range.end {
                    let at = i64::try_from(range.start).unwrap();
                    let done = fallocate(
                        &self.buffered,
                        mode,
                        at,
                        i64::try_from(range.len()).unwrap(),
                    );
                    if is_qemu() && done.is_err() {
                        return;
                    }
                    done.unwrap_or_else(|error| panic!("{mode:?} of {range:?}: {error}"));
                    model[range].fill(0);
                }
            }
            70..73 => self.buffered.sync_data().unwrap(),
            73..75 => self.past_cache.sync_all().unwrap(),
            75..88 => {
                let mut got = vec![0; len];
                self.buffered.read_exact_at(&mut got, start as u64).unwrap();
                assert_same(&what, &got, &model[range]);
            }
            _ => {
                let mut got = Aligned::zeroed(sectors.len());
                self.past_cache
                    .read_exact_at(got.as_mut(), sectors.start as u64)
                    .unwrap();
                assert_same(&what, got.as_ref(), &model[sectors]);
            }
        }
    }
}

/// Asserts that the mount reads as the model, and that its holes are holes of the model.
#[track_caller]
pub fn assert_mount_is(mount: &Path, model: &[u8]) {
    let file = File::open(mount).unwrap();
    let mut got = vec![0; model.len()];
    file.read_exact_at(&mut got, 0).unwrap();
    assert_same("the mount", &got, model);
    assert_holes_are_zero("the mount", &file, model);
}

/// Asserts that the closed image holds the model and has neither errors nor leaks.
#[track_caller]
pub fn assert_image_is(scratch: &Scratch, disk: &Disk) {
    let content = qemu::content(scratch, &disk.image, disk.format);
    assert_same("the image", &content, &disk.model);
    if disk.format == "qcow2" {
        qemu::assert_clean(&disk.image);
    }
}

/// SEEK_DATA and SEEK_HOLE tile the file, and what they call a hole reads as zeroes.
#[track_caller]
pub fn assert_holes_are_zero(what: &str, file: &File, wanted: &[u8]) -> u64 {
    let size = i64::try_from(wanted.len()).unwrap();
    let mut at = 0;
    let mut data_bytes = 0;
    while at < size {
        let data = match lseek(file, at, Whence::SeekData) {
            Ok(data) => data,
            Err(Errno::ENXIO) => size,
            Err(error) => panic!("{what}: SEEK_DATA at {at}: {error}"),
        };
        assert!(
            data >= at,
            "{what}: SEEK_DATA went back from {at} to {data}"
        );
        let hole = usize::try_from(at).unwrap()..usize::try_from(data).unwrap();
        assert!(
            wanted[hole.clone()].iter().all(|byte| *byte == 0),
            "{what}: data lies in the hole {hole:?}"
        );
        if data == size {
            break;
        }
        at = lseek(file, data, Whence::SeekHole).unwrap();
        assert!(at > data, "{what}: the data at {data} has no length");
        data_bytes += u64::try_from(at - data).unwrap();
    }
    data_bytes
}
