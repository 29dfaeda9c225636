//! Files: whole transfers, ends of files, large and scattered requests, on both engines, on a file
//! system in memory and on another.

use std::fs;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use stord_aio::{Engine, Errno, Fallocate, File, IoBuffer, IoVec, join_all};

use crate::engines::{Which, both, only_here, run_again};

/// Calls `test` for each file system and each way to do a file's operations.
fn all_ways(test: impl Fn(Which, Scratch)) {
    both(|which| {
        for directory in ["/dev/shm", env!("CARGO_TARGET_TMPDIR")] {
            for engine in [Engine::Auto, Engine::Threads, Engine::Uring] {
                test(which, Scratch { directory, engine });
            }
        }
    });
}

#[derive(Clone, Copy, Debug)]
struct Scratch {
    directory: &'static str,
    engine: Engine,
}

impl Scratch {
    fn file(self) -> File {
        self.open().1
    }

    /// The same file twice.
    fn open(self) -> (fs::File, File) {
        let plain = tempfile::tempfile_in(Path::new(self.directory)).expect("a scratch file");
        let fd: OwnedFd = plain.try_clone().expect("a descriptor is free").into();
        (plain, File::new(fd, self.engine))
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

/// A list of buffers of `step` bytes each.
fn scattered(bytes: &[u8], step: usize) -> IoVec {
    bytes.chunks(step).map(IoBuffer::copy_of).collect()
}

#[test]
fn what_was_written_is_read_back() {
    all_ways(|which, scratch| {
        let context = which.start();
        let result = context.block_on(move || async move {
            let file = scratch.file();
            let bytes = pattern(10_000);
            file.write(512, scattered(&bytes, 4096), true).await?;
            file.fsync(false).await?;
            file.fsync(true).await?;
            let target = IoBuffer::zeroed(20_000);
            let count = file.read(0, target.clone().into()).await?;
            assert_eq!(count, 10_512, "short only at the end of the file");
            assert!(target.slice(0..512).is_zero());
            assert_eq!(target.slice(512..10_512).to_vec(), bytes);
            assert_eq!(file.read(10_512, target.clone().into()).await, Ok(0));
            assert_eq!(file.read(1 << 40, target.into()).await, Ok(0));
            Ok::<_, Errno>(())
        });
        assert_eq!(result, Ok(Ok(())), "{which:?} {scratch:?}");
        context.stop();
    });
}

#[test]
fn requests_of_any_number_of_buffers_are_whole() {
    all_ways(|which, scratch| {
        let context = which.start();
        let result = context.block_on(move || async move {
            let file = scratch.file();
            let bytes = pattern(3000 * 7);
            for count in [1, 2, 3, 1024, 1025, 3000] {
                let part = &bytes[..count * 7];
                file.write(0, scattered(part, 7), false).await?;
                let target = scattered(&vec![0; part.len()], 5);
                assert_eq!(file.read(0, target.clone()).await?, part.len() as u64);
                assert_eq!(target.to_vec(), part);
            }
            assert_eq!(file.read(0, IoVec::new()).await, Ok(0));
            file.write(0, IoVec::new(), true).await
        });
        assert_eq!(result, Ok(Ok(())), "{which:?} {scratch:?}");
        context.stop();
    });
}

#[test]
fn more_than_two_gib_are_read_in_one_request() {
    both(|which| {
        const PIECE: usize = 64 << 20;
        const PIECES: usize = 33;
        let scratch = Scratch {
            directory: "/dev/shm",
            engine: Engine::Auto,
        };
        let context = which.start();
        let result = context.block_on(move || async move {
            let (plain, file) = scratch.open();
            let size = (PIECE * PIECES) as u64;
            plain.set_len(size).expect("a hole takes no space");
            file.write(size - 3, IoBuffer::copy_of(b"end").into(), false)
                .await?;
            // The same memory again and again: only the last piece counts.
            let piece = IoBuffer::zeroed(PIECE);
            let all: IoVec = (0..PIECES).map(|_| piece.clone()).collect();
            assert_eq!(file.read(0, all).await, Ok(size));
            Ok::<_, Errno>(piece.slice(PIECE - 3..PIECE).to_vec())
        });
        assert_eq!(result, Ok(Ok(b"end".to_vec())));
        context.stop();
    });
}

#[test]
fn many_requests_at_once_do_not_mix() {
    all_ways(|which, scratch| {
        let context = which.start();
        let result = context.block_on(move || async move {
            // More than the ring has entries.
            const REQUESTS: u16 = 700;
            let file = scratch.file();
            let writes = (0..REQUESTS).map(|n| {
                let bytes = n.to_le_bytes().repeat(300);
                let file = &file;
                async move {
                    file.write(u64::from(n) * 600, scattered(&bytes, 200), false)
                        .await
                }
            });
            for result in join_all(writes.collect()).await {
                result?;
            }
            let reads = (0..REQUESTS).map(|n| {
                let file = &file;
                async move {
                    let target = IoBuffer::zeroed(600);
                    let count = file.read(u64::from(n) * 600, target.clone().into()).await?;
                    assert_eq!(count, 600);
                    assert_eq!(target.to_vec(), n.to_le_bytes().repeat(300));
                    Ok::<_, Errno>(())
                }
            });
            for result in join_all(reads.collect()).await {
                result?;
            }
            Ok::<_, Errno>(())
        });
        assert_eq!(result, Ok(Ok(())), "{which:?} {scratch:?}");
        context.stop();
    });
}

#[test]
fn direct_io_reaches_the_file() {
    both(|which| {
        let directory = env!("CARGO_TARGET_TMPDIR");
        let name = tempfile::NamedTempFile::new_in(directory).expect("a scratch file");
        let direct = fs::File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(name.path());
        let direct = match direct {
            Ok(direct) => direct,
            Err(error) => {
                eprintln!("SKIPPED: no direct I/O in {directory} ({error}); use another TMPDIR");
                return;
            }
        };
        let context = which.start();
        let result = context.block_on(move || async move {
            let file = File::new(direct.into(), Engine::Auto);
            let bytes = pattern(64 << 10);
            file.write(4096, scattered(&bytes, 16 << 10), true).await?;
            let target = IoBuffer::zeroed(128 << 10);
            let count = file.read(0, target.clone().into()).await?;
            assert_eq!(count, 68 << 10);
            assert_eq!(target.slice(4096..68 << 10).to_vec(), bytes);
            Ok::<_, Errno>(())
        });
        assert_eq!(result, Ok(Ok(())), "{which:?}");
        let mut all = Vec::new();
        fs::File::open(name.path())
            .and_then(|mut file| file.read_to_end(&mut all))
            .expect("it can be read");
        assert_eq!(all[4096..], pattern(64 << 10));
        context.stop();
    });
}

#[test]
fn ranges_are_allocated_zeroed_and_freed() {
    all_ways(|which, scratch| {
        let context = which.start();
        let result = context.block_on(move || async move {
            let (plain, file) = scratch.open();
            let size = || plain.metadata().expect("it has an inode").len();
            let keep_size = false;
            file.fallocate(Fallocate::Allocate { keep_size }, 0, 32 << 10)
                .await?;
            assert_eq!(size(), 32 << 10);
            let keep_size = true;
            file.fallocate(Fallocate::Allocate { keep_size }, 0, 64 << 10)
                .await?;
            assert_eq!(size(), 32 << 10);
            let bytes = pattern(32 << 10);
            file.write(0, scattered(&bytes, 4096), false).await?;
            file.fallocate(Fallocate::PunchHole, 4096, 8192).await?;
            let zero = file.fallocate(Fallocate::ZeroRange { keep_size: true }, 20_000, 1000);
            let zeroed = match zero.await {
                // tmpfs has none.
                Err(Errno::ENOTSUP) => 20_000..20_000,
                done => done.map(|()| 20_000..21_000)?,
            };
            let target = IoBuffer::zeroed(32 << 10);
            assert_eq!(file.read(0, target.clone().into()).await, Ok(32 << 10));
            let mut expected = bytes;
            expected[4096..12_288].fill(0);
            expected[zeroed].fill(0);
            assert_eq!(target.to_vec(), expected);
            Ok::<_, Errno>(())
        });
        assert_eq!(result, Ok(Ok(())), "{which:?} {scratch:?}");
        context.stop();
    });
}

#[test]
fn a_range_is_copied_up_to_the_end_of_the_source() {
    all_ways(|which, scratch| {
        let context = which.start();
        let result = context.block_on(move || async move {
            let (from, to) = (scratch.file(), scratch.file());
            let bytes = pattern(50_000);
            from.write(0, scattered(&bytes, 10_000), false).await?;
            assert_eq!(from.copy_range(10_000, &to, 500, 30_000).await, Ok(30_000));
            assert_eq!(
                from.copy_range(40_000, &to, 30_500, 99_999).await,
                Ok(10_000)
            );
            let target = IoBuffer::zeroed(50_000);
            assert_eq!(to.read(500, target.clone().into()).await, Ok(40_000));
            assert_eq!(target.slice(0..40_000).to_vec(), bytes[10_000..]);
            Ok::<_, Errno>(())
        });
        assert_eq!(result, Ok(Ok(())), "{which:?} {scratch:?}");
        context.stop();
    });
}

#[test]
fn errors_are_those_of_the_system_calls() {
    all_ways(|which, scratch| {
        let context = which.start();
        let result = context.block_on(move || async move {
            let buffer: IoVec = IoBuffer::zeroed(512).into();
            let file = scratch.file();
            let beyond = u64::MAX - 10;
            assert_eq!(file.read(beyond, buffer.clone()).await, Err(Errno::EFBIG));
            assert_eq!(
                file.write(beyond, buffer.clone(), false).await,
                Err(Errno::EFBIG)
            );
            let read_only = fs::File::open("/proc/self/exe").expect("a program is readable");
            let read_only = File::new(read_only.into(), scratch.engine);
            assert_eq!(read_only.read(0, buffer.clone()).await, Ok(512));
            assert_eq!(read_only.write(0, buffer, false).await, Err(Errno::EBADF));
        });
        assert_eq!(result, Ok(()), "{which:?} {scratch:?}");
        context.stop();
    });
}

/// A file-size limit makes the kernel write less than it was asked to, and then nothing.
#[test]
fn a_short_write_goes_on_until_the_error_is_known() {
    use nix::sys::resource::{Resource, setrlimit};
    use nix::sys::signal::{SigHandler, Signal, signal};

    let test = "file::a_short_write_goes_on_until_the_error_is_known";
    if !only_here() {
        both(|which| {
            let output = run_again(test, which);
            assert!(output.status.success(), "{which:?}: {output:?}");
        });
        return;
    }
    all_ways(|which, scratch| {
        #[expect(unsafe_code, reason = "the write must fail, not kill")]
        // SAFETY: ignoring a signal runs no handler.
        unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.expect("a valid signal");
        let (_, hard) = nix::sys::resource::getrlimit(Resource::RLIMIT_FSIZE).expect("it exists");
        setrlimit(Resource::RLIMIT_FSIZE, 10_000, hard).expect("lowering is allowed");
        let context = which.start();
        let result = context.block_on(move || async move {
            let (mut plain, file) = scratch.open();
            let written = file
                .write(0, scattered(&pattern(16_384), 4096), false)
                .await;
            let mut all = Vec::new();
            plain.rewind().expect("it is a file");
            plain.read_to_end(&mut all).expect("it can be read");
            (written, all)
        });
        let (written, all) = result.expect("the context runs");
        assert_eq!(written, Err(Errno::EFBIG), "{which:?} {scratch:?}");
        assert_eq!(all, pattern(10_000), "what fits was written");
        context.stop();
    });
}

#[test]
fn a_try_moves_cached_data_on_any_thread() {
    for directory in ["/dev/shm", env!("CARGO_TARGET_TMPDIR")] {
        let scratch = Scratch {
            directory,
            engine: Engine::Auto,
        };
        let (mut plain, file) = scratch.open();
        plain.write_all(&pattern(5000)).expect("there is space");
        let target = IoBuffer::zeroed(8192);
        let read = file.try_read(1000, &target.clone().into());
        assert_eq!(read, Some(Ok(4000)), "it was just written");
        assert_eq!(target.slice(0..4000).to_vec(), pattern(5000)[1000..]);
        let source: IoVec = IoBuffer::copy_of(b"new").into();
        match file.try_write(0, &source) {
            Some(result) => assert_eq!(result, Ok(())),
            None => assert_ne!(directory, "/dev/shm", "memory need not be waited for"),
        }
        assert_eq!(
            file.try_read(u64::MAX, &target.into()),
            Some(Err(Errno::EFBIG))
        );
    }
}
