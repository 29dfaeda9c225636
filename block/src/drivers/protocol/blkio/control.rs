//! The socket of a connection that serves requests: it says when the back end goes, and what its configuration is.
//!
//! Answers come in the order of the questions. Whatever else a back end sends ends the connection.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use stord_aio::sync::{mpsc, oneshot};
use stord_aio::{Errno, IoBuffer, IoVec, PolledFd, spawn_local};
use zerocopy::FromBytes as _;

use super::config::CONFIG_LEN;
use super::message::{Header, Request, config_of, get_config};

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

struct Control {
    socket: PolledFd,
    waiting: RefCell<VecDeque<oneshot::Sender<Vec<u8>>>>,
}

/// Receives what the back end sends, and passes on what is `asked`, until the connection ends.
pub(super) async fn watch(
    socket: UnixStream,
    mut asked: mpsc::UnboundedReceiver<oneshot::Sender<Vec<u8>>>,
) -> Watch {
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
    end
}

impl Control {
    async fn receive(&self) -> Watch {
        let mut header = [0; size_of::<Header>()];
        loop {
            if let Err(end) = self.fill(&mut header).await {
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
            if let Err(end) = self.fill(&mut payload).await {
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

    async fn fill(&self, bytes: &mut [u8]) -> Result<(), Watch> {
        let buffer = IoBuffer::zeroed(bytes.len());
        let mut done = 0;
        while done < bytes.len() {
            let room = buffer.slice(done..bytes.len()).into();
            match self.socket.read_when_ready(room).await {
                Ok(0) => return Err(Watch::Closed),
                Ok(count) => done += count,
                Err(Errno::ECANCELED) => return Err(Watch::Stopping),
                Err(_) => return Err(Watch::Closed),
            }
        }
        buffer.read_at(0, bytes);
        Ok(())
    }
}
