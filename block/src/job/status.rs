//! The life cycle of a job: which status follows which, and which verbs a status takes.

use stord_qmp::schema::job::JobStatus;
use stord_qmp::schema::job::JobStatus::{
    Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Undefined,
    Waiting,
};

/// What a user may ask of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Cancel,
    Pause,
    Resume,
    Complete,
    Finalize,
    Dismiss,
}

impl Verb {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
        }
    }

    pub(super) fn is_allowed_in(self, status: JobStatus) -> bool {
        let at_work = matches!(status, Created | Running | Paused | Ready | Standby);
        match self {
            Self::Cancel => at_work || matches!(status, Waiting | Pending),
            Self::Pause | Self::Resume => at_work,
            Self::Complete => status == Ready,
            Self::Finalize => status == Pending,
            Self::Dismiss => status == Concluded,
        }
    }
}

/// Whether a job may go from one status to the other.
pub(super) fn follows(from: JobStatus, to: JobStatus) -> bool {
    let after: &[JobStatus] = match from {
        Undefined => &[Created],
        Created => &[Running, Aborting, Null],
        Running => &[Paused, Ready, Waiting, Aborting],
        Paused => &[Running],
        Ready => &[Standby, Waiting, Aborting],
        Standby => &[Ready],
        Waiting => &[Pending, Aborting],
        Pending => &[Aborting, Concluded],
        Aborting => &[Aborting, Concluded],
        Concluded => &[Null],
        Null => &[],
    };
    after.contains(&to)
}
