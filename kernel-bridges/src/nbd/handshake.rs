//! The fixed newstyle handshake: a client finds an export and agrees with the server on how they will talk.
//!
//! One option after the other is read and answered. Malformed ones get an error and the client may go on; what breaks the framing
//! ends the connection. An option longer than [`MAX_OPTION`] is read past and refused, so a client costs no more memory than that.

use std::io;
use std::rc::Rc;
use std::sync::Arc;

use stord_block::drivers::protocol::nbd::wire::{
    ExportInfo, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Greeting, INIT_MAGIC, InfoKind, MAX_STRING,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionKind, OptionReply, OptionReplyHeader,
    TransmissionFlags,
};
use stord_credentials::Credentials;
use stord_credentials::tls::{TlsCredentials, TlsSession};
use stord_qmp::Error;
use zerocopy::{FromZeros as _, IntoBytes};

use super::channel::Channel;
use super::export::{NbdExport, Presentation};
use super::reply::Style;

/// The longest option that is looked at, in bytes.
const MAX_OPTION: usize = 64 << 10;
/// Zeroes after the answer to `EXPORT_NAME`.
const RESERVED: [u8; 124] = [0; 124];

/// What the handshake needs to know of the server.
pub(super) trait Offer {
    /// The exports, in their order.
    fn exports(&self) -> Vec<Rc<NbdExport>>;
    /// Whether more than one client may come at a time.
    fn is_shared(&self) -> bool;
    /// What TLS is spoken with, if it has to be.
    fn security(&self) -> Option<&Security>;
}

/// What makes a server secure.
pub(crate) struct Security {
    pub(crate) tls: Arc<TlsCredentials>,
    /// The id of the rule that says who may come, if there is one.
    pub(crate) authorization: Option<String>,
    /// Where the rule is found.
    pub(crate) credentials: Arc<Credentials>,
}

impl Security {
    /// Whether the client may come.
    fn authorize(&self, session: Option<&TlsSession>) -> Result<(), Error> {
        match (&self.authorization, session) {
            (Some(rule), Some(session)) => session.authorize(rule, &self.credentials),
            _ => Ok(()),
        }
    }
}

/// How a client and the server talk after the handshake.
#[derive(Clone, Debug)]
pub(super) struct Manner {
    /// How replies look.
    pub(super) style: Style,
    /// The metadata contexts that block status tells of.
    pub(super) contexts: Vec<MetaContext>,
}

impl Manner {
    /// How those talk who know the first version of the protocol only.
    pub(super) fn simple() -> Self {
        Self {
            style: Style::Simple,
            contexts: Vec::new(),
        }
    }
}

/// What a metadata context is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MetaContext {
    /// What is allocated.
    Allocation,
    /// How deep in the backing chain it lies.
    Depth,
    /// What a dirty bitmap of the export has marked, by its place in the export's list.
    Bitmap(u32),
}

impl MetaContext {
    /// Its number on the wire, the same for every client.
    pub(super) fn id(self) -> u32 {
        match self {
            Self::Allocation => 0,
            Self::Depth => 1,
            Self::Bitmap(index) => 2 + index,
        }
    }
}

/// The result of a handshake.
pub(super) struct Agreement {
    pub(super) channel: Channel,
    pub(super) export: Rc<NbdExport>,
    pub(super) manner: Manner,
}

/// Whether the handshake goes on after an option.
enum Next {
    Option,
    Transmission(Rc<NbdExport>),
    End,
}

struct Handshake<'a> {
    channel: Channel,
    offer: &'a dyn Offer,
    /// The client reads past the zeroes.
    no_zeroes: bool,
    style: Style,
    /// The export that metadata contexts were chosen for, and which.
    chosen: Option<(String, Vec<MetaContext>)>,
}

fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Talks with a client until it has chosen an export; `None` when it wanted none.
///
/// # Errors
/// The client broke off or does not speak NBD.
pub(super) async fn negotiate(
    mut channel: Channel,
    offer: &dyn Offer,
) -> io::Result<Option<Agreement>> {
    let greeting = Greeting {
        init: INIT_MAGIC.into(),
        option: OPTION_MAGIC.into(),
        flags: (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).into(),
    };
    channel.write(greeting.as_bytes()).await?;
    let mut flags = [0; 4];
    channel.read(&mut flags).await?;
    let flags = u32::from_be_bytes(flags);
    let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    if flags & !known != 0 {
        return Err(broken("unknown client flags"));
    }
    let is_fixed = flags & u32::from(FLAG_FIXED_NEWSTYLE) != 0;
    let mut handshake = Handshake {
        channel,
        offer,
        no_zeroes: flags & u32::from(FLAG_NO_ZEROES) != 0,
        style: Style::Simple,
        chosen: None,
    };
    loop {
        match handshake.option(is_fixed).await? {
            Next::Option => {}
            Next::End => return Ok(None),
            Next::Transmission(export) => {
                let contexts = match handshake.chosen.take() {
                    Some((name, contexts)) if name == export.name() => contexts,
                    _ => Vec::new(),
                };
                return Ok(Some(Agreement {
                    channel: handshake.channel,
                    export,
                    manner: Manner {
                        style: handshake.style,
                        contexts,
                    },
                }));
            }
        }
    }
}

