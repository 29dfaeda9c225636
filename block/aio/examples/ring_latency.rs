//! Prints the cost in ns of a task switch, a spawn, a 4 KiB read from the page cache, and a write to
//! /dev/null, which is all overhead: through a context, through a bare ring, and by system calls.
//!
//! `ring_latency [DIRECTORY [PART]]` puts its scratch file into DIRECTORY and runs one part only:
//! pread, bare, ring or fallback.

// UNSAFETY: the bare ring to compare with.
#![expect(unsafe_code, reason = "a bare ring takes pointers")]

use std::fs;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::rc::Rc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types::Fd};
use nix::time::{ClockId, clock_gettime};
use stord_aio::{Context, ContextConfig, Engine, File, IoBuffer, PolledFd, join_all, yield_now};

const READS: u64 = 1_000_000;
const SIZE: u64 = 64 << 20;
const BLOCK: usize = 4096;
const BLOCKS: u64 = SIZE / BLOCK as u64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::args_os().nth(1).unwrap_or_else(|| "/tmp".into());
    let mut scratch = tempfile::tempfile_in(directory)?;
    for block in 0..BLOCKS {
        scratch.write_all(&[u8::try_from(block % 255)? + 1; BLOCK])?;
    }
    let part = std::env::args().nth(2);
    let wants = |name| part.as_deref().is_none_or(|part| part == name);
    for _ in 0..2 {
        if wants("pread") {
            // On a thread of its own, since a lone thread's system calls are a little cheaper.
            let file = scratch.try_clone()?;
            let thread = std::thread::spawn(move || pread(&file).map_err(|e| e.to_string()));
            thread.join().expect("it does not panic")?;
        }
        if wants("bare") {
            for depth in [1, 32] {
                bare_ring(&scratch, depth)?;
                bare_null(depth)?;
            }
        }
        for (name, force_fallback) in [("ring", false), ("fallback", true)] {
            if wants(name) {
                let file = File::new(scratch.try_clone()?.into(), Engine::Auto);
                through_context(file, force_fallback)?;
            }
        }
    }
    Ok(())
}

/// When something started, by the clock and by this thread's use of the processor.
struct Start(Instant, Duration);

fn begin() -> Start {
    Start(Instant::now(), thread_time())
}

fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Prints ns for each operation, and in brackets how many of them this thread was at work.
fn report(what: &str, operations: u64, start: Start) {
    let each = |time: Duration| time.as_nanos() / u128::from(operations);
    let (time, work) = (each(start.0.elapsed()), each(thread_time() - start.1));
    println!("{what:<40} {time:>6} ns ({work:>5})");
}

/// Scatters reads over the file.
fn offset(n: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % BLOCKS * BLOCK as u64
}

fn pread(file: &fs::File) -> Result<(), Box<dyn std::error::Error>> {
    let mut block = vec![0; BLOCK];
    let start = begin();
    for n in 0..READS {
        file.read_exact_at(&mut block, offset(n))?;
    }
    report("pread", READS, start);
    Ok(())
}

fn bare_ring(file: &fs::File, depth: u64) -> Result<(), Box<dyn std::error::Error>> {
    let mut ring = new_ring()?;
    let mut blocks = vec![vec![0u8; BLOCK]; usize::try_from(depth)?];
    let start = begin();
    for n in (0..READS).step_by(usize::try_from(depth)?) {
        for (i, block) in (0..).zip(&mut blocks) {
            let entry = opcode::Read::new(Fd(file.as_raw_fd()), block.as_mut_ptr(), 4096)
                .offset(offset(n + i))
                .build();
            // SAFETY: the blocks outlive the ring's use of them: each read is waited for below.
            unsafe { ring.submission().push(&entry.into())? };
        }
        ring.submit_and_wait(blocks.len())?;
        for completion in ring.completion() {
            assert_eq!(completion.result(), 4096);
        }
    }
    report(&format!("bare ring, depth {depth}"), READS, start);
    Ok(())
}

fn null() -> std::io::Result<fs::File> {
    fs::File::options().write(true).open("/dev/null")
}

