//! A vhost-user back end that does what a test tells it, right or wrong. It reaches the front end's memory through its descriptor.

use std::fs::File;
use std::io::{IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// The length of the disk, in sectors.
pub const SECTORS: u64 = 2048;
const VERSION_1: u64 = 1 << 32;
const PROTOCOL: u64 = 1 << 30;
const INDIRECT: u64 = 1 << 28;

/// How a back end serves one connection.
#[derive(Clone)]
pub struct Behaviour {
    pub features: u64,
    pub protocol: u64,
    pub queues: u64,
    /// What the configuration space holds; `None` to refuse it.
    pub config: Option<Vec<u8>>,
    /// The length that the answer claims in place of its own.
    pub claimed: Option<u32>,
    /// Answer this message with a reply of another kind.
    pub confuse: Option<u32>,
    /// What is done with the requests.
    pub deed: Deed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Serve them.
    Serve,
    /// Complete with a number that is none of a request's.
    WrongId(u32),
    /// Claim so many completions at once.
    TooMany(u16),
    /// Complete with a length out of any range.
    WildLength,
    /// Complete with a status byte that nobody knows.
    Status(u8),
    /// Overwrite everything but the used ring, then complete.
    Scribble,
    /// Make the memory shorter, then complete.
    Shrink,
    /// Send what was not asked for.
    Chatter,
    /// Close the connection.
    Leave,
}

impl Behaviour {
    pub fn good() -> Behaviour {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&SECTORS.to_le_bytes());
        Behaviour {
            features: VERSION_1 | PROTOCOL | INDIRECT,
            protocol: 1 << 9 | 1 << 3,
            queues: 1,
            config: Some(config),
            claimed: None,
            confuse: None,
            deed: Deed::Serve,
        }
    }

    pub fn with(deed: Deed) -> Behaviour {
        Behaviour {
            deed,
            ..Behaviour::good()
        }
    }
}

/// Listens at `path` and serves each connection as the next of `behaviours` says, the last of them from then on. Gives the number of
/// connections that have come.
pub fn start(path: &Path, behaviours: Vec<Behaviour>) -> Arc<AtomicUsize> {
    let listener = UnixListener::bind(path).unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    let disk = Arc::new(Mutex::new(vec![0; usize::try_from(SECTORS).unwrap() * 512]));
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            counter.fetch_add(1, Ordering::SeqCst);
            let behaviour = behaviours[number.min(behaviours.len() - 1)].clone();
            let disk = Arc::clone(&disk);
            std::thread::spawn(move || {
                let connection = Connection {
                    stream: stream.unwrap(),
                    behaviour,
                    disk,
                    memory: None,
                    guest: 0,
                    rings: Rings::default(),
                    kick: None,
                    call: None,
                    done: 0,
                };
                // Ends by an error when the front end has had enough.
                let _ = connection.serve();
            });
        }
    });
    count
}

#[derive(Clone, Copy, Default)]
struct Rings {
    descriptors: u64,
    available: u64,
    used: u64,
    size: u16,
}

