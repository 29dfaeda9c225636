//! The handshake of RFC 6455, section 4.2: a request of HTTP, and the answer to it.

use openssl::sha::sha1;
use stord_qmp::base64;

/// The most bytes that a request may have.
const REQUEST_MAX: usize = 8192;

/// What the client's key is joined with (1.3).
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// The protocol that is spoken inside.
const PROTOCOL: &str = "binary";

/// A request that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The status of HTTP.
    pub status: &'static str,
    /// What is wrong.
    pub reason: &'static str,
}

const fn bad(reason: &'static str) -> Refusal {
    Refusal {
        status: "400 Bad Request",
        reason,
    }
}

impl Refusal {
    /// What the client is told.
    pub fn answer(&self) -> String {
        let Self { status, reason } = self;
        let length = reason.len() + 1;
        format!(
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: text/plain\r\n\
             Content-Length: {length}\r\nSec-WebSocket-Version: 13\r\n\r\n{reason}\n"
        )
    }
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    start: &'a str,
    headers: &'a str,
}

impl<'a> Request<'a> {
    /// The request that the bytes start with, once it is complete, and its length.
    ///
    /// # Errors
    /// It is too long, or no text.
    pub fn parse(bytes: &'a [u8]) -> Result<Option<(Self, usize)>, Refusal> {
        let end = bytes.windows(4).position(|bytes| bytes == b"\r\n\r\n");
        let Some(end) = end.filter(|end| *end <= REQUEST_MAX) else {
            return match bytes.len() > REQUEST_MAX {
                true => Err(bad("the request is too long")),
                false => Ok(None),
            };
        };
        let text = bytes
            .get(..end)
            .and_then(|text| std::str::from_utf8(text).ok());
        let text = text.ok_or(bad("the request is no text"))?;
        let (start, headers) = text.split_once("\r\n").unwrap_or((text, ""));
        Ok(Some((Self { start, headers }, end + 4)))
    }

    /// What to answer.
    ///
    /// # Errors
    /// The client does not ask for a WebSocket, or for one that is not spoken here.
    pub fn answer(&self) -> Result<String, Refusal> {
        let mut words = self.start.split(' ');
        if (words.next(), words.next_back()) != (Some("GET"), Some("HTTP/1.1")) {
            return Err(bad("only GET of HTTP/1.1 is understood"));
        }
        if words.next() != Some("/") || words.next().is_some() {
            return Err(Refusal {
                status: "404 Not Found",
                reason: "there is nothing but /",
            });
        }
        if self.header("Host").next().is_none() {
            return Err(bad("the Host is missing"));
        }
        if !self.lists("Upgrade", "websocket") || !self.lists("Connection", "upgrade") {
            return Err(bad("this is for WebSocket only"));
        }
        if self.header("Sec-WebSocket-Version").next() != Some("13") {
            return Err(Refusal {
                status: "426 Upgrade Required",
                reason: "only version 13 of WebSocket is understood",
            });
        }
        let key = self.header("Sec-WebSocket-Key").next();
        let key = key.filter(|key| base64::decode(key).is_ok_and(|key| key.len() == 16));
        let key = key.ok_or(bad(
            "the Sec-WebSocket-Key is missing or not 16 bytes in base64",
        ))?;
        let accepted = base64::encode(&sha1(format!("{key}{GUID}").as_bytes()));
        let mut answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {accepted}\r\n"
        );
        if self.header("Sec-WebSocket-Protocol").next().is_some() {
            if !self.lists("Sec-WebSocket-Protocol", PROTOCOL) {
                return Err(bad("only the protocol 'binary' is spoken"));
            }
            answer.push_str(&format!("Sec-WebSocket-Protocol: {PROTOCOL}\r\n"));
        }
        answer.push_str("\r\n");
        Ok(answer)
    }

    /// The values of a header.
    fn header(&self, name: &str) -> impl Iterator<Item = &'a str> {
        let lines = self.headers.split("\r\n");
        let pairs = lines.filter_map(|line| line.split_once(':'));
        pairs
            .filter(move |(found, _)| found.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim())
    }

    /// Whether a header that is a list contains a word.
    fn lists(&self, name: &str, word: &str) -> bool {
        let mut words = self.header(name).flat_map(|value| value.split(','));
        words.any(|found| found.trim().eq_ignore_ascii_case(word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "GET / HTTP/1.1\r\nHost: example.org\r\nUpgrade: websocket\r\n\
        Connection: keep-alive, Upgrade\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
        Sec-WebSocket-Protocol: chat, binary\r\nSec-WebSocket-Version: 13\r\n\r\n";

    fn answer(text: &str) -> Result<String, Refusal> {
        match Request::parse(text.as_bytes())? {
            Some((request, length)) => {
                assert_eq!(length, text.len());
                request.answer()
            }
            None => panic!("not complete: {text}"),
        }
    }

    #[test]
    fn key_is_answered_as_in_the_specification() {
        let answered = answer(GOOD).expect("it is good");
        assert!(answered.starts_with("HTTP/1.1 101 "), "{answered}");
        assert!(answered.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
        assert!(answered.ends_with("Sec-WebSocket-Protocol: binary\r\n\r\n"));
        let plain = GOOD.replace("Sec-WebSocket-Protocol: chat, binary\r\n", "");
        let answered = answer(&plain).expect("no protocol need be named");
        assert!(!answered.contains("Protocol:"), "{answered}");
    }

    #[test]
    fn requests_for_something_else_are_refused() {
        for (from, to, status) in [
            ("GET", "POST", "400"),
            ("GET / HTTP/1.1", "GET /x HTTP/1.1", "404"),
            ("GET / HTTP/1.1", "GET / x HTTP/1.1", "404"),
            ("HTTP/1.1", "HTTP/1.0", "400"),
            ("Host:", "Most:", "400"),
            ("Upgrade: websocket", "Upgrade: h2c", "400"),
            ("keep-alive, Upgrade", "close", "400"),
            ("b25jZQ==", "", "400"),
            ("chat, binary", "chat", "400"),
            ("Version: 13", "Version: 8", "426"),
        ] {
            let refusal = answer(&GOOD.replacen(from, to, 1)).expect_err(to);
            assert!(refusal.status.starts_with(status), "{to}: {refusal:?}");
            assert!(
                refusal
                    .answer()
                    .ends_with(&format!("\r\n\r\n{}\n", refusal.reason))
            );
        }
        assert!(Request::parse(&[b'x'; REQUEST_MAX + 1]).is_err());
        assert!(Request::parse(b"\xff\r\n\r\n").is_err());
        assert!(Request::parse(b"GET / HTTP/1.1\r\n").is_ok_and(|request| request.is_none()));
    }
}
