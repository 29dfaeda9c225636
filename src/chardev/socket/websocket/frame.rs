//! The frames of RFC 6455, section 5: those of clients are decoded as they come, however they are
//! cut, and anything that the section forbids them is refused; those of the server are encoded.

/// The most bytes that a control frame carries (5.5).
const CONTROL_MAX: usize = 125;

/// What a frame is (5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opcode {
    /// More of a message.
    Continuation = 0,
    /// The start of a message of bytes.
    Binary = 2,
    /// The last frame.
    Close = 8,
    /// To be answered.
    Ping = 9,
    /// An answer.
    Pong = 10,
}

/// Why a connection is closed (7.4.1).
pub mod close_code {
    /// All is said.
    pub const NORMAL: u16 = 1000;
    /// The other side does not keep to the protocol.
    pub const PROTOCOL_ERROR: u16 = 1002;
    /// The other side sends something that is not understood.
    pub const UNSUPPORTED: u16 = 1003;
}

/// What a client has done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Why the connection is closed.
    pub code: u16,
    /// The same in words.
    pub reason: &'static str,
}

/// Decodes the frames of a client.
#[derive(Debug, Default)]
pub struct Decoder {
    /// What has come of a frame's header.
    header: Vec<u8>,
    frame: Option<Frame>,
    /// Whether more of the present message is to come.
    is_inside_message: bool,
    has_closed: bool,
}

/// A frame whose content is coming.
#[derive(Debug)]
struct Frame {
    opcode: Opcode,
    mask: [u8; 4],
    left: u64,
    /// Which byte of the mask is next.
    turn: usize,
    /// The content of a control frame so far.
    control: Vec<u8>,
}

impl Decoder {
    /// Takes in bytes: content goes to `data`, control frames to `control`. Nothing is taken in
    /// after the last frame, or after a violation.
    ///
    /// # Errors
    /// The client does not keep to the protocol.
    pub fn decode(
        &mut self,
        mut bytes: &[u8],
        data: &mut Vec<u8>,
        control: &mut Vec<(Opcode, Vec<u8>)>,
    ) -> Result<(), Violation> {
        while !self.has_closed {
            let mut frame = match self.frame.take() {
                Some(frame) => frame,
                None => {
                    let Some((&next, rest)) = bytes.split_first() else {
                        return Ok(());
                    };
                    self.header.push(next);
                    bytes = rest;
                    match self.frame_of_header() {
                        Ok(Some(frame)) => frame,
                        Ok(None) => continue,
                        Err(violation) => {
                            self.has_closed = true;
                            return Err(violation);
                        }
                    }
                }
            };
            let count = usize::try_from(frame.left).unwrap_or(usize::MAX);
            let (content, rest) = bytes.split_at(count.min(bytes.len()));
            bytes = rest;
            let is_data = matches!(frame.opcode, Opcode::Binary | Opcode::Continuation);
            let into = match is_data {
                true => &mut *data,
                false => &mut frame.control,
            };
            let mask = frame.mask.iter().cycle().skip(frame.turn);
            into.extend(content.iter().zip(mask).map(|(byte, mask)| byte ^ mask));
            frame.turn = (frame.turn + content.len()) % frame.mask.len();
            frame.left -= content.len() as u64;
            if frame.left > 0 {
                self.frame = Some(frame);
                return Ok(());
            }
            if !is_data {
                self.has_closed = frame.opcode == Opcode::Close;
                control.push((frame.opcode, frame.control));
            }
        }
        Ok(())
    }

