//! The daemon as a whole: what it consists of, how it starts and how it ends.
//!
//! Everything here happens on the control thread. Start-up does the steps of the command line in
//! order; when one fails, what the steps before it made is taken down as in a regular shutdown, so
//! that nothing is left behind.

use std::cell::RefCell;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;

use stord_block::job::Jobs;
use stord_block::{Contexts, Graph};
use stord_bridges::{ExportEvent, ExportRegistry};
use stord_qmp::chardev_opts;
use stord_qmp::opts::Opts;
use stord_qmp::schema::export::{BlockExportAttached, BlockExportDeleted};
use stord_qmp::schema::job::JobStatusChange;
use stord_qmp::{Error, Event, from_keyval};

use crate::chardev::{Chardevs, Setting};
use crate::cmdline::{Action, CommandLine, Step};
use crate::daemonize::Background;
use crate::lifecycle::{SHUTDOWN_LIMIT, Shutdown};
use crate::monitor::events::Broadcast;
use crate::monitor::{Monitors, Service, commands, nodes};
use crate::mount::registry::Registry;
use crate::objects::tree::Tree;
use crate::pidfile::PidFile;
use crate::presence::Presence;
use crate::report::{Origin, reason};
use crate::{notify, objects, report, trace, unbuilt};

/// What commands act on.
pub struct Daemon {
    /// The I/O contexts.
    pub contexts: Rc<Contexts>,
    /// The block nodes.
    pub graph: Rc<Graph>,
    /// The jobs.
    pub jobs: Rc<Jobs>,
    /// The exports.
    pub exports: Rc<ExportRegistry>,
    /// The objects.
    pub objects: objects::Objects,
    /// The character devices.
    pub chardevs: Chardevs,
    /// The wish to end.
    pub shutdown: Shutdown,
    /// The events for the monitors.
    pub events: Broadcast,
    /// The block device that this daemon serves, if it was made for one.
    pub attached: RefCell<Option<PathBuf>>,
    presence: RefCell<Option<Presence>>,
}

impl Daemon {
    /// A daemon without nodes and exports. Needs a tokio runtime and a `LocalSet`.
    ///
    /// # Errors
    /// No thread or no signal handler is to be had.
    pub fn start() -> Result<Rc<Self>, Error> {
        let failed = |error: std::io::Error| {
            let reason = reason(&error);
            Error::generic(format!("cannot start: {reason}")).with_source(error)
        };
        let shutdown = Shutdown::default();
        shutdown.obey_signals().map_err(failed)?;
        let contexts = Rc::new(Contexts::start().map_err(failed)?);
        let objects = objects::Objects::new(Rc::clone(&contexts));
        let graph = Rc::new(Graph::with_credentials(
            Rc::clone(&contexts),
            Arc::clone(objects.credentials()),
        ));
        let events = Broadcast::default();
        let exports = {
            let events = events.clone();
            ExportRegistry::new(Rc::clone(&graph), Rc::clone(&contexts), move |event| {
                events.send(match event {
                    ExportEvent::Deleted { id } => Event::new(&BlockExportDeleted { id }),
                    ExportEvent::Attached { id, device } => {
                        Event::new(&BlockExportAttached { id, device })
                    }
                });
            })
        };
        let jobs = {
            let events = events.clone();
            Jobs::new(move |id, status| {
                let id = id.to_owned();
                events.send(Event::new(&JobStatusChange { id, status }));
            })
        };
        let daemon = Rc::new(Self {
            graph,
            jobs,
            exports,
            objects,
            chardevs: Chardevs::default(),
            contexts,
            shutdown,
            events,
            attached: RefCell::default(),
            presence: RefCell::default(),
        });
        nodes::report_events(&daemon)?;
        Ok(daemon)
    }

    /// Lets `stord ps` find the daemon, now that it is complete. One that cannot be found serves all
    /// the same.
    pub fn announce(self: &Rc<Self>) {
        match Presence::announce(self, &Registry::of_user()) {
            Ok(presence) => *self.presence.borrow_mut() = Some(presence),
            Err(error) => tracing::debug!("stord ps will not find this daemon: {error}"),
        }
    }

    /// The objects and the character devices as one tree.
    pub fn tree(&self) -> Tree<'_> {
        Tree {
            objects: &self.objects,
            chardevs: &self.chardevs,
        }
    }

    /// Removes every export, ends every job and closes every node, each flushed first.
    ///
    /// # Errors
    /// They did not all go within [`SHUTDOWN_LIMIT`].
    pub async fn close(&self) -> Result<(), Error> {
        self.presence.take();
        let close = async {
            self.exports.close_all().await;
            self.jobs.end().await;
            self.graph.close_all().await;
        };
        tokio::time::timeout(SHUTDOWN_LIMIT, close)
            .await
            .map_err(|_| {
                Error::generic(format!(
                    "shutdown took longer than {} s: an export or its storage does not respond",
                    SHUTDOWN_LIMIT.as_secs()
                ))
                .with_hint("Data that was not flushed may be lost.")
            })
    }
}

/// Why start-up ended early.
enum Stop {
    /// The step did all that was asked for.
    Done,
    Failed(Origin, Error),
}

/// Runs the daemon from start-up to shutdown, and returns its exit status.
pub fn run(command_line: CommandLine, background: Option<Background>) -> ExitCode {
    run_local(async move {
        let daemon = match Daemon::start() {
            Ok(daemon) => daemon,
            Err(error) => {
                Origin::none().error(&error);
                return ExitCode::FAILURE;
            }
        };
        let mut server = Server::new(&daemon);
        let status = match server.start(command_line, background).await {
            Ok(()) => {
                daemon.shutdown.requested().await;
                ExitCode::SUCCESS
            }
            Err(Stop::Done) => ExitCode::SUCCESS,
            Err(Stop::Failed(origin, error)) => {
                origin.error(&error);
                ExitCode::FAILURE
            }
        };
        server.stop(status).await
    })
}

