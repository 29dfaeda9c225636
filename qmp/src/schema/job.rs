//! Jobs: long work beside the requests, and what may be done with it.

use crate::Qapi;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum JobType {
    /// Makes an image, for `blockdev-create`.
    Create,
}

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Qapi)]
pub enum JobStatus {
    /// Not yet made.
    Undefined,
    /// Made, not yet started.
    Created,
    /// At work.
    Running,
    /// Waiting to be resumed.
    Paused,
    /// At work, with its end in the user's hands.
    Ready,
    /// As `ready`, waiting to be resumed.
    Standby,
    /// Done, waiting for the other jobs of its transaction.
    Waiting,
    /// Done, waiting for `job-finalize`.
    Pending,
    /// Failed or cancelled, cleaning up.
    Aborting,
    /// Over, waiting for `job-dismiss`.
    Concluded,
    /// Gone.
    Null,
}

/// A job, as `query-jobs` reports it.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct JobInfo {
    /// The id.
    pub id: String,
    /// What it does.
    pub r#type: JobType,
    /// Where it is in its life.
    pub status: JobStatus,
    /// How much is done, in units of the job's own.
    pub current_progress: i64,
    /// How much there is to do, as far as is known.
    pub total_progress: i64,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// Arguments of the commands that name a job.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct JobId {
    /// The job.
    pub id: String,
}

/// Event: a job has entered another status.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(event = "JOB_STATUS_CHANGE")]
pub struct JobStatusChange {
    /// The job.
    pub id: String,
    /// The status it is in now.
    pub status: JobStatus,
}