impl Handshake<'_> {
    /// Reads one option and answers it.
    async fn option(&mut self, is_fixed: bool) -> io::Result<Next> {
        let mut header = OptionHeader::new_zeroed();
        self.channel.read(header.as_mut_bytes()).await?;
        if header.magic.get() != OPTION_MAGIC {
            return Err(broken("bad magic of an option"));
        }
        let (number, length) = (header.kind.get(), header.length.get());
        let kind = OptionKind::from_number(number);
        if !is_fixed && kind != Some(OptionKind::ExportName) {
            return Err(broken(
                "an option other than EXPORT_NAME without the fixed newstyle handshake",
            ));
        }
        let length = match usize::try_from(length) {
            Ok(length) if length <= MAX_OPTION => length,
            _ => {
                self.channel.skip(length.into()).await?;
                let reply = if kind.is_some() {
                    OptionReply::TooBig
                } else {
                    OptionReply::Unsupported
                };
                self.refuse(number, reply, "option is too long").await?;
                return Ok(Next::Option);
            }
        };
        let mut data = vec![0; length];
        self.channel.read(&mut data).await?;
        if self.is_too_early(kind) {
            if kind == Some(OptionKind::ExportName) {
                return Err(broken("EXPORT_NAME without TLS"));
            }
            let text = "this server requires TLS";
            self.refuse(number, OptionReply::TlsRequired, text).await?;
            return Ok(Next::Option);
        }
        let Some(kind) = kind else {
            self.refuse(number, OptionReply::Unsupported, "unsupported option")
                .await?;
            return Ok(Next::Option);
        };
        self.answer(kind, &data).await
    }

    async fn answer(&mut self, kind: OptionKind, data: &[u8]) -> io::Result<Next> {
        let bare = matches!(
            kind,
            OptionKind::List
                | OptionKind::StartTls
                | OptionKind::StructuredReply
                | OptionKind::ExtendedHeaders
        );
        if bare && !data.is_empty() {
            self.refuse(
                kind.number(),
                OptionReply::Invalid,
                "option should have zero length",
            )
            .await?;
            return Ok(Next::Option);
        }
        match kind {
            OptionKind::ExportName => return self.export_name(data).await.map(Next::Transmission),
            OptionKind::Abort => {
                // The client may have gone already.
                let _ = self.acknowledge(kind).await;
                return Ok(Next::End);
            }
            OptionKind::List => self.list().await?,
            OptionKind::StartTls => self.start_tls().await?,
            OptionKind::Info | OptionKind::Go => {
                if let Some(export) = self.info(kind, data).await?
                    && kind == OptionKind::Go
                {
                    return Ok(Next::Transmission(export));
                }
            }
            OptionKind::StructuredReply => match self.style {
                Style::Simple => {
                    self.style = Style::Structured;
                    self.acknowledge(kind).await?;
                }
                Style::Structured => {
                    let text = "structured reply already negotiated";
                    self.refuse(kind.number(), OptionReply::Invalid, text)
                        .await?;
                }
                Style::Extended => {
                    let text = "extended headers already negotiated";
                    self.refuse(kind.number(), OptionReply::ExtendedHeadersRequired, text)
                        .await?;
                }
            },
            OptionKind::ExtendedHeaders => {
                if self.style == Style::Extended {
                    let text = "extended headers already negotiated";
                    self.refuse(kind.number(), OptionReply::Invalid, text)
                        .await?;
                } else {
                    self.style = Style::Extended;
                    self.acknowledge(kind).await?;
                }
            }
            OptionKind::ListMetaContext | OptionKind::SetMetaContext => {
                self.meta_context(kind, data).await?;
            }
        }
        Ok(Next::Option)
    }

    async fn start_tls(&mut self) -> io::Result<()> {
        let kind = OptionKind::StartTls;
        let Some(security) = self.offer.security() else {
            return self
                .refuse(kind.number(), OptionReply::Policy, "TLS not configured")
                .await;
        };
        if self.channel.tls().is_some() {
            let text = "TLS already enabled";
            return self.refuse(kind.number(), OptionReply::Invalid, text).await;
        }
        let session = security.tls.server_session().map_err(io::Error::other)?;
        self.acknowledge(kind).await?;
        self.channel.start_tls(session).await?;
        security
            .authorize(self.channel.tls())
            .map_err(io::Error::other)?;
        // What was agreed on in the clear is forgotten.
        self.style = Style::Simple;
        self.chosen = None;
        Ok(())
    }

    /// Whether an option has to wait until TLS is spoken.
    fn is_too_early(&self, kind: Option<OptionKind>) -> bool {
        self.offer.security().is_some()
            && self.channel.tls().is_none()
            && !matches!(kind, Some(OptionKind::StartTls | OptionKind::Abort))
    }

    /// The old way into transmission, in which only hanging up can say no.
    async fn export_name(&mut self, data: &[u8]) -> io::Result<Rc<NbdExport>> {
        if self.style == Style::Extended {
            return Err(broken("EXPORT_NAME after extended headers"));
        }
        let name = std::str::from_utf8(data).map_err(|_| broken("a name that is not UTF-8"))?;
        let export = self.find(name).ok_or_else(|| broken("no such export"))?;
        let Presentation { size, flags, .. } = self.present(&export);
        let mut answer = export_info(size, flags).as_bytes().to_vec();
        if !self.no_zeroes {
            answer.extend_from_slice(&RESERVED);
        }
        self.channel.write(&answer).await?;
        Ok(export)
    }

    async fn list(&mut self) -> io::Result<()> {
        for export in self.offer.exports() {
            let mut data = string(export.name());
            data.extend_from_slice(export.description().unwrap_or_default().as_bytes());
            self.reply(OptionKind::List.number(), OptionReply::Server, &data)
                .await?;
        }
        self.acknowledge(OptionKind::List).await
    }

    /// Describes an export, if there is one of that name.
    async fn info(&mut self, kind: OptionKind, data: &[u8]) -> io::Result<Option<Rc<NbdExport>>> {
        let number = kind.number();
        let Some((name, wanted)) = parse_info(data) else {
            self.refuse(number, OptionReply::Invalid, "malformed option")
                .await?;
            return Ok(None);
        };
        let Some(export) = self.find(name) else {
            let text = format!("export '{name}' not present");
            self.refuse(number, OptionReply::Unknown, &text).await?;
            return Ok(None);
        };
        let mut pieces = Vec::new();
        if wanted.contains(&InfoKind::Name.number()) {
            pieces.push((InfoKind::Name, export.name().as_bytes().to_vec()));
        }
        if wanted.contains(&InfoKind::Description.number())
            && let Some(description) = export.description()
        {
            pieces.push((InfoKind::Description, description.as_bytes().to_vec()));
        }
        let Presentation {
            size,
            flags,
            mut block_size,
        } = self.present(&export);
        // A client that does not ask for the constraint does not know it, and is helped to keep none.
        if kind == OptionKind::Go && !wanted.contains(&InfoKind::BlockSize.number()) {
            block_size.minimum = 1.into();
        }
        pieces.push((InfoKind::BlockSize, block_size.as_bytes().to_vec()));
        pieces.push((
            InfoKind::Export,
            export_info(size, flags).as_bytes().to_vec(),
        ));
        for (piece, bytes) in pieces {
            let mut data = piece.number().to_be_bytes().to_vec();
            data.extend_from_slice(&bytes);
            self.reply(number, OptionReply::Info, &data).await?;
        }
        self.acknowledge(kind).await?;
        Ok(Some(export))
    }

    async fn meta_context(&mut self, kind: OptionKind, data: &[u8]) -> io::Result<()> {
        let number = kind.number();
        let is_choice = kind == OptionKind::SetMetaContext;
        if is_choice {
            self.chosen = None;
        }
        if self.style == Style::Simple {
            let text = "request option when structured reply is not negotiated";
            return self.refuse(number, OptionReply::Invalid, text).await;
        }
        let Some((name, queries)) = parse_queries(data) else {
            return self
                .refuse(number, OptionReply::Invalid, "malformed option")
                .await;
        };
        let Some(export) = self.find(name) else {
            let text = format!("export '{name}' not present");
            return self.refuse(number, OptionReply::Unknown, &text).await;
        };
        let is_wanted = |(_, name): &(MetaContext, String)| {
            if is_choice {
                queries.contains(&name.as_str())
            } else {
                queries.is_empty() || queries.iter().any(|query| lists(query, name))
            }
        };
        let found: Vec<_> = export.contexts().into_iter().filter(is_wanted).collect();
        for (context, name) in &found {
            // The number means nothing in a list.
            let id = if is_choice { context.id() } else { 0 };
            let mut data = id.to_be_bytes().to_vec();
            data.extend_from_slice(name.as_bytes());
            self.reply(number, OptionReply::MetaContext, &data).await?;
        }
        self.acknowledge(kind).await?;
        if is_choice {
            let contexts = found.into_iter().map(|(context, _)| context).collect();
            self.chosen = Some((export.name().to_owned(), contexts));
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Option<Rc<NbdExport>> {
        let mut exports = self.offer.exports().into_iter();
        exports.find(|export| export.name() == name)
    }

    fn present(&self, export: &NbdExport) -> Presentation {
        let mut presentation = export.present(self.offer.is_shared());
        if self.style != Style::Simple {
            presentation.flags |= TransmissionFlags::SEND_DF;
        }
        if self.style == Style::Extended && self.chosen.is_some() {
            presentation.flags |= TransmissionFlags::BLOCK_STATUS_PAYLOAD;
        }
        presentation
    }

    async fn acknowledge(&mut self, kind: OptionKind) -> io::Result<()> {
        self.reply(kind.number(), OptionReply::Ack, &[]).await
    }

    async fn refuse(&mut self, option: u32, reply: OptionReply, text: &str) -> io::Result<()> {
        tracing::debug!(option, text, "NBD option refused");
        self.reply(option, reply, text.as_bytes()).await
    }

    async fn reply(&mut self, option: u32, reply: OptionReply, data: &[u8]) -> io::Result<()> {
        let header = OptionReplyHeader {
            magic: OPTION_REPLY_MAGIC.into(),
            option: option.into(),
            reply: reply.number().into(),
            length: u32::try_from(data.len())
                .map_err(|_| broken("a reply that is too long"))?
                .into(),
        };
        self.channel
            .write(&[header.as_bytes(), data].concat())
            .await
    }
}

fn export_info(size: u64, flags: TransmissionFlags) -> ExportInfo {
    ExportInfo {
        size: size.into(),
        flags: flags.bits().into(),
    }
}

fn string(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).expect("names are short");
    [&length.to_be_bytes(), text.as_bytes()].concat()
}