struct Connection {
    stream: UnixStream,
    behaviour: Behaviour,
    disk: Arc<Mutex<Vec<u8>>>,
    memory: Option<File>,
    guest: u64,
    rings: Rings,
    kick: Option<File>,
    call: Option<File>,
    done: u16,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Connection {
    fn serve(mut self) -> std::io::Result<()> {
        loop {
            let kicked = {
                let mut fds = vec![PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
                if let Some(kick) = &self.kick {
                    fds.push(PollFd::new(kick.as_fd(), PollFlags::POLLIN));
                }
                poll(&mut fds, PollTimeout::NONE)?;
                fds.get(1).is_some_and(|fd| fd.any() == Some(true))
            };
            if kicked {
                let mut count = [0; 8];
                let _ = self.kick.as_mut().unwrap().read(&mut count);
                self.requests()?;
            } else {
                self.message()?;
            }
        }
    }

    fn message(&mut self) -> std::io::Result<()> {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut header)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        if received.bytes != header.len() {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let mut descriptors: Vec<File> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds.map(File::from));
            }
        }
        let (request, flags) = (half(&header, 0), half(&header, 4));
        let mut payload = vec![0; half(&header, 8) as usize];
        self.stream.read_exact(&mut payload)?;
        let descriptor = descriptors.pop();
        let answer = match request {
            1 => Some(self.behaviour.features.to_ne_bytes().to_vec()),
            15 => Some(self.behaviour.protocol.to_ne_bytes().to_vec()),
            17 => Some(self.behaviour.queues.to_ne_bytes().to_vec()),
            24 => Some(self.config(&payload)),
            5 => {
                self.guest = word(&payload, 8);
                self.memory = descriptor;
                None
            }
            8 => {
                self.rings.size = u16::try_from(half(&payload, 4)).unwrap();
                None
            }
            9 => {
                self.rings.descriptors = word(&payload, 8);
                self.rings.used = word(&payload, 16);
                self.rings.available = word(&payload, 24);
                None
            }
            12 => {
                self.kick = descriptor;
                None
            }
            13 => {
                self.call = descriptor;
                None
            }
            _ => None,
        };
        let needs_reply = flags & 8 != 0;
        match answer {
            Some(answer) => self.reply(request, &answer),
            None if needs_reply => self.reply(request, &0_u64.to_ne_bytes()),
            None => Ok(()),
        }
    }

    fn config(&self, payload: &[u8]) -> Vec<u8> {
        let Some(config) = &self.behaviour.config else {
            return Vec::new();
        };
        let mut answer = payload[..12].to_vec();
        if let Some(claimed) = self.behaviour.claimed {
            answer[4..8].copy_from_slice(&claimed.to_ne_bytes());
        }
        answer.extend(config);
        answer
    }

    fn reply(&mut self, request: u32, payload: &[u8]) -> std::io::Result<()> {
        let request = if self.behaviour.confuse == Some(request) {
            request + 1
        } else {
            request
        };
        let size = u32::try_from(payload.len()).unwrap();
        let mut message = Vec::new();
        for part in [request, 5, size] {
            message.extend(part.to_ne_bytes());
        }
        message.extend(payload);
        self.stream.write_all(&message)
    }

    fn read(&self, addr: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let memory = self.memory.as_ref().unwrap();
        memory.read_exact_at(&mut bytes, addr.wrapping_sub(self.guest))?;
        Ok(bytes)
    }

    fn write(&self, addr: u64, bytes: &[u8]) -> std::io::Result<()> {
        let memory = self.memory.as_ref().unwrap();
        memory.write_all_at(bytes, addr.wrapping_sub(self.guest))
    }

    fn requests(&mut self) -> std::io::Result<()> {
        loop {
            let index = self.read(self.rings.available + 2, 2)?;
            if u16::from_le_bytes([index[0], index[1]]) == self.done {
                return Ok(());
            }
            let entry = u64::from(self.done % self.rings.size);
            let head = self.read(self.rings.available + 4 + 2 * entry, 2)?;
            let head = u16::from_le_bytes([head[0], head[1]]);
            self.request(head)?;
        }
    }

    fn request(&mut self, head: u16) -> std::io::Result<()> {
        let chain = self.chain(head)?;
        let status = chain.last().unwrap().0;
        match self.behaviour.deed {
            Deed::Serve => {
                self.carry_out(&chain)?;
                self.write(status, &[0])?;
                self.complete(head.into(), 1, 1)?;
            }
            Deed::WrongId(id) => {
                self.write(status, &[0])?;
                self.complete(id, 1, 1)?;
            }
            Deed::TooMany(count) => self.complete(head.into(), 1, count)?,
            Deed::WildLength => {
                self.carry_out(&chain)?;
                self.write(status, &[0])?;
                self.complete(head.into(), u32::MAX, 1)?;
            }
            Deed::Status(number) => {
                self.write(status, &[number])?;
                self.complete(head.into(), 1, 1)?;
            }
            Deed::Scribble => {
                let used = self.rings.used - self.guest;
                let noise = crate::support::model::noise(u64::from(self.done), 32 << 10);
                self.write(self.guest, &noise[..usize::try_from(used).unwrap()])?;
                self.write(status, &[0])?;
                self.complete(head.into(), 1, 1)?;
            }
            Deed::Shrink => {
                assert!(self.memory.as_ref().unwrap().set_len(0).is_err());
                self.write(status, &[0])?;
                self.complete(head.into(), 1, 1)?;
            }
            Deed::Chatter => {
                self.reply(24, &[0; 72])?;
                self.done = self.done.wrapping_add(1);
                return Ok(());
            }
            Deed::Leave => return Err(std::io::ErrorKind::ConnectionAborted.into()),
        }
        self.call.as_mut().unwrap().write_all(&1_u64.to_ne_bytes())
    }

    /// Addresses and lengths of a request's parts.
    fn chain(&self, head: u16) -> std::io::Result<Vec<(u64, u32)>> {
        let (mut table, mut at) = (self.rings.descriptors, u64::from(head));
        let mut parts = Vec::new();
        loop {
            let bytes = self.read(table.wrapping_add(16 * at), 16)?;
            let (addr, len) = (word(&bytes, 0), half(&bytes, 8));
            let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
            if flags & 4 != 0 {
                (table, at) = (addr, 0);
                continue;
            }
            parts.push((addr, len));
            if flags & 1 == 0 {
                return Ok(parts);
            }
            at = u16::from_le_bytes([bytes[14], bytes[15]]).into();
        }
    }

    fn carry_out(&self, chain: &[(u64, u32)]) -> std::io::Result<()> {
        let header = self.read(chain[0].0, 16)?;
        let start = usize::try_from(word(&header, 8)).unwrap() * 512;
        let mut disk = self.disk.lock().unwrap();
        match half(&header, 0) {
            0 => {
                let (addr, len) = chain[1];
                self.write(addr, &disk[start..start + len as usize])?;
            }
            1 => {
                let (addr, len) = chain[1];
                disk[start..start + len as usize].copy_from_slice(&self.read(addr, len as usize)?);
            }
            _ => {}
        }
        Ok(())
    }

    fn complete(&mut self, id: u32, len: u32, count: u16) -> std::io::Result<()> {
        let entry = u64::from(self.done % self.rings.size);
        let mut element = id.to_le_bytes().to_vec();
        element.extend(len.to_le_bytes());
        self.write(self.rings.used + 4 + 8 * entry, &element)?;
        self.done = self.done.wrapping_add(count);
        self.write(self.rings.used + 2, &self.done.to_le_bytes())
    }
}
