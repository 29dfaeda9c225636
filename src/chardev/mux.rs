//! The device that shares another one among several users. What it receives goes to one of them,
//! chosen with the escape character Ctrl-A; what they send is interleaved, but never within a line.
//!
//! All users are connected as long as the shared device is.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

use stord_qmp::Error;
use stord_qmp::schema::chardev::ChardevMux;
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex,
    split,
};
use tokio::sync::{Mutex, Notify};
use tokio::task::{AbortHandle, JoinSet};

use super::backend::Connecting;
use super::{Backend, Chardevs, Connection, User};
use crate::lifecycle::Shutdown;

/// The most users.
const CAPACITY: usize = 4;

/// Bytes on their way between the shared device and a user.
const BUFFER: usize = 64 << 10;

const ESCAPE: u8 = 1;

const HELP: &str = "\n\r\
    C-a h    print this help\n\r\
    C-a x    exit emulator\n\r\
    C-a t    toggle console timestamps\n\r\
    C-a b    send break (magic sysrq)\n\r\
    C-a c    switch between console and monitor\n\r\
    C-a C-a  sends C-a\n\r";

/// A multiplexer.
pub struct Mux {
    shared: Rc<Shared>,
    task: AbortHandle,
}

struct Shared {
    base: User,
    shutdown: Shutdown,
    users: Cell<usize>,
    /// The user who receives.
    focus: Cell<usize>,
    /// The connections that users have not taken yet, one for each.
    offered: [RefCell<Option<DuplexStream>>; CAPACITY],
    offer: Notify,
}

impl Mux {
    /// Becomes the user of a device. Needs a `LocalSet`.
    ///
    /// # Errors
    /// There is no such device, or it has a user.
    pub fn open(
        options: &ChardevMux,
        chardevs: &Chardevs,
        shutdown: &Shutdown,
    ) -> Result<Self, Error> {
        let id = &options.chardev;
        let base = chardevs
            .find(id)
            .ok_or_else(|| Error::generic(format!("mux: base chardev {id} not found")))?;
        let shared = Rc::new(Shared {
            base: base.claim()?,
            shutdown: shutdown.clone(),
            users: Cell::new(0),
            focus: Cell::new(0),
            offered: Default::default(),
            offer: Notify::new(),
        });
        let task = tokio::task::spawn_local(serve(Rc::clone(&shared))).abort_handle();
        Ok(Self { shared, task })
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Backend for Mux {
    fn kind(&self) -> &'static str {
        "mux"
    }

    fn connect(&self, user: usize) -> Connecting<'_> {
        Box::pin(async move {
            loop {
                // Registered before the look, so that an offer in between is not missed.
                let offer = self.shared.offer.notified();
                let offered = self.shared.offered.get(user);
                if let Some(stream) = offered.and_then(|offered| offered.take()) {
                    let (reader, writer) = split(stream);
                    return Connection {
                        reader: Box::new(reader),
                        writer: Box::new(writer),
                    };
                }
                offer.await;
            }
        })
    }

