//! Runs a test on the ring and on the fallback engine.

use std::future::Future;
use std::pin::pin;
use std::process::{Command, Output};
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::thread::{self, Thread};

use stord_aio::{Context, ContextConfig, PollParams};

/// An engine to test with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Ring,
    Fallback,
}

impl Which {
    pub fn start(self) -> Context {
        self.start_polling(PollParams::default())
    }

    pub fn start_polling(self, poll: PollParams) -> Context {
        let config = ContextConfig {
            name: format!("{self:?}"),
            force_fallback: self == Which::Fallback,
            poll,
            ..ContextConfig::default()
        };
        Context::start(config).expect("a context starts")
    }
}

/// Runs `test` for each engine; loudly leaves the ring out where the kernel refuses it.
pub fn both(test: impl Fn(Which)) {
    if let Some(only) = std::env::var_os(ONLY) {
        test(if only == "Ring" {
            Which::Ring
        } else {
            Which::Fallback
        });
        return;
    }
    test(Which::Fallback);
    let probe = Which::Ring.start();
    let has_ring = probe.uses_ring();
    probe.stop();
    if has_ring {
        test(Which::Ring);
    } else {
        eprintln!("SKIPPED for the ring: allow io_uring (sysctl kernel.io_uring_disabled=0)");
    }
}

/// Names the engine in a process that runs one test again.
const ONLY: &str = "STORD_AIO_TEST_ONLY";

/// Whether this is a process that [`run_again`] started.
pub fn only_here() -> bool {
    std::env::var_os(ONLY).is_some()
}

/// Runs a test of this program in a process of its own, for one engine.
pub fn run_again(test: &str, which: Which) -> Output {
    let program = std::env::current_exe().expect("a test program knows its name");
    let mut command = Command::new(program);
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ONLY, format!("{which:?}"));
    if which == Which::Fallback {
        command.env("STORD_ENGINE", "fallback");
    }
    command.output().expect("the test program runs")
}

/// Waits for a future on this thread.
pub fn wait<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut TaskContext::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}