    /// The frame, once its header is complete.
    fn frame_of_header(&mut self) -> Result<Option<Frame>, Violation> {
        let violation = |reason| {
            Err(Violation {
                code: close_code::PROTOCOL_ERROR,
                reason,
            })
        };
        let [first, second, rest @ ..] = &*self.header else {
            return Ok(None);
        };
        if first & 0x70 != 0 {
            return violation("a frame has reserved bits set");
        }
        if second & 0x80 == 0 {
            return violation("a frame is not masked");
        }
        let opcode = match first & 0x0f {
            0 => Opcode::Continuation,
            2 => Opcode::Binary,
            8 => Opcode::Close,
            9 => Opcode::Ping,
            10 => Opcode::Pong,
            _ => {
                return Err(Violation {
                    code: close_code::UNSUPPORTED,
                    reason: "a message is not binary",
                });
            }
        };
        let is_last = first & 0x80 != 0;
        let short = usize::from(second & 0x7f);
        match opcode {
            Opcode::Continuation if !self.is_inside_message => {
                return violation("a frame continues no message");
            }
            Opcode::Binary if self.is_inside_message => {
                return violation("a message starts inside another one");
            }
            Opcode::Continuation | Opcode::Binary => {}
            _ if !is_last || short > CONTROL_MAX => {
                return violation("a control frame is too long or in pieces");
            }
            _ => {}
        }
        let (length, mask) = match short {
            126 => rest.split_at_checked(2),
            127 => rest.split_at_checked(8),
            _ => Some((&[][..], rest)),
        }
        .unzip();
        let (Some(length), Some(mask)) = (length, mask) else {
            return Ok(None);
        };
        let Ok(mask) = mask.try_into() else {
            return Ok(None);
        };
        let left = match short {
            126 | 127 => length
                .iter()
                .fold(0_u64, |length, byte| length << 8 | u64::from(*byte)),
            short => short as u64,
        };
        if matches!(opcode, Opcode::Continuation | Opcode::Binary) {
            self.is_inside_message = !is_last;
        }
        self.header.clear();
        Ok(Some(Frame {
            opcode,
            mask,
            left,
            turn: 0,
            control: Vec::new(),
        }))
    }
}

/// Encodes a message of one frame.
pub fn encode(opcode: Opcode, content: &[u8], into: &mut Vec<u8>) {
    into.push(0x80 | opcode as u8);
    match (u8::try_from(content.len()), u16::try_from(content.len())) {
        (Ok(length @ ..=125), _) => into.push(length),
        (_, Ok(length)) => {
            into.push(126);
            into.extend(length.to_be_bytes());
        }
        _ => {
            into.push(127);
            into.extend((content.len() as u64).to_be_bytes());
        }
    }
    into.extend_from_slice(content);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client's frame.
    fn masked(first: u8, content: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        encode(Opcode::Binary, content, &mut frame);
        frame[0] = first;
        frame[1] |= 0x80;
        let at = frame.len() - content.len();
        let mask = [1, 2, 3, 4];
        frame.splice(at..at, mask);
        for (byte, mask) in frame[at + 4..].iter_mut().zip(mask.iter().cycle()) {
            *byte ^= mask;
        }
        frame
    }

    type Decoded = (Vec<u8>, Vec<(Opcode, Vec<u8>)>, Result<(), Violation>);

    fn decode(bytes: &[u8], piece: usize) -> Decoded {
        let mut decoder = Decoder::default();
        let (mut data, mut control) = (Vec::new(), Vec::new());
        let mut result = Ok(());
        for piece in bytes.chunks(piece) {
            result = result.and(decoder.decode(piece, &mut data, &mut control));
        }
        (data, control, result)
    }

    #[test]
    fn content_arrives_however_it_is_cut() {
        let long: Vec<u8> = (0..70_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let frames = [
            masked(0x82, b"abc"),
            masked(0x02, b"de"),
            masked(0x89, b"ping"),
            masked(0x00, b""),
            masked(0x80, &[7; 300]),
            masked(0x82, &long),
            masked(0x88, &[3, 232]),
            masked(0x82, b"never"),
        ]
        .concat();
        for piece in [1, 2, 13, 100_000] {
            let (data, control, result) = decode(&frames, piece);
            assert_eq!(data, [b"abcde", &[7; 300][..], &long].concat());
            let expected = [
                (Opcode::Ping, b"ping".to_vec()),
                (Opcode::Close, vec![3, 232]),
            ];
            assert_eq!((&*control, result), (&expected[..], Ok(())));
        }
    }

    #[test]
    fn what_clients_must_not_send_is_refused() {
        for (frame, code) in [
            (vec![0x82, 1, b'x'], 1002),
            (masked(0xc2, b"x"), 1002),
            (masked(0x80, b"x"), 1002),
            (masked(0x09, b"x"), 1002),
            (masked(0x89, &[0; 126]), 1002),
            ([masked(0x02, b"x"), masked(0x82, b"x")].concat(), 1002),
            (masked(0x81, b"text"), 1003),
            (masked(0x8b, b"x"), 1003),
        ] {
            let (_, _, result) = decode(&frame, 1);
            assert_eq!(result.map_err(|violation| violation.code), Err(code));
        }
    }
}
