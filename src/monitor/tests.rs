//! Clients against a session, over an in-memory connection.

use std::cell::Cell;
use std::rc::Rc;

use serde_json::Value;
use stord_qmp::Event;
use stord_qmp::command::Registry;
use stord_qmp::schema::export::BlockExportDeleted;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::commands::version;
use super::events::{BACKLOG, Broadcast};
use super::session::{self, Service};
use crate::chardev::Connection;
use crate::lifecycle::Shutdown;

/// Bytes that the connection itself holds.
const PIPE: usize = 1024;

/// What the commands act on: `hold` waits until it is let go, `step` counts.
#[derive(Default)]
struct State {
    let_go: Notify,
    steps: Cell<u32>,
    shutdown: Shutdown,
}

fn service() -> Rc<Service<State>> {
    let state = Rc::new(State::default());
    let mut registry = Registry::new();
    registry.add("hold", |state: Rc<State>, (): ()| async move {
        state.let_go.notified().await;
        state.steps.set(state.steps.get() + 1);
        Ok(())
    });
    registry.add("step", |state: Rc<State>, (): ()| async move {
        state.steps.set(state.steps.get() + 1);
        Ok(i64::from(state.steps.get()))
    });
    registry.add("quit", |state: Rc<State>, (): ()| async move {
        state.shutdown.request();
        Ok(())
    });
    Rc::new(Service {
        registry,
        shutdown: state.shutdown.clone(),
        state,
        version: version(),
        events: Broadcast::default(),
    })
}

struct Client {
    stream: BufReader<DuplexStream>,
    session: JoinHandle<()>,
}

impl Client {
    fn connect(service: &Rc<Service<State>>) -> Self {
        let (ours, theirs) = tokio::io::duplex(PIPE);
        let (reader, writer) = tokio::io::split(theirs);
        let connection = Connection {
            reader: Box::new(reader),
            writer: Box::new(writer),
        };
        let service = Rc::clone(service);
        let session = tokio::task::spawn_local(async move {
            session::serve(&service, connection, false).await;
        });
        Self {
            stream: BufReader::new(ours),
            session,
        }
    }

    async fn negotiated(service: &Rc<Service<State>>) -> Self {
        let mut client = Self::connect(service);
        client.send(r#"{"execute":"qmp_capabilities"}"#).await;
        assert!(client.receive().await.get("QMP").is_some());
        assert!(client.receive().await.get("return").is_some());
        client
    }

    async fn send(&mut self, text: &str) {
        let sent = self.stream.get_mut().write_all(text.as_bytes()).await;
        sent.expect("the session reads");
    }

    async fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.expect("readable");
        assert!(line.ends_with("\r\n"), "a whole line: {line:?}");
        serde_json::from_str(&line).expect("valid JSON")
    }

