//! The commands about character devices.

use std::rc::Rc;

use stord_qmp::Error;
use stord_qmp::command::Registry;
use stord_qmp::schema::chardev::{ChardevId, ChardevOptions, RingbufRead, RingbufWrite};

use crate::chardev::{Setting, backends, ringbuf};
use crate::daemon::Daemon;
use crate::report::Origin;

/// Adds the commands.
pub fn add(registry: &mut Registry<Daemon>) {
    registry.add(
        "chardev-add",
        |daemon: Rc<Daemon>, options: ChardevOptions| async move {
            let id = &options.id;
            if daemon.chardevs.find(id).is_some() {
                let message = format!("Chardev with id '{id}' already exists");
                return Err(Error::generic(message));
            }
            let what = format!("Failed to add chardev '{id}'");
            let made = daemon.chardevs.add(options, setting(&daemon)).await;
            made.map_err(|error| error.context(what))
        },
    );
    registry.add(
        "chardev-change",
        |daemon: Rc<Daemon>, options: ChardevOptions| async move {
            daemon.chardevs.check_change(&options.id)?;
            let what = format!("Failed to add chardev '{}'", options.id);
            let made = daemon.chardevs.change(options, setting(&daemon)).await;
            made.map_err(|error| error.context(what))
        },
    );
    registry.add(
        "chardev-remove",
        |daemon: Rc<Daemon>, ChardevId { id }| async move { daemon.chardevs.remove(&id) },
    );
    registry.add(
        "chardev-send-break",
        |daemon: Rc<Daemon>, ChardevId { id }| async move { daemon.chardevs.send_break(&id) },
    );
    registry.add("query-chardev", |daemon: Rc<Daemon>, (): ()| async move {
        Ok(daemon.chardevs.query())
    });
    registry.add(
        "query-chardev-backends",
        |_: Rc<Daemon>, (): ()| async move { Ok(backends()) },
    );
    registry.add(
        "ringbuf-write",
        |daemon: Rc<Daemon>, arguments: RingbufWrite| async move {
            ringbuf::write(&daemon.chardevs, &arguments)
        },
    );
    registry.add(
        "ringbuf-read",
        |daemon: Rc<Daemon>, arguments: RingbufRead| async move {
            ringbuf::read(&daemon.chardevs, &arguments)
        },
    );
}

/// What devices are made with once the daemon is up.
fn setting(daemon: &Daemon) -> Setting<'_> {
    const ORIGIN: &Origin = &Origin::none();
    Setting {
        origin: ORIGIN,
        daemonize: false,
        takes_descriptors: false,
        shutdown: &daemon.shutdown,
        credentials: daemon.objects.credentials(),
    }
}
