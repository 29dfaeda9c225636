//! The socket of a connection that serves requests: it says when the back end goes, and what its configuration is.
//!
//! Answers come in the order of the questions. Whatever else a back end sends there ends the connection; what it has to say by itself comes by a
//! channel of its own.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use stord_aio::sync::{mpsc, oneshot};
use stord_aio::{Errno, IoBuffer, IoVec, PolledFd, spawn_local};
use zerocopy::FromBytes as _;

use super::config::CONFIG_LEN;
use super::message::{CONFIG_CHANGED, Header, Request, config_of, get_config};

/// How a connection has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watch {
    /// The back end went, or we did.
    Closed,
    /// It sent what it must not.
    Nonsense,
    /// The context is about to stop.
    Stopping,
}

/// What is watched.
pub(super) struct Wires {
    pub(super) socket: UnixStream,
    /// By which the back end says something by itself.
    pub(super) channel: Option<UnixStream>,
    /// Who wants to know the configuration.
    pub(super) asked: mpsc::UnboundedReceiver<oneshot::Sender<Vec<u8>>>,
}

struct Control {
    socket: PolledFd,
    waiting: RefCell<VecDeque<oneshot::Sender<Vec<u8>>>>,
}

/// Receives what the back end sends, and passes on what is asked, until the connection ends.
pub(super) async fn watch(wires: Wires) -> Watch {
    let Wires {
        socket,
        channel,
        mut asked,
    } = wires;
    let listening = channel
        .as_ref()
        .and_then(|channel| channel.try_clone().ok());
    if let Some(channel) = listening.and_then(|channel| PolledFd::new(channel.into()).ok()) {
        spawn_local(async move { attend(&channel).await });
    }
    let Ok(socket) = PolledFd::new(socket.into()) else {
        return Watch::Closed;
    };
    let control = Rc::new(Control {
        socket,
        waiting: RefCell::default(),
    });
    let asking = Rc::clone(&control);
    // Ends when nobody can ask any more.
    spawn_local(async move {
        while let Some(sender) = asked.recv().await {
            asking.waiting.borrow_mut().push_back(sender);
            let message: IoVec = IoBuffer::from_vec(get_config(CONFIG_LEN)).into();
            let len = message.len();
            let sent = asking.socket.try_write(&message);
            if sent.map(|sent| sent as u64) != Ok(len) {
                // Who waits learns it by the end of the sender.
                asking.waiting.borrow_mut().pop_back();
            }
        }
    });
    let end = control.receive().await;
    control.waiting.take();
    if let Some(channel) = channel {
        // Ends who attends to it; the back end may have ended it already.
        let _ = channel.shutdown(Shutdown::Both);
    }
    end
}

/// Takes note of what a back end says by itself, until it ends or says what it must not.
async fn attend(channel: &PolledFd) {
    let mut header = [0; size_of::<Header>()];
    while fill(channel, &mut header).await.is_ok() {
        let parsed = Header::read_from_bytes(&header).ok();
        let Some((header, size)) = parsed.and_then(|header| Some((header, header.notice()?)))
        else {
            return;
        };
        let mut payload = vec![0; size];
        if fill(channel, &mut payload).await.is_err() {
            return;
        }
        let is_known = header.request == CONFIG_CHANGED;
        if is_known {
            tracing::info!("a vhost-user back end says that its disk has changed");
        }
        if let Some(answer) = header.acknowledgement(is_known) {
            // A back end that does not take its answers waits for them in vain.
            let _ = channel.try_write(&IoBuffer::from_vec(answer).into());
        }
    }
}

impl Control {
    async fn receive(&self) -> Watch {
        let mut header = [0; size_of::<Header>()];
        loop {
            if let Err(end) = fill(&self.socket, &mut header).await {
                return end;
            }
            let Ok(parsed) = Header::read_from_bytes(&header) else {
                return Watch::Nonsense;
            };
            let is_wanted = parsed.request == Request::GetConfig as u32;
            let Some(size) = parsed.answer().filter(|_| is_wanted) else {
                return Watch::Nonsense;
            };
            let mut payload = vec![0; size];
            if let Err(end) = fill(&self.socket, &mut payload).await {
                return end;
            }
            let Some(sender) = self.waiting.borrow_mut().pop_front() else {
                return Watch::Nonsense;
            };
            let Ok(config) = config_of(&payload, CONFIG_LEN) else {
                return Watch::Nonsense;
            };
            // Nobody may wait any more.
            let _ = sender.send(config.to_vec());
        }
    }
}

async fn fill(socket: &PolledFd, bytes: &mut [u8]) -> Result<(), Watch> {
    let buffer = IoBuffer::zeroed(bytes.len());
    let mut done = 0;
    while done < bytes.len() {
        let room = buffer.slice(done..bytes.len()).into();
        match socket.read_when_ready(room).await {
            Ok(0) => return Err(Watch::Closed),
            Ok(count) => done += count,
            Err(Errno::ECANCELED) => return Err(Watch::Stopping),
            Err(_) => return Err(Watch::Closed),
        }
    }
    buffer.read_at(0, bytes);
    Ok(())
}
