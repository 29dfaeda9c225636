//! Jobs: work beside the requests, with the life cycle and the verbs of the reference.
//!
//! A job's body is a future on the control thread; what moves data it hands to I/O contexts. It learns what is wanted of it through its
//! [`JobControl`], between steps: a job is never stopped in the middle of one. Every change of status is reported, and none that the
//! table of transitions does not have can happen.

pub mod create;
mod status;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use stord_aio::sync::Notify;
use stord_qmp::Error;
use stord_qmp::schema::job::{JobInfo, JobStatus, JobType};

use status::Verb;

/// When a job goes on by itself, and when it waits for its user.
#[derive(Clone, Copy, Debug)]
pub struct JobSettings {
    /// Takes its result into force without `job-finalize`.
    pub auto_finalize: bool,
    /// Goes without `job-dismiss`.
    pub auto_dismiss: bool,
}

/// Hears of a job's new status.
type Changed = dyn Fn(&str, JobStatus);

/// The jobs of the process.
pub struct Jobs {
    jobs: RefCell<Vec<Rc<Job>>>,
    changed: Box<Changed>,
    /// Told whenever a job ends.
    ended: Notify,
}

struct Job {
    id: String,
    kind: JobType,
    settings: JobSettings,
    status: Cell<JobStatus>,
    error: RefCell<Option<String>>,
    control: JobControl,
    finalized: Notify,
}

/// A job's view of itself. Clones share it; contexts may hold one.
#[derive(Clone, Default)]
pub struct JobControl(Arc<Progress>);

#[derive(Default)]
struct Progress {
    current: AtomicI64,
    total: AtomicI64,
    cancelled: AtomicBool,
    paused: AtomicBool,
    woken: Notify,
}

impl JobControl {
    /// Says that so much more is to be done.
    pub fn add_total(&self, amount: i64) {
        self.0.total.fetch_add(amount, Ordering::Relaxed);
    }

    /// Says that so much has been done.
    pub fn add_done(&self, amount: i64) {
        self.0.current.fetch_add(amount, Ordering::Relaxed);
    }

    /// Whether the job is to give up.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// Waits while the job is paused. To be called between steps.
    pub async fn pause_point(&self) {
        loop {
            let woken = self.0.woken.notified();
            if !self.0.paused.load(Ordering::Acquire) || self.is_cancelled() {
                return;
            }
            woken.await;
        }
    }

    fn set_paused(&self, paused: bool) {
        self.0.paused.store(paused, Ordering::Release);
        self.0.woken.notify_waiters();
    }

    fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        self.0.woken.notify_waiters();
    }
}

impl Jobs {
    /// No jobs; `changed` hears of every new status.
    pub fn new(changed: impl Fn(&str, JobStatus) + 'static) -> Rc<Self> {
        Rc::new(Self {
            jobs: RefCell::default(),
            changed: Box::new(changed),
            ended: Notify::new(),
        })
    }

    /// Starts a job. `body` does the work; needs a tokio `LocalSet` around it.
    ///
    /// # Errors
    /// The id is malformed or taken.
    pub fn start<Fut>(
        self: &Rc<Self>,
        id: &str,
        kind: JobType,
        settings: JobSettings,
        body: impl FnOnce(JobControl) -> Fut,
    ) -> Result<(), Error>
    where
        Fut: Future<Output = Result<(), Error>> + 'static,
    {
        if stord_qmp::identifier::check("job-id", id).is_err() {
            return Err(Error::generic(format!("Invalid job ID '{id}'")));
        }
        if self.jobs.borrow().iter().any(|job| job.id == id) {
            return Err(Error::generic(format!("Job ID '{id}' already in use")));
        }
        let job = Rc::new(Job {
            id: id.to_owned(),
            kind,
            settings,
            status: Cell::new(JobStatus::Undefined),
            error: RefCell::default(),
            control: JobControl::default(),
            finalized: Notify::new(),
        });
        self.jobs.borrow_mut().push(Rc::clone(&job));
        self.enter(&job, JobStatus::Created);
        self.enter(&job, JobStatus::Running);
        let work = body(job.control.clone());
        let jobs = Rc::clone(self);
        tokio::task::spawn_local(async move { jobs.live(&job, work).await });
        Ok(())
    }

    async fn live(&self, job: &Rc<Job>, work: impl Future<Output = Result<(), Error>>) {
        let result = work.await;
        if job.status.get() == JobStatus::Paused {
            self.enter(job, JobStatus::Running);
        }
        let failure = match result {
            Err(error) => Some(error.message),
            Ok(()) if job.control.is_cancelled() => Some("Operation canceled".to_owned()),
            Ok(()) => None,
        };
        if let Some(failure) = failure {
            *job.error.borrow_mut() = Some(failure);
            self.enter(job, JobStatus::Aborting);
        } else {
            self.enter(job, JobStatus::Waiting);
            let finalized = job.finalized.notified();
            self.enter(job, JobStatus::Pending);
            if !job.settings.auto_finalize {
                finalized.await;
            }
        }
        self.enter(job, JobStatus::Concluded);
        self.ended.notify_waiters();
        if job.settings.auto_dismiss {
            self.remove(job);
        }
    }

