//! A long random sequence of everything that can be done to a file, beside a model of what it must hold, in the manner of fsx.
//!
//! A raw and a qcow2 image, over both transports; `STORD_OPERATIONS=25000` makes it 100,000 operations in all.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::fcntl::{FallocateFlags, copy_file_range, fallocate};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::needs;
use crate::support::daemon::{Daemon, fuse_args, is_qemu, program};
use crate::support::disk::assert_holes_are_zero;
use crate::support::model::{assert_same, noise, rng};
use crate::support::{Scratch, direct, qemu};

/// Operations on each image over each transport, unless `STORD_OPERATIONS` gives another number.
const OPERATIONS: usize = 5000;
/// The file never gets longer than this.
const LONGEST: usize = 512 << 10;
/// The longest range of one operation.
const LARGEST: usize = 64 << 10;
/// Between two looks at all of it.
const CHECK_EVERY: usize = 2500;

/// A process that reads and writes the file through memory. It is told an operation, where and how much, and answers with the bytes
/// read or with one byte.
const MAPPER: &str = r#"
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
while line := sys.stdin.buffer.readline():
    what, at, length = line.split()
    at, length = int(at), int(length)
    with mmap.mmap(file, at + length) as memory:
        if what == b"r":
            sys.stdout.buffer.write(memory[at:at + length])
        else:
            memory[at:at + length] = sys.stdin.buffer.read(length)
            if what == b"s":
                memory.flush()
            sys.stdout.buffer.write(b".")
    sys.stdout.buffer.flush()
"#;

