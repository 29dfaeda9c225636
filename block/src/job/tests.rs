use std::cell::RefCell;
use std::rc::Rc;

use stord_aio::sync::oneshot;
use stord_qmp::Error;
use stord_qmp::schema::job::{JobStatus, JobType};
use tokio::task::LocalSet;

use super::{JobSettings, Jobs};

const MANUAL: JobSettings = JobSettings {
    auto_finalize: false,
    auto_dismiss: false,
};
const BY_ITSELF: JobSettings = JobSettings {
    auto_finalize: true,
    auto_dismiss: true,
};

type Seen = Rc<RefCell<Vec<String>>>;

fn jobs() -> (Rc<Jobs>, Seen) {
    let seen = Seen::default();
    let log = Rc::clone(&seen);
    (
        Jobs::new(move |id, status| log.borrow_mut().push(format!("{id} {}", status.name()))),
        seen,
    )
}

async fn until(jobs: &Jobs, status: JobStatus) {
    while jobs.query().first().is_some_and(|job| job.status != status) {
        tokio::task::yield_now().await;
    }
}

fn message(result: Result<(), Error>) -> String {
    result.err().map_or_else(String::new, |error| error.message)
}

async fn local(test: impl Future<Output = ()>) {
    LocalSet::new().run_until(test).await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_job_that_goes_by_itself_passes_every_status_once() {
    local(async {
        let (jobs, seen) = jobs();
        jobs.start("j", JobType::Create, BY_ITSELF, |control| async move {
            control.add_total(2);
            control.add_done(2);
            Ok(())
        })
        .unwrap();
        until(&jobs, JobStatus::Null).await;
        assert!(jobs.query().is_empty());
        assert_eq!(
            *seen.borrow(),
            [
                "j created",
                "j running",
                "j waiting",
                "j pending",
                "j concluded",
                "j null"
            ]
        );
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_manual_job_waits_for_its_user_and_refuses_verbs_out_of_turn() {
    local(async {
        let (jobs, _) = jobs();
        let (release, held) = oneshot::channel::<()>();
        jobs.start("j", JobType::Create, MANUAL, |_| async move {
            held.await.map_err(|_| Error::generic("lost"))
        })
        .unwrap();
        assert_eq!(
            message(jobs.finalize("j")),
            "Job 'j' in state 'running' cannot accept command verb 'finalize'"
        );
        assert_eq!(
            message(jobs.dismiss("j")),
            "Job 'j' in state 'running' cannot accept command verb 'dismiss'"
        );
        assert_eq!(
            message(jobs.complete("j")),
            "Job 'j' in state 'running' cannot accept command verb 'complete'"
        );
        assert_eq!(message(jobs.cancel("k")), "Job not found");
        assert_eq!(
            message(jobs.start("j", JobType::Create, MANUAL, |_| async { Ok(()) })),
            "Job ID 'j' already in use"
        );
        assert_eq!(
            message(jobs.start("1", JobType::Create, MANUAL, |_| async { Ok(()) })),
            "Invalid job ID '1'"
        );
        release.send(()).unwrap();
        until(&jobs, JobStatus::Pending).await;
        tokio::task::yield_now().await;
        jobs.finalize("j").unwrap();
        until(&jobs, JobStatus::Concluded).await;
        assert_eq!(jobs.query()[0].error, None);
        jobs.dismiss("j").unwrap();
        assert!(jobs.query().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_failed_job_keeps_its_error_until_dismissed() {
    local(async {
        let (jobs, seen) = jobs();
        jobs.start("j", JobType::Create, MANUAL, |_| async {
            Err(Error::generic("no space"))
        })
        .unwrap();
        until(&jobs, JobStatus::Concluded).await;
        assert_eq!(jobs.query()[0].error.as_deref(), Some("no space"));
        assert_eq!(
            *seen.borrow(),
            ["j created", "j running", "j aborting", "j concluded"]
        );
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn a_paused_job_rests_until_resumed_or_cancelled() {
    local(async {
        let (jobs, seen) = jobs();
        jobs.start("j", JobType::Create, MANUAL, |control| async move {
            loop {
                tokio::task::yield_now().await;
                control.pause_point().await;
                if control.is_cancelled() {
                    return Ok(());
                }
            }
        })
        .unwrap();
        jobs.pause("j").unwrap();
        assert_eq!(message(jobs.pause("j")), "Job is already paused");
        until(&jobs, JobStatus::Paused).await;
        jobs.resume("j").unwrap();
        assert_eq!(
            message(jobs.resume("j")),
            "Can't resume a job that was not paused"
        );
        jobs.pause("j").unwrap();
        jobs.cancel("j").unwrap();
        until(&jobs, JobStatus::Concluded).await;
        assert_eq!(jobs.query()[0].error.as_deref(), Some("Operation canceled"));
        jobs.end().await;
        assert_eq!(seen.borrow().last().map(String::as_str), Some("j null"));
    })
    .await;
}

#[tokio::test(flavor = "current_thread")]
async fn the_end_cancels_what_is_at_work_and_forgets_all() {
    local(async {
        let (jobs, seen) = jobs();
        jobs.start("j", JobType::Create, MANUAL, |control| async move {
            while !control.is_cancelled() {
                tokio::task::yield_now().await;
            }
            Ok(())
        })
        .unwrap();
        jobs.end().await;
        assert!(jobs.query().is_empty());
        assert_eq!(seen.borrow().last().map(String::as_str), Some("j null"));
    })
    .await;
}