fn bare_null(depth: u64) -> Result<(), Box<dyn std::error::Error>> {
    let null = null()?;
    let mut ring = new_ring()?;
    let start = begin();
    for _ in (0..READS).step_by(usize::try_from(depth)?) {
        for _ in 0..depth {
            let entry = opcode::Write::new(Fd(null.as_raw_fd()), NOTHING.as_ptr(), 1).build();
            // SAFETY: a static outlives everything.
            unsafe { ring.submission().push(&entry.into())? };
        }
        ring.submit_and_wait(usize::try_from(depth)?)?;
        for completion in ring.completion() {
            assert_eq!(completion.result(), 1);
        }
    }
    report(
        &format!("bare ring: /dev/null, depth {depth}"),
        READS,
        start,
    );
    Ok(())
}

static NOTHING: [u8; 1] = [0];

fn new_ring() -> std::io::Result<IoUring<squeue::Entry128>> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_no_sqarray()
        .build(256)
}

fn through_context(file: File, force_fallback: bool) -> Result<(), Box<dyn std::error::Error>> {
    let context = Context::start(ContextConfig {
        name: "ring_latency".into(),
        force_fallback,
        ..ContextConfig::default()
    })?;
    let engine = if context.uses_ring() {
        "ring"
    } else {
        "fallback"
    };
    context.block_on(move || async move {
        let start = begin();
        for _ in 0..READS {
            yield_now().await;
        }
        report(&format!("{engine}: yield"), READS, start);

        let done = Rc::new(std::cell::Cell::new(0));
        let start = begin();
        for _ in 0..READS {
            let done = Rc::clone(&done);
            stord_aio::spawn_local(async move { done.set(done.get() + 1) });
        }
        report(&format!("{engine}: spawn of a ready task"), READS, start);
        assert_eq!(done.get(), READS);

        for depth in [1, 32] {
            let start = begin();
            let workers = (0..depth).map(|worker| {
                let file = file.clone();
                let buffer = IoBuffer::zeroed(BLOCK);
                async move {
                    for n in 0..READS / depth {
                        let count = file.read(offset(n * depth + worker), buffer.clone().into());
                        assert_eq!(count.await, Ok(4096));
                    }
                }
            });
            in_tasks(workers.collect()).await;
            report(
                &format!("{engine}: File::read, depth {depth}"),
                READS,
                start,
            );

            const WRITES: u64 = READS / 10;
            let start = begin();
            let workers = (0..depth).map(|worker| {
                let file = file.clone();
                let buffer = IoBuffer::copy_of(&[7; BLOCK]);
                async move {
                    for n in 0..WRITES / depth {
                        let at = offset(n * depth + worker);
                        let written = file.write(at, buffer.clone().into(), false).await;
                        assert_eq!(written, Ok(()));
                    }
                }
            });
            in_tasks(workers.collect()).await;
            report(
                &format!("{engine}: File::write, depth {depth}"),
                WRITES,
                start,
            );

            let null = PolledFd::new(null().expect("/dev/null opens").into());
            let null = Rc::new(null.expect("it is set up"));
            let start = begin();
            let workers = (0..depth).map(|_| {
                let null = Rc::clone(&null);
                let byte = IoBuffer::zeroed(1);
                async move {
                    for _ in 0..READS / depth {
                        assert_eq!(null.write(byte.clone().into()).await, Ok(1));
                    }
                }
            });
            in_tasks(workers.collect()).await;
            report(&format!("{engine}: /dev/null, depth {depth}"), READS, start);
        }
    })?;
    context.stop();
    Ok(())
}

/// Runs each future as a task of its own, as requests are.
async fn in_tasks(futures: Vec<impl Future<Output = ()> + 'static>) {
    let mut ends = Vec::new();
    for future in futures {
        let (end, done) = stord_aio::sync::oneshot::channel();
        ends.push(done);
        stord_aio::spawn_local(async move {
            future.await;
            let _ = end.send(());
        });
    }
    for end in join_all(ends).await {
        end.expect("the task sends before it ends");
    }
}