    async fn receive_end(mut self) {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).await.expect("readable");
        assert_eq!(String::from_utf8_lossy(&rest), "");
        self.session.await.expect("the session does not panic");
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime without drivers");
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

/// Lets everything else go as far as it can.
async fn settle() {
    for _ in 0..10_000 {
        tokio::task::yield_now().await;
    }
}

fn deleted(id: &str) -> Event {
    Event::new(&BlockExportDeleted { id: id.to_owned() })
}

#[test]
fn commands_of_one_write_are_answered_in_order() {
    run(async {
        let service = service();
        let mut client = Client::negotiated(&service).await;
        client
            .send(r#"{"execute":"hold","id":1}{"execute":"step","id":2} nonsense {"execute":"#)
            .await;
        settle().await;
        service.state.let_go.notify_one();
        assert_eq!(client.receive().await["id"], 1);
        assert_eq!(client.receive().await["return"], 2);
        assert!(client.receive().await.get("error").is_some());
        client.send(r#""step","id":3}"#).await;
        assert_eq!(client.receive().await["return"], 3);
    });
}

#[test]
fn command_in_progress_does_not_hold_up_other_monitors() {
    run(async {
        let service = service();
        let mut held = Client::negotiated(&service).await;
        let mut other = Client::negotiated(&service).await;
        held.send(r#"{"execute":"hold"}"#).await;
        settle().await;
        other.send(r#"{"execute":"step"}"#).await;
        assert_eq!(other.receive().await["return"], 1);
        service.state.let_go.notify_one();
        assert!(held.receive().await.get("return").is_some());
    });
}

#[test]
fn client_that_does_not_read_is_not_read_from() {
    run(async {
        let service = service();
        let client = Client::negotiated(&service).await;
        let (mut from, mut to) = tokio::io::split(client.stream.into_inner());
        const COMMANDS: u32 = 20_000;
        let sent = Rc::new(Cell::new(0));
        let sender = tokio::task::spawn_local({
            let sent = Rc::clone(&sent);
            async move {
                for _ in 0..COMMANDS {
                    let command = br#"{"execute":"step"}"#;
                    to.write_all(command).await.expect("the session lives");
                    sent.set(sent.get() + 1);
                }
                to.shutdown().await.expect("the session lives");
            }
        });
        settle().await;
        let executed = service.state.steps.get();
        assert!(executed < COMMANDS, "all were executed");
        settle().await;
        assert_eq!(service.state.steps.get(), executed, "still going on");
        assert!(sent.get() < COMMANDS);
        let mut replies = Vec::new();
        from.read_to_end(&mut replies).await.expect("readable");
        sender.await.expect("everything is sent");
        assert_eq!(service.state.steps.get(), COMMANDS);
        assert_eq!(
            replies.split(|b| *b == b'\n').count(),
            1 + COMMANDS as usize
        );
    });
}

#[test]
fn events_reach_every_monitor_that_has_negotiated() {
    run(async {
        let service = service();
        let mut first = Client::negotiated(&service).await;
        let mut second = Client::negotiated(&service).await;
        let mut silent = Client::connect(&service);
        settle().await;
        service.events.send(deleted("e"));
        for client in [&mut first, &mut second] {
            let event = client.receive().await;
            assert_eq!(event["event"], "BLOCK_EXPORT_DELETED");
            assert_eq!(event["data"]["id"], "e");
            assert!(event["timestamp"]["seconds"].is_u64());
        }
        assert!(silent.receive().await.get("QMP").is_some());
        silent.send(r#"{"execute":"qmp_capabilities"}"#).await;
        assert!(silent.receive().await.get("return").is_some());
    });
}

#[test]
fn client_that_falls_too_far_behind_is_cut_off() {
    run(async {
        let service = service();
        let mut slow = Client::negotiated(&service).await;
        let mut quick = Client::negotiated(&service).await;
        for _ in 0..2 * BACKLOG {
            service.events.send(deleted("e"));
            assert!(quick.receive().await.get("event").is_some());
        }
        let mut missed = Vec::new();
        let read = slow.stream.read_to_end(&mut missed).await;
        read.expect("it ends");
        let count = missed.split(|byte| *byte == b'\n').count();
        assert!((BACKLOG..2 * BACKLOG).contains(&count), "{count} events");
        slow.session.await.expect("the session does not panic");
        assert!(!quick.session.is_finished());
    });
}

#[test]
fn command_goes_on_when_its_client_is_gone() {
    run(async {
        let service = service();
        let mut client = Client::negotiated(&service).await;
        client.send(r#"{"execute":"hold"}"#).await;
        settle().await;
        let Client { stream, session } = client;
        drop(stream);
        settle().await;
        assert!(!session.is_finished());
        service.state.let_go.notify_one();
        session.await.expect("the session does not panic");
        assert_eq!(service.state.steps.get(), 1);
    });
}

#[test]
fn commands_before_the_end_of_input_are_answered() {
    run(async {
        let service = service();
        let mut client = Client::negotiated(&service).await;
        client.send(r#"{"execute":"step"}{"execute":"step"}"#).await;
        client.stream.get_mut().shutdown().await.expect("open");
        assert_eq!(client.receive().await["return"], 1);
        assert_eq!(client.receive().await["return"], 2);
        client.receive_end().await;
    });
}

#[test]
fn quit_is_answered_and_nothing_after_it_is_executed() {
    run(async {
        let service = service();
        let mut client = Client::negotiated(&service).await;
        client.send(r#"{"execute":"quit"}{"execute":"step"}"#).await;
        assert!(client.receive().await.get("return").is_some());
        service.events.send(deleted("e"));
        assert_eq!(client.receive().await["data"]["id"], "e");
        service.events.close();
        client.receive_end().await;
        assert_eq!(service.state.steps.get(), 0);
    });
}
