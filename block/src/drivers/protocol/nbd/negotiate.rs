//! The client's side of the handshake, on a thread of the pool, since it does nothing but wait.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use socket2::Socket;
use stord_credentials::tls::{Handshake, Plaintext, TlsCredentials, TlsSession};
use stord_qmp::Error;
use zerocopy::{FromBytes as _, FromZeros as _, IntoBytes as _};

use super::wire::{
    BASE_ALLOCATION, BlockSizeInfo, ExportInfo, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Greeting,
    INIT_MAGIC, InfoKind, MAX_PAYLOAD, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionKind,
    OptionReply, OptionReplyHeader, TransmissionFlags,
};

/// A server that says nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest reply to an option that is taken, in bytes.
const MAX_REPLY: u32 = 1 << 20;

/// How requests and replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// Simple replies.
    Simple,
    /// Structured replies.
    Structured,
    /// Extended requests and replies.
    Extended,
}

/// What is asked of a server.
#[derive(Clone)]
pub(super) struct Wanted {
    pub(super) export: String,
    /// The metadata context that says what is allocated.
    pub(super) context: String,
    pub(super) tls: Option<Arc<TlsCredentials>>,
    /// The name that the server's certificate must be for.
    pub(super) hostname: Option<String>,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    pub(super) size: u64,
    pub(super) flags: TransmissionFlags,
    pub(super) style: Style,
    /// The number of the metadata context.
    pub(super) context: Option<u32>,
    /// The smallest unit of requests, in bytes.
    pub(super) minimum: u32,
    /// The most bytes of a request.
    pub(super) maximum: u32,
}

/// A connection whose handshake is done.
pub(super) struct Connected {
    pub(super) socket: OwnedFd,
    pub(super) session: Option<TlsSession>,
    pub(super) terms: Terms,
}

/// A blocking stream, plain or TLS.
struct Stream {
    socket: Socket,
    session: Option<TlsSession>,
}

fn failed(what: &str, error: std::io::Error) -> Error {
    Error::os(what, error)
}

impl Stream {
    fn read(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        let lost = |error| failed("Failed to read from the NBD server", error);
        let Some(session) = &mut self.session else {
            return self.socket.read_exact(bytes).map_err(lost);
        };
        let mut done = 0;
        while done < bytes.len() {
            match session.read(&mut bytes[done..]).map_err(lost)? {
                Plaintext::Bytes(count) => done += count,
                Plaintext::Closed => return Err(lost(std::io::ErrorKind::UnexpectedEof.into())),
                Plaintext::NeedsInput => exchange(&mut self.socket, session).map_err(lost)?,
            }
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let lost = |error| failed("Failed to write to the NBD server", error);
        match &mut self.session {
            None => self.socket.write_all(bytes).map_err(lost),
            Some(session) => {
                session.write(bytes).map_err(lost)?;
                send(&mut self.socket, session).map_err(lost)
            }
        }
    }

    fn start_tls(&mut self, mut session: TlsSession) -> Result<(), Error> {
        let lost = |error| failed("TLS handshake with the NBD server failed", error);
        loop {
            let state = session.handshake();
            send(&mut self.socket, &mut session).map_err(lost)?;
            match state? {
                Handshake::Complete => break,
                Handshake::NeedsInput => receive(&mut self.socket, &mut session).map_err(lost)?,
            }
        }
        self.session = Some(session);
        Ok(())
    }
}

fn send(socket: &mut Socket, session: &mut TlsSession) -> std::io::Result<()> {
    let length = session.output().len();
    socket.write_all(session.output())?;
    session.consume_output(length);
    Ok(())
}

fn receive(socket: &mut Socket, session: &mut TlsSession) -> std::io::Result<()> {
    let mut bytes = [0; 4096];
    match socket.read(&mut bytes)? {
        0 => session.end_of_input(),
        count => session.feed(&bytes[..count]),
    }
    Ok(())
}

fn exchange(socket: &mut Socket, session: &mut TlsSession) -> std::io::Result<()> {
    send(socket, session)?;
    receive(socket, session)
}

/// Talks to the server until transmission begins. Blocks.
///
/// # Errors
/// The server does not speak NBD, does not have the export, or cannot do what is asked for.
pub(super) fn negotiate(socket: Socket, wanted: &Wanted) -> Result<Connected, Error> {
    let prepare = || {
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        if stord_sockets::has_nodelay(&socket) {
            socket.set_tcp_nodelay(true)?;
        }
        Ok(())
    };
    prepare().map_err(|error| failed("Could not prepare the socket of the NBD server", error))?;
    let mut client = Client {
        stream: Stream {
            socket,
            session: None,
        },
    };
    let terms = client.agree(wanted)?;
    Ok(Connected {
        socket: client.stream.socket.into(),
        session: client.stream.session,
        terms,
    })
}

struct Client {
    stream: Stream,
}

/// A reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

impl Reply {
    fn is(&self, kind: OptionReply) -> bool {
        self.kind == kind.number()
    }