/// Runs a future to its end on this thread, together with the local tasks it starts.
pub fn run_local(future: impl Future<Output = ExitCode>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let reason = reason(&error);
            Origin::none().error(&Error::generic(format!("cannot start: {reason}")));
            return ExitCode::FAILURE;
        }
    };
    let status = tokio::task::LocalSet::new().block_on(&runtime, future);
    // A thread of the runtime may be stuck in a name lookup.
    runtime.shutdown_background();
    status
}

/// The daemon with its monitors.
struct Server {
    daemon: Rc<Daemon>,
    monitors: Monitors,
    service: Rc<Service<Daemon>>,
    pidfile: Option<PidFile>,
}

impl Server {
    fn new(daemon: &Rc<Daemon>) -> Self {
        Self {
            daemon: Rc::clone(daemon),
            monitors: Monitors::default(),
            service: Rc::new(Service {
                registry: commands::registry(),
                state: Rc::clone(daemon),
                version: commands::version(),
                events: daemon.events.clone(),
                shutdown: daemon.shutdown.clone(),
            }),
            pidfile: None,
        }
    }

    async fn start(
        &mut self,
        command_line: CommandLine,
        background: Option<Background>,
    ) -> Result<(), Stop> {
        for step in command_line.steps {
            if self.daemon.shutdown.is_requested() {
                return Err(Stop::Done);
            }
            let origin = step.origin.clone();
            match self.step(step, command_line.daemonize).await {
                Ok(Progress::Next) => {}
                Ok(Progress::Print(text)) => {
                    report::print(&text);
                    return Err(Stop::Done);
                }
                Err(error) => return Err(Stop::Failed(origin, error)),
            }
        }
        let failed = |error| Stop::Failed(Origin::none(), error);
        // Before anybody is told that the start is complete.
        self.daemon.announce();
        if let Some(path) = &command_line.pidfile {
            self.pidfile = Some(PidFile::create(path).map_err(failed)?);
        }
        if let Some(background) = background {
            background.complete().map_err(failed)?;
        }
        self.monitors.start(&self.service);
        notify::ready();
        Ok(())
    }

    async fn step(&mut self, step: Step, daemonize: bool) -> Result<Progress, Error> {
        let Step {
            action,
            value,
            origin,
        } = step;
        match action {
            Action::Blockdev => {
                let options = from_keyval(&value, Some("driver")).map_err(unbuilt::explain)?;
                self.daemon.graph.blockdev_add(options).await?;
            }
            Action::Export => {
                let options = from_keyval(&value, Some("type")).map_err(unbuilt::explain)?;
                self.daemon.exports.add(options).await?;
            }
            Action::Object => match objects::help::text(&value) {
                Some(text) => return Ok(Progress::Print(text)),
                None => {
                    let options =
                        from_keyval(&value, Some("qom-type")).map_err(unbuilt::explain)?;
                    self.daemon.objects.add(options).await?;
                }
            },
            Action::Monitor => {
                let options = from_keyval(&value, Some("chardev"))?;
                self.monitors.add(options, &self.daemon.chardevs)?;
            }
            Action::Chardev => return self.add_chardev(&value, &origin, daemonize).await,
            Action::Trace => {
                if trace::enable(&value, &origin)? == trace::Outcome::Help {
                    return Ok(Progress::Print(trace::HELP.to_owned()));
                }
            }
            Action::NbdServer => {
                let options = from_keyval(&value, None)?;
                let credentials = self.daemon.objects.credentials().clone();
                self.daemon
                    .exports
                    .nbd_server_start(options, credentials)
                    .await?;
            }
            Action::Operand => return Err(Error::generic("Unexpected argument")),
        }
        Ok(Progress::Next)
    }

    async fn add_chardev(
        &mut self,
        value: &str,
        origin: &Origin,
        daemonize: bool,
    ) -> Result<Progress, Error> {
        let opts = Opts::parse(value, "backend")?;
        if opts.help {
            let mut text = "Available chardev backend types:\n".to_owned();
            for backend in chardev_opts::BACKENDS {
                text.push_str(&format!("  {backend}\n"));
            }
            return Ok(Progress::Print(text));
        }
        for warning in &opts.warnings {
            origin.warning(warning, None);
        }
        for options in chardev_opts::translate(opts)? {
            let setting = Setting {
                origin,
                daemonize,
                takes_descriptors: true,
                shutdown: &self.daemon.shutdown,
                credentials: self.daemon.objects.credentials(),
            };
            let id = options.id.clone();
            let made = self.daemon.chardevs.add(options, setting).await?;
            if let Some(pty) = made.pty {
                report::print(&format!("char device redirected to {pty} (label {id})\n"));
            }
        }
        Ok(Progress::Next)
    }

    /// Takes everything down: first what clients use, then what is below it, then the monitors,
    /// whose clients so hear of it.
    async fn stop(self, status: ExitCode) -> ExitCode {
        let Self {
            daemon,
            monitors,
            service: _,
            pidfile,
        } = self;
        daemon.shutdown.request();
        notify::stopping();
        let closed = daemon.close().await;
        daemon.events.close();
        monitors.finish().await;
        daemon.chardevs.clear();
        drop(pidfile);
        match closed {
            Ok(()) => status,
            Err(error) => {
                Origin::none().error(&error);
                ExitCode::FAILURE
            }
        }
    }
}

/// What comes after a step.
enum Progress {
    Next,
    /// This text, and then the end.
    Print(String),
}