    fn capacity(&self) -> usize {
        CAPACITY
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn users_changed(&self, users: usize) {
        if users > self.shared.users.replace(users) {
            // The newest one receives.
            self.shared.focus.set(users - 1);
        }
        self.shared.base.set_open(users > 0);
    }

    fn send_break(&self) {
        self.shared.base.device().backend().send_break();
    }
}

async fn serve(shared: Rc<Shared>) {
    loop {
        let Connection { reader, writer } = shared.base.connect().await;
        let output = Rc::new(Mutex::new(Output {
            writer,
            clock: None,
        }));
        let mut inputs = Vec::new();
        let mut copying = JoinSet::new();
        for offered in &shared.offered {
            let (ours, theirs) = duplex(BUFFER);
            let (from_user, to_user) = split(ours);
            inputs.push(to_user);
            copying.spawn_local(copy_output(from_user, Rc::clone(&output)));
            offered.replace(Some(theirs));
        }
        shared.offer.notify_waiters();
        distribute(reader, inputs, &output, &shared).await;
        // The users see the end of their connections; those not taken are void.
        for offered in &shared.offered {
            offered.take();
        }
    }
}

/// The shared device's sending side.
struct Output {
    writer: Box<dyn AsyncWrite + Unpin>,
    /// When the first line with a time stamp began, and whether the next byte begins a line.
    clock: Option<(Option<Instant>, bool)>,
}

impl Output {
    async fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let Some((mut start, mut begins_line)) = self.clock else {
            self.writer.write_all(bytes).await?;
            return self.writer.flush().await;
        };
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if begins_line {
                let since = start.get_or_insert_with(Instant::now).elapsed();
                let (seconds, millis) = (since.as_secs(), since.subsec_millis());
                let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
                let stamp = format!("[{hours:02}:{minutes:02}:{:02}.{millis:03}] ", seconds % 60);
                self.writer.write_all(stamp.as_bytes()).await?;
            }
            self.writer.write_all(line).await?;
            begins_line = line.ends_with(b"\n");
        }
        self.clock = Some((start, begins_line));
        self.writer.flush().await
    }
}

/// Copies what a user sends, keeping the device to itself until a line is complete.
async fn copy_output(mut user: ReadHalf<DuplexStream>, output: Rc<Mutex<Output>>) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(count @ 1..) = user.read(&mut buffer).await {
        let mut output = output.lock().await;
        let mut bytes = buffer.get(..count).unwrap_or_default();
        while output.send(bytes).await.is_ok() && !bytes.ends_with(b"\n") {
            match user.read(&mut buffer).await {
                Ok(count @ 1..) => bytes = buffer.get(..count).unwrap_or_default(),
                _ => return,
            }
        }
    }
}

/// Hands what the device receives to the user who has the focus, until the device is disconnected.
async fn distribute(
    mut reader: Box<dyn AsyncRead + Unpin>,
    mut users: Vec<WriteHalf<DuplexStream>>,
    output: &Mutex<Output>,
    shared: &Shared,
) {
    let mut buffer = vec![0; 4096];
    let mut escaped = false;
    while let Ok(count @ 1..) = reader.read(&mut buffer).await {
        let mut received: VecDeque<u8> = buffer.iter().take(count).copied().collect();
        while !received.is_empty() {
            let mut plain = Vec::new();
            let mut command = None;
            while let (Some(byte), None) = (received.pop_front(), command) {
                match (std::mem::take(&mut escaped), byte) {
                    (false, ESCAPE) => escaped = true,
                    (true, ESCAPE) | (false, _) => plain.push(byte),
                    (true, byte) => command = Some(byte),
                }
                if command.is_some() {
                    break;
                }
            }
            if let Some(user) = users.get_mut(shared.focus.get()) {
                // A user who is gone takes nothing.
                let _ = user.write_all(&plain).await;
            }
            if let Some(command) = command {
                obey(command, output, shared).await;
            }
        }
    }
}

/// Does what follows the escape character.
async fn obey(command: u8, output: &Mutex<Output>, shared: &Shared) {
    match command {
        b'h' | b'?' => {
            // The device may be gone, which its reader will say.
            let _ = output.lock().await.send(HELP.as_bytes()).await;
        }
        b'x' => {
            let _ = output.lock().await.send(b"QEMU: Terminated\n\r").await;
            shared.shutdown.request();
        }
        b't' => {
            let clock = &mut output.lock().await.clock;
            *clock = match clock {
                None => Some((None, false)),
                Some(_) => None,
            };
        }
        b'b' => shared.base.device().backend().send_break(),
        b'c' => {
            let users = shared.users.get().max(1);
            shared.focus.set((shared.focus.get() + 1) % users);
        }
        _ => {}
    }
}
