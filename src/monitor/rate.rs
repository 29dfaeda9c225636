//! Keeps events that may come in floods from flooding the clients: of those about the same thing,
//! the first one is passed on at once, and of those in the second after it only the last one, when
//! the second is over.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use stord_qmp::event::Event;

use super::events::Dated;

/// How long events about the same thing are held back.
const PERIOD: Duration = Duration::from_secs(1);

/// Events that are limited, and the member of their data that says what they are about. The reference goes by the
/// `qom-path` of errors, which exports do not have.
const LIMITED: &[(&str, Option<&str>)] = &[
    ("BLOCK_IO_ERROR", Some("node-name")),
    ("QUORUM_FAILURE", None),
    ("QUORUM_REPORT_BAD", Some("node-name")),
];

/// An event's name and what it is about.
type Subject = (&'static str, String);

/// What is being held back.
#[derive(Clone, Default)]
pub struct Limit(Rc<RefCell<HashMap<Subject, Option<Dated>>>>);

impl Limit {
    /// Passes an event on by `send`: at once, later, or never if another takes its place. Events
    /// about the same thing must come with the same `send`. Needs a `LocalSet`.
    pub fn pass(&self, event: Event, send: impl Fn(Dated) + 'static) {
        let subject = subject_of(&event);
        let dated = Rc::new((event, SystemTime::now()));
        let Some(subject) = subject else {
            return send(dated);
        };
        if let Some(held) = self.0.borrow_mut().get_mut(&subject) {
            *held = Some(dated);
            return;
        }
        self.0.borrow_mut().insert(subject.clone(), None);
        send(dated);
        let Self(held) = self.clone();
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(PERIOD).await;
                let last = held.borrow_mut().get_mut(&subject).and_then(Option::take);
                match last {
                    Some(dated) => send(dated),
                    None => break,
                }
            }
            held.borrow_mut().remove(&subject);
        });
    }
}

fn subject_of(event: &Event) -> Option<Subject> {
    let (name, member) = LIMITED.iter().find(|(name, _)| *name == event.name)?;
    let about = member.and_then(|member| event.data.get(member)?.as_str());
    Some((name, about.unwrap_or_default().to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(name: &'static str, node: &str, number: u32) -> Event {
        Event {
            name,
            data: json!({"node-name": node, "number": number}),
        }
    }

    /// The numbers of the events passed on, with the second in which each was.
    fn passed(events: &[(u64, &'static str, &str)]) -> Vec<(u64, u64)> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let log = Rc::new(RefCell::new(Vec::new()));
        let start = async {
            let began = tokio::time::Instant::now();
            let limit = Limit::default();
            for ((at, name, node), number) in events.iter().zip(0..) {
                tokio::time::sleep_until(began + Duration::from_millis(*at)).await;
                let log = Rc::clone(&log);
                limit.pass(event(name, node, number), move |dated| {
                    let number = dated.0.data["number"].as_u64().unwrap_or(u64::MAX);
                    log.borrow_mut().push((began.elapsed().as_secs(), number));
                });
            }
            tokio::time::sleep(Duration::from_secs(10)).await;
            assert!(limit.0.borrow().is_empty(), "nothing is kept for ever");
        };
        tokio::task::LocalSet::new().block_on(&runtime, start);
        log.take()
    }

    #[test]
    fn of_a_flood_the_first_and_the_last_are_told() {
        let bad = "QUORUM_REPORT_BAD";
        let flood = [
            (0, bad, "a"),
            (10, bad, "a"),
            (20, bad, "b"),
            (900, bad, "a"),
            (1500, bad, "a"),
        ];
        assert_eq!(passed(&flood), [(0, 0), (0, 2), (1, 3), (2, 4)]);
    }

    #[test]
    fn other_events_are_told_at_once() {
        let name = "BLOCK_EXPORT_DELETED";
        assert_eq!(passed(&[(0, name, "a"), (1, name, "a")]), [(0, 0), (0, 1)]);
    }
}