    fn enter(&self, job: &Job, status: JobStatus) {
        let before = job.status.replace(status);
        debug_assert!(status::follows(before, status), "{before:?} -> {status:?}");
        (self.changed)(&job.id, status);
    }

    fn remove(&self, job: &Rc<Job>) {
        self.enter(job, JobStatus::Null);
        self.jobs.borrow_mut().retain(|held| !Rc::ptr_eq(held, job));
    }

    /// All jobs, newest first.
    pub fn query(&self) -> Vec<JobInfo> {
        let info = |job: &Rc<Job>| JobInfo {
            id: job.id.clone(),
            r#type: job.kind,
            status: job.status.get(),
            current_progress: job.control.0.current.load(Ordering::Relaxed),
            total_progress: job.control.0.total.load(Ordering::Relaxed),
            error: job.error.borrow().clone(),
        };
        self.jobs.borrow().iter().rev().map(info).collect()
    }

    fn asked(&self, id: &str, verb: Verb) -> Result<Rc<Job>, Error> {
        let jobs = self.jobs.borrow();
        let job = jobs
            .iter()
            .find(|job| job.id == id)
            .ok_or_else(|| Error::generic("Job not found"))?;
        if !verb.is_allowed_in(job.status.get()) {
            return Err(Error::generic(format!(
                "Job '{id}' in state '{}' cannot accept command verb '{}'",
                job.status.get().name(),
                verb.name()
            )));
        }
        Ok(Rc::clone(job))
    }

    /// Tells a job to give up.
    ///
    /// # Errors
    /// There is no such job, or its status forbids it.
    pub fn cancel(&self, id: &str) -> Result<(), Error> {
        let job = self.asked(id, Verb::Cancel)?;
        job.control.cancel();
        Ok(())
    }

    /// Holds a job at its next pause point.
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel), or it is paused.
    pub fn pause(&self, id: &str) -> Result<(), Error> {
        let job = self.asked(id, Verb::Pause)?;
        if job.control.0.paused.load(Ordering::Acquire) {
            return Err(Error::generic("Job is already paused"));
        }
        job.control.set_paused(true);
        if job.status.get() == JobStatus::Running {
            self.enter(&job, JobStatus::Paused);
        }
        Ok(())
    }

    /// Lets a paused job go on.
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel), or it is not paused.
    pub fn resume(&self, id: &str) -> Result<(), Error> {
        let is_paused = |job: &Rc<Job>| job.control.0.paused.load(Ordering::Acquire);
        if self
            .jobs
            .borrow()
            .iter()
            .any(|job| job.id == id && !is_paused(job))
        {
            return Err(Error::generic("Can't resume a job that was not paused"));
        }
        let job = self.asked(id, Verb::Resume)?;
        if job.status.get() == JobStatus::Paused {
            self.enter(&job, JobStatus::Running);
        }
        job.control.set_paused(false);
        Ok(())
    }

    /// Ends a job that is ready. None of the present types has that status.
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel).
    pub fn complete(&self, id: &str) -> Result<(), Error> {
        self.asked(id, Verb::Complete).map(|_| ())
    }

    /// Takes the result of a pending job into force.
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel).
    pub fn finalize(&self, id: &str) -> Result<(), Error> {
        self.asked(id, Verb::Finalize)?.finalized.notify_waiters();
        Ok(())
    }

    /// Forgets a job that is over.
    ///
    /// # Errors
    /// As [`cancel`](Self::cancel).
    pub fn dismiss(&self, id: &str) -> Result<(), Error> {
        let job = self.asked(id, Verb::Dismiss)?;
        self.remove(&job);
        Ok(())
    }

    /// Cancels every job, waits until none is at work, and forgets them all; for the end of the process.
    pub async fn end(&self) {
        loop {
            let ended = self.ended.notified();
            let jobs: Vec<Rc<Job>> = self.jobs.borrow().clone();
            let busy = jobs
                .iter()
                .filter(|job| job.status.get() != JobStatus::Concluded);
            let mut count = 0;
            for job in busy {
                count += 1;
                job.control.cancel();
                job.finalized.notify_waiters();
            }
            if count == 0 {
                jobs.iter().rev().for_each(|job| self.remove(job));
                return;
            }
            ended.await;
        }
    }
}

#[cfg(test)]
mod tests;
