//! The device that keeps the last of its output in memory, where commands read it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use stord_qmp::schema::chardev::{ChardevRingbuf, DataFormat, RingbufRead, RingbufWrite};
use stord_qmp::{Error, base64};
use tokio::io::AsyncWrite;

use super::backend::Connecting;
use super::null::Silence;
use super::{Backend, Chardevs, Connection};

/// The size of a buffer that does not say, in bytes.
const DEFAULT_SIZE: i64 = 65536;

/// A buffer.
pub struct Ringbuf {
    kind: &'static str,
    ring: Rc<RefCell<Ring>>,
}

struct Ring {
    bytes: VecDeque<u8>,
    size: usize,
}

impl Ring {
    fn push(&mut self, bytes: &[u8]) {
        let kept = bytes.len().min(self.size);
        let excess = (self.bytes.len() + kept).saturating_sub(self.size);
        self.bytes.drain(..excess);
        self.bytes.extend(bytes.iter().skip(bytes.len() - kept));
    }
}

impl Ringbuf {
    /// An empty buffer.
    ///
    /// # Errors
    /// Its size is no power of two.
    pub fn open(options: &ChardevRingbuf, kind: &'static str) -> Result<Self, Error> {
        let size = match options.size {
            None | Some(0) => DEFAULT_SIZE,
            Some(size) => size,
        };
        let size = usize::try_from(size)
            .ok()
            .filter(|size| size.is_power_of_two());
        let size =
            size.ok_or_else(|| Error::generic("size of ringbuf chardev must be power of two"))?;
        Ok(Self {
            kind,
            ring: Rc::new(RefCell::new(Ring {
                bytes: VecDeque::new(),
                size,
            })),
        })
    }
}

impl Backend for Ringbuf {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn connect(&self, _: usize) -> Connecting<'_> {
        Box::pin(async {
            Connection {
                reader: Box::new(Silence),
                writer: Box::new(Writer(Rc::clone(&self.ring))),
            }
        })
    }

    fn ringbuf(&self) -> Option<&Ringbuf> {
        Some(self)
    }
}

struct Writer(Rc<RefCell<Ring>>);

impl AsyncWrite for Writer {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().push(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// How a NUL in text is kept apart from the end of the text, as in the reference.
const NUL: &[u8] = &[0xc0, 0x80];

/// Adds to a buffer.
///
/// # Errors
/// There is no such buffer, or the bytes are not as the format says.
pub fn write(chardevs: &Chardevs, arguments: &RingbufWrite) -> Result<(), Error> {
    with_ring(chardevs, &arguments.device, |ring| {
        match arguments.format.unwrap_or(DataFormat::Utf8) {
            DataFormat::Utf8 => {
                let parts = arguments.data.split('\0').map(str::as_bytes);
                ring.push(&parts.collect::<Vec<_>>().join(NUL));
            }
            DataFormat::Base64 => ring.push(&base64::decode(&arguments.data)?),
        }
        Ok(())
    })
}

/// Takes the oldest bytes out of a buffer. Text ends with the first NUL, whatever comes after it.
///
/// # Errors
/// There is no such buffer, or nothing was asked for.
pub fn read(chardevs: &Chardevs, arguments: &RingbufRead) -> Result<String, Error> {
    with_ring(chardevs, &arguments.device, |ring| {
        let size = usize::try_from(arguments.size)
            .ok()
            .filter(|size| *size > 0);
        let size = size.ok_or_else(|| Error::generic("size must be greater than zero"))?;
        let count = size.min(ring.bytes.len());
        let bytes: Vec<u8> = ring.bytes.drain(..count).collect();
        Ok(match arguments.format.unwrap_or(DataFormat::Utf8) {
            DataFormat::Base64 => base64::encode(&bytes),
            DataFormat::Utf8 => {
                let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
                let mut whole = String::new();
                let mut rest = text;
                while let Some(at) = rest.windows(NUL.len()).position(|bytes| bytes == NUL) {
                    let (part, after) = rest.split_at(at);
                    whole += &String::from_utf8_lossy(part);
                    whole.push('\0');
                    rest = after.get(NUL.len()..).unwrap_or_default();
                }
                whole + &String::from_utf8_lossy(rest)
            }
        })
    })
}

fn with_ring<T>(
    chardevs: &Chardevs,
    id: &str,
    work: impl FnOnce(&mut Ring) -> Result<T, Error>,
) -> Result<T, Error> {
    let device = chardevs.find(id);
    let device = device.ok_or_else(|| Error::generic(format!("Device '{id}' not found")))?;
    match device.backend().ringbuf() {
        Some(ringbuf) => work(&mut ringbuf.ring.borrow_mut()),
        None => Err(Error::generic(format!("{id} is not a ringbuf device"))),
    }
}