/// Takes a number of 32 bits from the front.
fn take_u32(data: &mut &[u8]) -> Option<u32> {
    let (front, rest) = data.split_first_chunk()?;
    *data = rest;
    Some(u32::from_be_bytes(*front))
}

/// Takes a string with its length in front.
fn take_string<'a>(data: &mut &'a [u8]) -> Option<&'a str> {
    let length = usize::try_from(take_u32(data)?).ok()?;
    if length > MAX_STRING {
        return None;
    }
    let (front, rest) = data.split_at_checked(length)?;
    *data = rest;
    std::str::from_utf8(front).ok()
}

/// The name and the pieces asked for by `INFO` and `GO`.
fn parse_info(mut data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let name = take_string(&mut data)?;
    let (count, rest) = data.split_first_chunk()?;
    let count = usize::from(u16::from_be_bytes(*count));
    if rest.len() != count * 2 {
        return None;
    }
    let number = |pair: &[u8]| u16::from_be_bytes([pair[0], pair[1]]);
    Some((name, rest.chunks_exact(2).map(number).collect()))
}

/// The name and the queries of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
fn parse_queries(mut data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let name = take_string(&mut data)?;
    let count = take_u32(&mut data)?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(take_string(&mut data)?);
    }
    data.is_empty().then_some((name, queries))
}

