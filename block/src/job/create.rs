//! `blockdev-create`: images made by a job.

use std::rc::Rc;

use stord_aio::pool;
use stord_qmp::Error;
use stord_qmp::schema::create::{
    BlockdevCreateDriver, BlockdevCreateOptions, BlockdevCreateOptionsQcow2,
};
use stord_qmp::schema::job::JobType;

use super::{JobControl, JobSettings, Jobs};
use crate::backend::Backend;
use crate::drivers::description;
use crate::drivers::format::qcow2;
use crate::drivers::protocol::file;
use crate::graph::{Claim, Graph, Permissions};

/// Why an image was not made.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{error}")]
pub struct CreateError {
    /// What went wrong.
    #[source]
    pub error: Error,
    /// What has become of the place for the image; `None` where nothing was touched.
    pub left: Option<String>,
}

impl From<Error> for CreateError {
    fn from(error: Error) -> Self {
        Self { error, left: None }
    }
}

impl From<CreateError> for Error {
    fn from(failure: CreateError) -> Self {
        let mut error = failure.error;
        if let Some(left) = failure.left {
            error.message = format!("{}; {left}", error.message);
        }
        error
    }
}

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
        BlockdevCreateDriver::File(_) | BlockdevCreateDriver::Qcow2(_) => {}
        BlockdevCreateDriver::Compress
        | BlockdevCreateDriver::HostDevice
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
        made.map_err(Error::from)
    })
}

/// Says what is wrong with the options, as far as that can be known before anything is touched.
///
/// # Errors
/// What the driver says.
pub fn check(options: &BlockdevCreateOptions) -> Result<(), Error> {
    match &options.driver {
        BlockdevCreateDriver::File(file) => file::create::check(file),
        BlockdevCreateDriver::Qcow2(qcow2) => qcow2::create::check(qcow2),
        BlockdevCreateDriver::Compress
        | BlockdevCreateDriver::HostDevice
        | BlockdevCreateDriver::NullAio
        | BlockdevCreateDriver::NullCo
        | BlockdevCreateDriver::Raw => {
            Err(Error::generic("Driver does not support blockdev-create"))
        }
    }
}

/// Makes an image.
///
/// # Errors
/// What the driver says, and what is left where something was touched.
pub async fn make(
    graph: &Graph,
    options: BlockdevCreateOptions,
    control: &JobControl,
) -> Result<(), CreateError> {
    make_named(graph, options, None, control).await
}

/// Makes an image that remembers its data file by this name, if one is given, and not by that of the node.
///
/// # Errors
/// As [`make`].
pub async fn make_named(
    graph: &Graph,
    options: BlockdevCreateOptions,
    data_file_name: Option<String>,
    control: &JobControl,
) -> Result<(), CreateError> {
    let control = control.clone();
    match options.driver {
        BlockdevCreateDriver::File(file) => {
            graph
                .on_main(move || pool::run(move || file::create::create(&file, &control)))
                .await?
        }
        BlockdevCreateDriver::Qcow2(qcow2) => {
            make_qcow2(graph, qcow2, data_file_name, control).await
        }
        BlockdevCreateDriver::Compress
        | BlockdevCreateDriver::HostDevice
        | BlockdevCreateDriver::NullAio
        | BlockdevCreateDriver::NullCo
        | BlockdevCreateDriver::Raw => {
            Err(Error::generic("Driver does not support blockdev-create").into())
        }
    }
}

async fn make_qcow2(
    graph: &Graph,
    options: BlockdevCreateOptionsQcow2,
    data_file_name: Option<String>,
    control: JobControl,
) -> Result<(), CreateError> {
    const CLAIM: Claim = Claim {
        permissions: Permissions::WRITE.union(Permissions::RESIZE),
        // Nobody's data is overwritten while he goes on writing.
        shared: Permissions::CONSISTENT_READ.union(Permissions::WRITE_UNCHANGED),
    };
    const USER: &str = "an unnamed block device";
    let file = graph.attach_ref(options.file.clone(), USER, CLAIM).await?;
    let data_file = match &options.data_file {
        Some(reference) => match graph.attach_ref(reference.clone(), USER, CLAIM).await {
            Ok(backend) => Some(backend),
            Err(error) => {
                graph.detach(file).await;
                return Err(error.into());
            }
        },
        None => None,
    };
    let made = {
        let (file, data_file) = (file.clone(), data_file.clone());
        graph
            .on_main(move || async move {
                let named = data_file.as_ref().map(|backend| {
                    let name = data_file_name.unwrap_or_else(|| name_of(backend));
                    (backend, name)
                });
                qcow2::create::create(&options, &file, named, &control).await
            })
            .await
    };
    for backend in std::iter::once(file).chain(data_file) {
        graph.detach(backend).await;
    }
    made?
}

/// The name by which the image remembers its data file.
fn name_of(backend: &Backend) -> String {
    backend
        .root()
        .node()
        .map_or_else(String::new, |node| description::of_node(&node))
}
