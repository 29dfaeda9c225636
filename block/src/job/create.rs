//! `blockdev-create`: images made by a job.

use std::rc::Rc;

use stord_aio::pool;
use stord_qmp::Error;
use stord_qmp::schema::create::{BlockdevCreateDriver, BlockdevCreateOptions};
use stord_qmp::schema::job::JobType;

use super::{JobControl, JobSettings, Jobs};
use crate::drivers::protocol::file;
use crate::graph::Graph;

/// Starts the job that makes the image. It stays, concluded, until it is dismissed.
///
/// # Errors
/// The driver makes no images, or the job's id is malformed or taken.
pub fn start(
    jobs: &Rc<Jobs>,
    graph: Rc<Graph>,
    id: &str,
    options: BlockdevCreateOptions,
) -> Result<(), Error> {
    match options.driver {
        BlockdevCreateDriver::File(_) => {}
        BlockdevCreateDriver::HostDevice
        | BlockdevCreateDriver::NullAio
        | BlockdevCreateDriver::NullCo
        | BlockdevCreateDriver::Raw => {
            return Err(Error::generic("Driver does not support blockdev-create"));
        }
    }
    let settings = JobSettings {
        auto_finalize: true,
        auto_dismiss: false,
    };
    jobs.start(id, JobType::Create, settings, move |control| async move {
        control.add_total(1);
        let made = make(&graph, options, &control).await;
        control.add_done(1);
        made
    })
}

/// Makes an image.
///
/// # Errors
/// What the driver says.
pub async fn make(
    graph: &Graph,
    options: BlockdevCreateOptions,
    control: &JobControl,
) -> Result<(), Error> {
    let control = control.clone();
    match options.driver {
        BlockdevCreateDriver::File(file) => {
            graph
                .on_main(move || pool::run(move || file::create::create(&file, &control)))
                .await?
        }
        BlockdevCreateDriver::HostDevice
        | BlockdevCreateDriver::NullAio
        | BlockdevCreateDriver::NullCo
        | BlockdevCreateDriver::Raw => {
            Err(Error::generic("Driver does not support blockdev-create"))
        }
    }
}
