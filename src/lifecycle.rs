//! How the daemon ends: `quit` and the signals SIGINT, SIGTERM and SIGHUP ask for it, and then it
//! ends within [`SHUTDOWN_LIMIT`], whatever an export or a disk does.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// The longest time that exports and nodes may take to go before they are abandoned.
pub const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);

/// The wish that the daemon end. Once made it stays.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(Rc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    requested: Cell<bool>,
    notify: Notify,
}

impl Shutdown {
    /// Makes the wish.
    pub fn request(&self) {
        self.0.requested.set(true);
        self.0.notify.notify_waiters();
    }

    /// Whether the wish is made.
    pub fn is_requested(&self) -> bool {
        self.0.requested.get()
    }

    /// Waits for the wish.
    pub async fn requested(&self) {
        // Registered before the look at the flag, so that a wish in between is not missed.
        let notified = self.0.notify.notified();
        if !self.is_requested() {
            notified.await;
        }
    }

    /// Lets the signals that ask a daemon to end make the wish. Needs a `LocalSet`.
    ///
    /// # Errors
    /// The handlers cannot be installed.
    pub fn obey_signals(&self) -> io::Result<()> {
        for kind in [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ] {
            let mut stream = signal(kind)?;
            let shutdown = self.clone();
            tokio::task::spawn_local(async move {
                while stream.recv().await.is_some() {
                    tracing::info!(signal = kind.as_raw_value(), "shutting down");
                    shutdown.request();
                }
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wish_wakes_those_who_wait_and_those_who_come_later() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let runtime = runtime.expect("a runtime without drivers");
        runtime.block_on(async {
            let shutdown = Shutdown::default();
            assert!(!shutdown.is_requested());
            tokio::join!(shutdown.requested(), async { shutdown.request() });
            shutdown.requested().await;
        });
    }
}