    fn is_error(&self) -> bool {
        self.kind & (1 << 31) != 0
    }

    /// What the server says to it, for people.
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.data).into_owned()
    }
}

impl Client {
    fn agree(&mut self, wanted: &Wanted) -> Result<Terms, Error> {
        let no_zeroes = self.greet()?;
        if let Some(tls) = &wanted.tls {
            let session = tls.client_session(wanted.hostname.as_deref())?;
            let reply = self.ask(OptionKind::StartTls, &[])?;
            if !reply.is(OptionReply::Ack) {
                return Err(
                    Error::generic("Server does not support STARTTLS").with_hint(reply.text())
                );
            }
            self.stream.start_tls(session)?;
        }
        let style = if self
            .ask(OptionKind::ExtendedHeaders, &[])?
            .is(OptionReply::Ack)
        {
            Style::Extended
        } else if self
            .ask(OptionKind::StructuredReply, &[])?
            .is(OptionReply::Ack)
        {
            Style::Structured
        } else {
            Style::Simple
        };
        let context = match style {
            Style::Simple => None,
            Style::Structured | Style::Extended => self.choose_context(wanted)?,
        };
        if context.is_none() && wanted.context != BASE_ALLOCATION {
            return Err(Error::generic(format!(
                "requested x-dirty-bitmap {} not found",
                wanted.context
            )));
        }
        let mut terms = Terms {
            size: 0,
            flags: TransmissionFlags::empty(),
            style,
            context,
            minimum: 1,
            maximum: MAX_PAYLOAD,
        };
        if !self.go(wanted, &mut terms)? {
            self.export_name(wanted, &mut terms, no_zeroes)?;
        }
        if !terms.minimum.is_power_of_two() || terms.minimum > 64 << 10 {
            return Err(Error::generic(format!(
                "server minimum block size {} is not a power of two",
                terms.minimum
            )));
        }
        terms.maximum = terms.maximum.min(MAX_PAYLOAD) / terms.minimum * terms.minimum;
        if terms.maximum == 0 {
            return Err(Error::generic("server maximum block size is too small"));
        }
        Ok(terms)
    }

