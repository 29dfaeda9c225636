//! Attributes of netlink messages: a length, a type and a payload each, padded to four bytes.

/// The header of an attribute.
const HEADER: usize = 4;
/// Bits of the type that say something about the payload.
const FLAGS: u16 = 0xc000;

/// An attribute to send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attribute<'a> {
    kind: u16,
    payload: Payload<'a>,
}

/// What an attribute says.
#[derive(Clone, Copy, Debug)]
pub(super) enum Payload<'a> {
    /// Text, with a zero byte behind it.
    Text(&'a str),
    #[cfg(test)]
    U16(u16),
    #[cfg(test)]
    U32(u32),
}

impl<'a> Attribute<'a> {
    pub(super) fn new(kind: u16, payload: Payload<'a>) -> Self {
        Self { kind, payload }
    }

    pub(super) fn append_to(&self, message: &mut Vec<u8>) {
        let payload = match self.payload {
            Payload::Text(text) => [text.as_bytes(), &[0]].concat(),
            #[cfg(test)]
            Payload::U16(number) => number.to_ne_bytes().to_vec(),
            #[cfg(test)]
            Payload::U32(number) => number.to_ne_bytes().to_vec(),
        };
        let length = u16::try_from(HEADER + payload.len()).expect("names are short");
        message.extend(length.to_ne_bytes());
        message.extend(self.kind.to_ne_bytes());
        message.extend(payload);
        message.resize(message.len().next_multiple_of(4), 0);
    }
}

/// The attributes of a received message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The attributes in their order, as far as they are whole.
    fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (head, _) = rest.split_first_chunk::<HEADER>()?;
            let [length @ .., _, _] = *head;
            let [_, _, kind @ ..] = *head;
            let length = usize::from(u16::from_ne_bytes(length));
            let payload = rest.get(HEADER..length)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
            Some((u16::from_ne_bytes(kind) & !FLAGS, payload))
        })
    }

    pub(super) fn bytes(self, kind: u16) -> Option<&'a [u8]> {
        let found = self.iter().find(|(other, _)| *other == kind);
        found.map(|(_, payload)| payload)
    }

    pub(super) fn text(self, kind: u16) -> Option<String> {
        let bytes = self.bytes(kind)?;
        let text = bytes.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(text).into_owned())
    }

    pub(super) fn u16(self, kind: u16) -> Option<u16> {
        Some(u16::from_ne_bytes(self.bytes(kind)?.try_into().ok()?))
    }

    pub(super) fn u32(self, kind: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(self.bytes(kind)?.try_into().ok()?))
    }

    pub(super) fn u64(self, kind: u16) -> Option<u64> {
        Some(u64::from_ne_bytes(self.bytes(kind)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_found_again() {
        let mut message = Vec::new();
        Attribute::new(4, Payload::Text("disk")).append_to(&mut message);
        Attribute::new(8, Payload::U16(256)).append_to(&mut message);
        Attribute::new(5, Payload::U32(2)).append_to(&mut message);
        assert_eq!(message.len(), 12 + 8 + 8);
        assert_eq!(
            message[..4],
            [9u16.to_ne_bytes(), 4u16.to_ne_bytes()].concat()
        );
        let attributes = Attributes::new(&message);
        assert_eq!(attributes.text(4).as_deref(), Some("disk"));
        assert_eq!(attributes.u16(8), Some(256));
        assert_eq!(attributes.u32(5), Some(2));
        assert_eq!(attributes.u64(5), None);
        assert_eq!(attributes.u32(6), None);
    }

    #[test]
    fn broken_attributes_end_the_list() {
        for bytes in [
            &[][..],
            &[1, 0],
            &[0, 0, 4, 0, 1, 2],
            &[200, 0, 4, 0, 1, 2],
            &[3, 0, 4, 0, 1],
        ] {
            assert_eq!(Attributes::new(bytes).bytes(4), None, "{bytes:?}");
        }
    }
}