struct Mapper {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Mapper {
    fn start(path: &Path) -> Mapper {
        let mut child = Command::new("python3")
            .args(["-c", MAPPER])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Mapper {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    fn read(&mut self, range: &Range<usize>) -> Vec<u8> {
        writeln!(self.input, "r {} {}", range.start, range.len()).unwrap();
        let mut bytes = vec![0; range.len()];
        self.output.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// `sync` has the memory written back at once.
    fn write(&mut self, at: usize, bytes: &[u8], sync: bool) {
        let what = if sync { 's' } else { 'w' };
        writeln!(self.input, "{what} {at} {}", bytes.len()).unwrap();
        self.input.write_all(bytes).unwrap();
        self.output.read_exact(&mut [0]).unwrap();
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Exerciser {
    path: PathBuf,
    file: File,
    past_cache: File,
    mapper: Mapper,
    model: Vec<u8>,
    rng: StdRng,
    /// Lengths are multiples of this.
    unit: usize,
}

impl Exerciser {
    /// A range inside the longest file, of at least one byte.
    fn anywhere(&mut self) -> Range<usize> {
        let len = self.rng.random_range(1..=LARGEST);
        let start = self.rng.random_range(0..=LONGEST - len);
        start..start + len
    }

    /// A range inside the file; `None` if it is empty.
    fn inside(&mut self) -> Option<Range<usize>> {
        let size = self.model.len();
        let start = self.rng.random_range(0..size.max(1));
        let len = self.rng.random_range(1..=LARGEST);
        (start < size).then(|| start..size.min(start + len))
    }

    /// The range, with an end that the file can have if it is longer than the file.
    fn fitting(&self, mut range: Range<usize>) -> Range<usize> {
        if range.end > self.model.len() {
            range.end = range.end.next_multiple_of(self.unit).min(LONGEST);
        }
        range
    }

    fn grow(&mut self, end: usize) {
        if end > self.model.len() {
            self.model.resize(end, 0);
        }
    }

    fn act(&mut self) -> String {
        match self.rng.random_range(0..100) {
            0..24 => self.write(),
            24..40 => self.read(),
            40..47 => self.read_past_cache(),
            47..54 => self.map_read(),
            54..61 => self.map_write(),
            61..69 => self.truncate(),
            69..77 => self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, true),
            77..82 => self.fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, true),
            82..86 => self.fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, false),
            86..88 => self.preallocate(),
            88..95 => self.copy(),
            95..98 => {
                self.file.sync_data().unwrap();
                "sync".to_owned()
            }
            _ => {
                self.file = open(&self.path);
                "reopen".to_owned()
            }
        }
    }

    fn write(&mut self) -> String {
        let range = self.anywhere();
        let range = self.fitting(range);
        let data = noise(self.rng.random(), range.len());
        self.file.write_all_at(&data, range.start as u64).unwrap();
        self.grow(range.end);
        self.model[range.clone()].copy_from_slice(&data);
        format!("write {range:?}")
    }

    fn read(&mut self) -> String {
        let range = self.anywhere();
        let mut bytes = vec![0xaa; range.len()];
        let read = self.file.read_at(&mut bytes, range.start as u64).unwrap();
        let end = range.end.min(self.model.len());
        let wanted = self.model.get(range.start..end).unwrap_or_default();
        assert_same(&format!("read {range:?}"), &bytes[..read], wanted);
        format!("read {range:?}")
    }

    fn read_past_cache(&mut self) -> String {
        let Some(range) = self.inside() else {
            return "nothing to read".to_owned();
        };
        let sectors = range.start / 512 * 512..range.end.next_multiple_of(512);
        let mut bytes = direct::Aligned::zeroed(sectors.len());
        let read = self
            .past_cache
            .read_at(bytes.as_mut(), sectors.start as u64);
        let end = sectors.end.min(self.model.len());
        let what = format!("read past the cache {sectors:?}");
        let wanted = &self.model[sectors.start..end];
        assert_same(&what, &bytes.as_ref()[..read.unwrap()], wanted);
        what
    }

    fn map_read(&mut self) -> String {
        let Some(range) = self.inside() else {
            return "nothing to map".to_owned();
        };
        let bytes = self.mapper.read(&range);
        let what = format!("read memory {range:?}");
        assert_same(&what, &bytes, &self.model[range]);
        what
    }

    fn map_write(&mut self) -> String {
        let Some(range) = self.inside() else {
            return "nothing to map".to_owned();
        };
        let data = noise(self.rng.random(), range.len());
        let sync = self.rng.random();
        self.mapper.write(range.start, &data, sync);
        self.model[range.clone()].copy_from_slice(&data);
        format!("write memory {range:?}, sync {sync}")
    }

    fn truncate(&mut self) -> String {
        let size = self.rng.random_range(0..=LONGEST) / self.unit * self.unit;
        self.file.set_len(size as u64).unwrap();
        self.model.resize(size, 0);
        format!("truncate {size}")
    }

    fn fallocate(&mut self, mode: FallocateFlags, keep_size: bool) -> String {
        let mut range = self.anywhere();
        let mut flags = mode;
        if keep_size {
            flags |= FallocateFlags::FALLOC_FL_KEEP_SIZE;
        } else {
            range = self.fitting(range);
        }
        self.call_fallocate(flags, &range);
        if !keep_size {
            self.grow(range.end);
        }
        let end = range.end.min(self.model.len());
        if let Some(zeroed) = self.model.get_mut(range.start..end) {
            zeroed.fill(0);
        }
        format!("{flags:?} {range:?}")
    }

    /// Past the end only, where it makes the file longer.
    fn preallocate(&mut self) -> String {
        let size = self.model.len();
        let room = LONGEST - size;
        let len = self.rng.random_range(0..=room.min(LARGEST)) / self.unit * self.unit;
        if len > 0 {
            self.call_fallocate(FallocateFlags::empty(), &(size..size + len));
            self.grow(size + len);
        }
        format!("preallocate {len} at {size}")
    }

    fn call_fallocate(&self, flags: FallocateFlags, range: &Range<usize>) {
        let at = i64::try_from(range.start).unwrap();
        let len = i64::try_from(range.len()).unwrap();
        fallocate(&self.file, flags, at, len)
            .unwrap_or_else(|error| panic!("{flags:?} {range:?}: {error}"));
    }

    fn copy(&mut self) -> String {
        let Some(from) = self.inside() else {
            return "nothing to copy".to_owned();
        };
        let to = self.rng.random_range(0..=LONGEST - from.len());
        let to = to..to + from.len();
        let overlap = from.start < to.end && to.start < from.end;
        // What makes the file longer ends where a file can.
        if overlap || (to.end > self.model.len() && !to.end.is_multiple_of(self.unit)) {
            return format!("no copy {from:?} to {to:?}");
        }
        let mut done = 0;
        while done < from.len() {
            let mut in_offset = i64::try_from(from.start + done).unwrap();
            let mut out_offset = i64::try_from(to.start + done).unwrap();
            let copied = copy_file_range(
                &self.file,
                Some(&mut in_offset),
                &self.file,
                Some(&mut out_offset),
                from.len() - done,
            );
            let copied = copied.unwrap_or_else(|error| panic!("copy {from:?} to {to:?}: {error}"));
            assert!(copied > 0, "copy {from:?} to {to:?} ends after {done}");
            done += copied;
        }
        self.grow(to.end);
        self.model.copy_within(from.clone(), to.start);
        format!("copy {from:?} to {to:?}")
    }

    fn check(&self) {
        let mut bytes = Vec::new();
        File::open(&self.path)
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        assert_same("all of it", &bytes, &self.model);
        assert_holes_are_zero("the mount", &self.file, &self.model);
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

fn exercise(format: &str, transport: &str, seed: u64) {
    let scratch = Scratch::in_memory();
    let image = scratch.path("image");
    let (unit, size) = if format == "raw" {
        (1, 99_999)
    } else {
        (512, 131_072)
    };
    let (text, size_text) = (image.to_str().unwrap(), size.to_string());
    qemu::img(&["create", "-q", "-f", format, text, &size_text]);
    let size = usize::try_from(std::fs::metadata(&image).unwrap().len()).unwrap();
    let size = if format == "raw" { size } else { 131_072 };
    let mount = scratch.empty_file("mount");
    let options = ",writable=on,growable=on";
    let mut args = fuse_args(&image, format, ",discard=unmap", &mount, options);
    args[1].push_str(",discard=unmap");
    let mut command = Command::new(program());
    command.env("STORD_FUSE_TRANSPORT", transport);
    let daemon = Daemon::start_as(&scratch, command, &args);
    let mut exerciser = Exerciser {
        file: open(&mount),
        past_cache: direct::open(&mount, false),
        mapper: Mapper::start(&mount),
        path: mount,
        model: vec![0; size],
        rng: rng(seed),
        unit,
    };
    let operations = std::env::var("STORD_OPERATIONS").unwrap_or_default();
    let operations = operations.parse().unwrap_or(OPERATIONS);
    let mut history = Vec::new();
    for number in 0..operations {
        let acted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| exerciser.act()));
        match acted {
            Ok(what) => history.push(what),
            Err(panic) => {
                let from = history.len().saturating_sub(30);
                eprintln!("operation {number}, after {:#?}", &history[from..]);
                std::panic::resume_unwind(panic);
            }
        }
        if number % CHECK_EVERY == 0 {
            exerciser.check();
        }
    }
    exerciser.check();
    let model = std::mem::take(&mut exerciser.model);
    drop(exerciser);
    daemon.stop();
    if format == "raw" {
        // qemu-img would round its length up.
        assert_same("image", &std::fs::read(&image).unwrap(), &model);
    } else {
        assert_same("image", &qemu::content(&scratch, &image, format), &model);
        qemu::assert_clean(&image);
    }
}

#[test]
fn raw_image_holds_what_a_long_sequence_left() {
    needs!(root, "qemu-img", "python3");
    if !is_qemu() {
        exercise("raw", "classic", 71);
        exercise("raw", "io_uring", 72);
    }
}

#[test]
fn qcow2_image_holds_what_a_long_sequence_left() {
    needs!(root, "qemu-img", "python3");
    if !is_qemu() {
        exercise("qcow2", "classic", 73);
        exercise("qcow2", "io_uring", 74);
    }
}
