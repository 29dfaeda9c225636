//! What a server may answer to a stream of requests, however odd: each whole request is answered once and in full, nothing else is.
//! Depends on nothing but the standard library; the fuzz targets use it too.

/// How requests and replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Simple,
    Structured,
    Extended,
}

/// A request that was sent whole.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    pub kind: u16,
    pub offset: u64,
    pub length: u64,
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const BLOCK_STATUS: u16 = 7;
const PAYLOAD_LEN: u16 = 1 << 5;
/// No payload is longer.
const MOST: u64 = 32 << 20;

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn size(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn count(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("short")
}

/// The requests that a server finds in a stream, up to `most`, each given a cookie of its own; the stream is cut behind them.
pub fn number_requests(style: Style, stream: &mut Vec<u8>, most: usize) -> Vec<Sent> {
    let (magic, header) = match style {
        Style::Simple | Style::Structured => (0x2560_9513, 28),
        Style::Extended => (0x21e4_1c71, 32),
    };
    let mut found = Vec::new();
    let mut at = 0;
    while found.len() < most && stream.len() - at >= header {
        let request = &mut stream[at..at + header];
        if number(&request[..4]) != magic {
            return found;
        }
        let flags = u16::from_be_bytes([request[4], request[5]]);
        let kind = u16::from_be_bytes([request[6], request[7]]);
        request[8..16].copy_from_slice(&(found.len() as u64).to_be_bytes());
        let (offset, length) = (number(&request[16..24]), number(&request[24..header]));
        let has_payload = kind == WRITE || (style == Style::Extended && flags & PAYLOAD_LEN != 0);
        let payload = if has_payload { length } else { 0 };
        if payload > MOST || kind == DISCONNECT {
            return found;
        }
        let end = at + header + size(payload);
        if end > stream.len() {
            return found;
        }
        found.push(Sent {
            kind,
            offset,
            length,
        });
        at = end;
    }
    stream.truncate(at);
    found
}

/// Looks whether the replies are what they may be.
///
/// # Errors
/// What is wrong with them.
pub fn judge(style: Style, sent: &[Sent], mut replies: &[u8]) -> Result<(), String> {
    let mut answered = vec![false; sent.len()];
    let mut received = vec![0; sent.len()];
    while !replies.is_empty() {
        let header_size = match style {
            Style::Simple => 16,
            Style::Structured => 20,
            Style::Extended => 32,
        };
        let (header, rest) = replies
            .split_at_checked(header_size)
            .ok_or("a header that is cut off")?;
        let cookie = size(number(&header[8..16]));
        let request = sent
            .get(cookie)
            .ok_or_else(|| format!("cookie {cookie} was not given"))?;
        if answered[cookie] {
            return Err(format!("request {cookie} is answered twice"));
        }
        if style == Style::Simple {
            if number(&header[..4]) != 0x6744_6698 {
                return Err("a bad magic".to_owned());
            }
            answered[cookie] = true;
            let is_good = number(&header[4..8]) == 0;
            let data = if is_good && request.kind == READ {
                size(request.length)
            } else {
                0
            };
            replies = rest.get(data..).ok_or("data that is cut off")?;
            continue;
        }
        let (magic, flags, kind) = (
            number(&header[..4]),
            number(&header[4..6]),
            number(&header[6..8]),
        );
        if magic
            != if style == Style::Structured {
                0x668e_33ef
            } else {
                0x6e8a_278c
            }
        {
            return Err("a bad magic".to_owned());
        }
        let length = size(number(
            &header[if style == Style::Structured { 16 } else { 24 }..],
        ));
        let (body, rest) = rest
            .split_at_checked(length)
            .ok_or("a chunk that is cut off")?;
        replies = rest;
        let is_done = flags & 1 != 0;
        match kind {
            0 if is_done && body.is_empty() => {}
            1 | 2 if request.kind == READ && body.len() >= 8 => {
                let offset = number(&body[..8]);
                let extent = if kind == 1 {
                    body.len() as u64 - 8
                } else {
                    number(&body[8..])
                };
                if offset < request.offset
                    || offset.saturating_add(extent) > request.offset + request.length
                    || extent == 0
                {
                    return Err(format!(
                        "{extent} bytes from {offset} on are not asked for: {request:?}"
                    ));
                }
                received[cookie] += extent;
                if is_done && received[cookie] != request.length {
                    return Err(format!("{} bytes of {request:?}", received[cookie]));
                }
            }
            5 | 6 if request.kind == BLOCK_STATUS && (kind == 6) == (style == Style::Extended) => {
                if body.len() < 12 {
                    return Err("a block status without extents".to_owned());
                }
            }
            0x8001 if is_done && body.len() >= 6 && number(&body[..4]) != 0 => {}
            _ => return Err(format!("chunk {kind:#x} of {length} bytes for {request:?}")),
        }
        answered[cookie] = is_done;
    }
    match answered.iter().position(|answered| !answered) {
        Some(cookie) => Err(format!(
            "request {cookie} is not answered: {:?}",
            sent[cookie]
        )),
        None => Ok(()),
    }
}

/// The bytes of a client up to transmission over the export `name`, with `base:allocation` chosen where the style has it.
pub fn handshake(style: Style, name: &str) -> Vec<u8> {
    let option = |kind: u32, data: &[u8]| {
        [
            b"IHAVEOPT",
            &kind.to_be_bytes()[..],
            &count(data).to_be_bytes(),
            data,
        ]
        .concat()
    };
    let named = [&count(name.as_bytes()).to_be_bytes()[..], name.as_bytes()].concat();
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    if style != Style::Simple {
        bytes.extend(option(if style == Style::Structured { 8 } else { 11 }, &[]));
        let context = [
            &named[..],
            &1_u32.to_be_bytes(),
            &15_u32.to_be_bytes(),
            b"base:allocation",
        ]
        .concat();
        bytes.extend(option(10, &context));
    }
    bytes.extend(option(7, &[&named[..], &0_u16.to_be_bytes()].concat()));
    bytes
}

/// Reads past the server's part of [`handshake`].
///
/// # Errors
/// It is not as it should be, or the stream fails.
pub fn skip_handshake(stream: &mut impl std::io::Read) -> std::io::Result<()> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        let (option, reply) = (number(&header[8..12]), number(&header[12..16]));
        stream.read_exact(&mut vec![0; size(number(&header[16..20]))])?;
        if option == 7 && reply != 3 {
            let is_good = reply == 1;
            return is_good
                .then_some(())
                .ok_or_else(|| std::io::ErrorKind::InvalidData.into());
        }
    }
}

/// Looks whether what a server says in a handshake is well-formed, as far as it is one: the greeting, and replies to options that were sent.
///
/// # Errors
/// What is wrong with it.
pub fn judge_handshake(said: &[u8]) -> Result<(), String> {
    let Some(mut rest) = said.strip_prefix(b"NBDMAGICIHAVEOPT\0\x03") else {
        return Err("no greeting".to_owned());
    };
    while rest.len() >= 20 && number(&rest[..8]) == 0x0003_e889_0455_65a9 {
        let length = size(number(&rest[16..20]));
        if length > 16 << 10 {
            return Err(format!("a reply of {length} bytes"));
        }
        rest = rest.get(20 + length..).ok_or("a reply that is cut off")?;
    }
    Ok(())
}