/// Whether a query of a list covers a context: its name, or a namespace of it.
fn lists(query: &str, name: &str) -> bool {
    query == name || (query.ends_with(':') && name.starts_with(query))
}

#[cfg(test)]
mod tests {
    use super::*;
    use stord_block::drivers::protocol::nbd::wire::{ALLOCATION_DEPTH, BASE_ALLOCATION};

    #[test]
    fn malformed_options_are_seen() {
        let mut good = string("disk");
        good.extend_from_slice(&[0, 1, 0, 3]);
        assert_eq!(parse_info(&good), Some(("disk", vec![3])));
        for end in 0..good.len() {
            assert_eq!(parse_info(&good[..end]), None, "{end} bytes");
        }
        good.push(0);
        assert_eq!(parse_info(&good), None);
        // A count that promises more than there is costs nothing.
        let mut queries = string("disk");
        queries.extend_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(parse_queries(&queries), None);
        assert_eq!(parse_info(&u32::MAX.to_be_bytes()), None);
    }

    #[test]
    fn queries_name_contexts_or_their_namespace() {
        assert!(lists("base:", BASE_ALLOCATION));
        assert!(lists("base:allocation", BASE_ALLOCATION));
        assert!(lists("qemu:", ALLOCATION_DEPTH));
        assert!(!lists("base", BASE_ALLOCATION));
        assert!(!lists("qemu:", BASE_ALLOCATION));
        assert!(!lists("base:alloc", BASE_ALLOCATION));
    }
}
