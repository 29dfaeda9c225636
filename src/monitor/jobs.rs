//! The commands about jobs.

use std::rc::Rc;

use stord_block::job::{Jobs, create};
use stord_qmp::Error;
use stord_qmp::command::Registry;
use stord_qmp::schema::create::BlockdevCreate;
use stord_qmp::schema::job::{JobId, JobStatusChange};

use crate::daemon::Daemon;

/// Adds the commands and the event.
pub fn add(registry: &mut Registry<Daemon>) {
    registry.add_event::<JobStatusChange>();
    registry.add(
        "blockdev-create",
        |daemon: Rc<Daemon>, BlockdevCreate { job_id, options }| async move {
            create::start(&daemon.jobs, Rc::clone(&daemon.graph), &job_id, options)
        },
    );
    registry.add("query-jobs", |daemon: Rc<Daemon>, (): ()| async move {
        Ok(daemon.jobs.query())
    });
    add_verb(registry, "job-pause", Jobs::pause);
    add_verb(registry, "job-resume", Jobs::resume);
    add_verb(registry, "job-cancel", Jobs::cancel);
    add_verb(registry, "job-complete", Jobs::complete);
    add_verb(registry, "job-finalize", Jobs::finalize);
    add_verb(registry, "job-dismiss", Jobs::dismiss);
}

fn add_verb(
    registry: &mut Registry<Daemon>,
    name: &'static str,
    verb: fn(&Jobs, &str) -> Result<(), Error>,
) {
    registry.add(name, move |daemon: Rc<Daemon>, JobId { id }| async move {
        verb(&daemon.jobs, &id)
    });
}
