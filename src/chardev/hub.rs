//! The device that joins several others: it receives what any of them receives, and sends to all of
//! them. It is connected as long as one of them is.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use stord_qmp::Error;
use stord_qmp::schema::chardev::ChardevHub;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, duplex, split};
use tokio::sync::{Mutex, Notify, mpsc};
use tokio::task::JoinSet;

use super::backend::Connecting;
use super::{Backend, Chardevs, Connection, User};

/// The most devices to join.
const MEMBERS_MAX: usize = 4;

/// Bytes on their way between the devices and the user.
const BUFFER: usize = 64 << 10;

/// A hub.
pub struct Hub {
    members: Rc<Vec<Member>>,
    connected: Rc<Notify>,
    received: Rc<Mutex<Option<mpsc::Receiver<Vec<u8>>>>>,
    tasks: RefCell<JoinSet<()>>,
}

struct Member {
    user: User,
    is_connected: Cell<bool>,
    writer: Mutex<Option<Box<dyn AsyncWrite + Unpin>>>,
}

impl Hub {
    /// Becomes the user of the devices.
    ///
    /// # Errors
    /// There are too many or none, one does not exist, has a user, or is a hub or a multiplexer.
    pub fn open(options: &ChardevHub, id: &str, chardevs: &Chardevs) -> Result<Self, Error> {
        let ids = &options.chardevs;
        if ids.is_empty() {
            return Err(Error::generic("hub: 'chardevs' list is not defined"));
        }
        if ids.len() > MEMBERS_MAX {
            return Err(Error::generic(format!(
                "hub: too many uses of chardevs '{id}' (maximum is {MEMBERS_MAX})"
            )));
        }
        let mut members = Vec::new();
        for id in ids {
            let device = chardevs.find(id);
            let device = device.ok_or_else(|| {
                Error::generic(format!("hub: chardev can't be found by id '{id}'"))
            })?;
            if device.is_shared() {
                return Err(Error::generic(format!(
                    "hub: multiplexers and hub devices can't be stacked, check chardev '{id}', \
                     chardev should not be a hub device or have 'mux=on' enabled"
                )));
            }
            members.push(Member {
                user: device.claim()?,
                is_connected: Cell::new(false),
                writer: Mutex::default(),
            });
        }
        Ok(Self {
            members: Rc::new(members),
            connected: Rc::default(),
            received: Rc::default(),
            tasks: RefCell::default(),
        })
    }

    /// Starts to serve the devices, once there is somebody to serve them for.
    async fn start(&self) {
        let mut received = self.received.lock().await;
        if received.is_some() {
            return;
        }
        let (sender, receiver) = mpsc::channel(1);
        *received = Some(receiver);
        for index in 0..self.members.len() {
            let members = Rc::clone(&self.members);
            let connected = Rc::clone(&self.connected);
            let sender = sender.clone();
            self.tasks.borrow_mut().spawn_local(async move {
                if let Some(member) = members.get(index) {
                    member.serve(&connected, &sender).await;
                }
            });
        }
    }
}

impl Backend for Hub {
    fn kind(&self) -> &'static str {
        "hub"
    }

    fn connect(&self, _: usize) -> Connecting<'_> {
        Box::pin(async {
            self.start().await;
            loop {
                // Registered before the look, so that a change in between is not missed.
                let change = self.connected.notified();
                if is_any_connected(&self.members) {
                    break;
                }
                change.await;
            }
            let (ours, theirs) = duplex(BUFFER);
            let received = Rc::clone(&self.received);
            let members = Rc::clone(&self.members);
            let connected = Rc::clone(&self.connected);
            self.tasks.borrow_mut().spawn_local(async move {
                // Held by the task of the user's last connection until that has ended.
                if let Some(received) = received.lock().await.as_mut() {
                    join(ours, received, &members, &connected).await;
                }
            });
            let (reader, writer) = split(theirs);
            Connection {
                reader: Box::new(reader),
                writer: Box::new(writer),
            }
        })
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn users_changed(&self, users: usize) {
        for member in self.members.iter() {
            member.user.set_open(users > 0);
        }
    }
}

impl Member {
    /// Hands on what the device receives, one connection after the other.
    async fn serve(&self, connected: &Notify, received: &mpsc::Sender<Vec<u8>>) {
        let mut buffer = vec![0; 4096];
        loop {
            let Connection { mut reader, writer } = self.user.connect().await;
            *self.writer.lock().await = Some(writer);
            self.is_connected.set(true);
            connected.notify_waiters();
            while let Ok(count @ 1..) = reader.read(&mut buffer).await {
                let bytes = buffer.get(..count).unwrap_or_default().to_vec();
                if received.send(bytes).await.is_err() {
                    break;
                }
            }
            self.is_connected.set(false);
            *self.writer.lock().await = None;
            connected.notify_waiters();
        }
    }
}

fn is_any_connected(members: &[Member]) -> bool {
    members.iter().any(|member| member.is_connected.get())
}

/// Copies between the user and the devices until the user or the last device is gone.
async fn join(
    user: DuplexStream,
    received: &mut mpsc::Receiver<Vec<u8>>,
    members: &[Member],
    connected: &Notify,
) {
    let (from_user, mut to_user) = split(user);
    let receive = async {
        while let Some(bytes) = received.recv().await {
            if to_user.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    let disconnect = async {
        loop {
            // Registered before the look, so that a change in between is not missed.
            let change = connected.notified();
            if !is_any_connected(members) {
                return;
            }
            change.await;
        }
    };
    tokio::select! {
        () = receive => {}
        () = send(from_user, members) => {}
        () = disconnect => {}
    }
}

/// Sends what the user sends to every device that is connected.
async fn send(mut user: ReadHalf<DuplexStream>, members: &[Member]) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(count @ 1..) = user.read(&mut buffer).await {
        let bytes = buffer.get(..count).unwrap_or_default();
        for member in members {
            let mut writer = member.writer.lock().await;
            if let Some(writer) = writer.as_mut() {
                // That a device is gone shows when it is read from.
                let _ = writer.write_all(bytes).await;
                let _ = writer.flush().await;
            }
        }
    }
}