    /// Exchanges greetings; whether the server leaves out the zeroes after `EXPORT_NAME`.
    fn greet(&mut self) -> Result<bool, Error> {
        let mut greeting = Greeting::new_zeroed();
        self.stream.read(greeting.as_mut_bytes())?;
        if greeting.init.get() != INIT_MAGIC {
            return Err(Error::generic(format!(
                "Bad initial magic received: 0x{:016x}",
                greeting.init.get()
            )));
        }
        if greeting.option.get() != OPTION_MAGIC {
            return Err(Error::generic(format!(
                "Bad server magic received: 0x{:016x}",
                greeting.option.get()
            ))
            .with_hint("servers with the handshake of before 2012 are not supported"));
        }
        let offered = greeting.flags.get();
        if offered & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(Error::generic(
                "Server does not support the fixed newstyle handshake",
            ));
        }
        let flags = offered & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        self.stream.write(&u32::from(flags).to_be_bytes())?;
        Ok(flags & FLAG_NO_ZEROES != 0)
    }

    fn send(&mut self, kind: OptionKind, data: &[u8]) -> Result<(), Error> {
        let header = OptionHeader {
            magic: OPTION_MAGIC.into(),
            kind: kind.number().into(),
            length: u32::try_from(data.len())
                .map_err(|_| Error::generic("export name too long to send to server"))?
                .into(),
        };
        self.stream.write(&[header.as_bytes(), data].concat())
    }

    fn reply(&mut self, kind: OptionKind) -> Result<Reply, Error> {
        let mut header = OptionReplyHeader::new_zeroed();
        self.stream.read(header.as_mut_bytes())?;
        if header.magic.get() != OPTION_REPLY_MAGIC || header.option.get() != kind.number() {
            return Err(Error::generic(
                "Unexpected option reply from the NBD server",
            ));
        }
        if header.length.get() > MAX_REPLY {
            return Err(Error::generic("Option reply of the NBD server is too long"));
        }
        let mut data = vec![0; header.length.get() as usize];
        self.stream.read(&mut data)?;
        Ok(Reply {
            kind: header.reply.get(),
            data,
        })
    }

    fn ask(&mut self, kind: OptionKind, data: &[u8]) -> Result<Reply, Error> {
        self.send(kind, data)?;
        let reply = self.reply(kind)?;
        if reply.is(OptionReply::TlsRequired) {
            return Err(
                Error::generic("server requires TLS, and no 'tls-creds' are given")
                    .with_hint(reply.text()),
            );
        }
        Ok(reply)
    }

    fn choose_context(&mut self, wanted: &Wanted) -> Result<Option<u32>, Error> {
        let mut data = string(&wanted.export)?;
        data.extend(1_u32.to_be_bytes());
        data.extend(string(&wanted.context)?);
        let kind = OptionKind::SetMetaContext;
        let mut reply = self.ask(kind, &data)?;
        let mut chosen = None;
        while reply.is(OptionReply::MetaContext) {
            if let Some((id, name)) = reply.data.split_first_chunk()
                && name == wanted.context.as_bytes()
            {
                chosen = Some(u32::from_be_bytes(*id));
            }
            reply = self.reply(kind)?;
        }
        Ok(chosen)
    }

    /// Begins the transmission; false where the server does not know how.
    fn go(&mut self, wanted: &Wanted, terms: &mut Terms) -> Result<bool, Error> {
        let mut data = string(&wanted.export)?;
        data.extend(1_u16.to_be_bytes());
        data.extend(InfoKind::BlockSize.number().to_be_bytes());
        let kind = OptionKind::Go;
        let mut reply = self.ask(kind, &data)?;
        let mut is_described = false;
        loop {
            if reply.is(OptionReply::Unsupported) {
                return Ok(false);
            }
            if reply.is(OptionReply::Ack) {
                return if is_described {
                    Ok(true)
                } else {
                    Err(Error::generic("broken server omitted NBD_INFO_EXPORT"))
                };
            }
            if reply.is(OptionReply::Unknown) {
                return Err(
                    Error::generic("Requested export not available").with_hint(reply.text())
                );
            }
            if reply.is_error() {
                return Err(Error::generic(format!(
                    "Server refused the export '{}': error 0x{:x}",
                    wanted.export, reply.kind
                ))
                .with_hint(reply.text()));
            }
            if let Some((piece, data)) = reply.data.split_first_chunk() {
                let piece = u16::from_be_bytes(*piece);
                if piece == InfoKind::Export.number()
                    && let Ok((info, _)) = ExportInfo::read_from_prefix(data)
                {
                    take_export(&info, terms);
                    is_described = true;
                } else if piece == InfoKind::BlockSize.number()
                    && let Ok((sizes, _)) = BlockSizeInfo::read_from_prefix(data)
                {
                    terms.minimum = sizes.minimum.get();
                    terms.maximum = sizes.maximum.get();
                }
            }
            reply = self.reply(kind)?;
        }
    }

    fn export_name(
        &mut self,
        wanted: &Wanted,
        terms: &mut Terms,
        no_zeroes: bool,
    ) -> Result<(), Error> {
        self.send(OptionKind::ExportName, wanted.export.as_bytes())?;
        let mut info = ExportInfo::new_zeroed();
        self.stream.read(info.as_mut_bytes())?;
        take_export(&info, terms);
        if !no_zeroes {
            self.stream.read(&mut [0; 124])?;
        }
        Ok(())
    }
}

fn take_export(info: &ExportInfo, terms: &mut Terms) {
    terms.size = info.size.get();
    terms.flags = TransmissionFlags::from_bits_retain(info.flags.get());
}

fn string(text: &str) -> Result<Vec<u8>, Error> {
    if text.len() > super::wire::MAX_STRING {
        return Err(Error::generic("export name too long to send to server"));
    }
    let length = u32::try_from(text.len()).expect("at most MAX_STRING");
    Ok([&length.to_be_bytes(), text.as_bytes()].concat())
}
