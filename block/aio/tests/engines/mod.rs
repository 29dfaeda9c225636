//! Runs a test on the ring and on the fallback engine.

use stord_aio::{Context, ContextConfig};

/// An engine to test with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Ring,
    Fallback,
}

impl Which {
    pub fn start(self) -> Context {
        let config = ContextConfig {
            name: format!("{self:?}"),
            force_fallback: self == Which::Fallback,
            ..ContextConfig::default()
        };
        Context::start(config).expect("a context starts")
    }
}

/// Runs `test` for each engine; loudly leaves the ring out where the kernel refuses it.
pub fn both(test: impl Fn(Which)) {
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
