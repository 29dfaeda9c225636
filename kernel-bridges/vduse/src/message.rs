//! What the kernel asks of a device, and the answers.
//!
//! The kernel waits for every answer, by default 30 seconds ([`Device::set_message_timeout`](crate::Device::set_message_timeout)); then it
//! gives the device up for good. Questions that a process left unanswered come again to the next that opens the device.

use zerocopy::{FromZeros, IntoBytes};

use crate::abi::{DevRequest, DevResponse};

const GET_VQ_STATE: u32 = 0;
const SET_STATUS: u32 = 1;
const UPDATE_IOTLB: u32 = 2;

const RESULT_OK: u32 = 0;
const RESULT_FAILED: u32 = 1;

/// `VIRTIO_CONFIG_S_DRIVER_OK`: the driver is ready, and so are its queues.
pub const STATUS_DRIVER_OK: u8 = 4;
/// `VIRTIO_CONFIG_S_FEATURES_OK`: the driver has chosen its features.
pub const STATUS_FEATURES_OK: u8 = 8;

/// A question of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// What the answer has to refer to.
    pub id: MessageId,
    /// The question.
    pub request: Request,
}

/// Which question an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MessageId(u32);

/// What the kernel wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// To know how far a queue is; answered with [`Response::QueueState`].
    GetQueueState {
        /// The queue.
        queue: u32,
    },
    /// The driver sets the device's status, bits of the virtio specification. 0 is a reset: once that is answered, the device must not
    /// touch the driver's memory any more, and every address it knew is void.
    SetStatus(u8),
    /// What is known of these addresses, from the first to the last, is void.
    UpdateIotlb {
        /// The first.
        start: u64,
        /// The last.
        last: u64,
    },
    /// Something that came after version 0 of the interface; to be answered with [`Response::Failed`].
    Unknown(u32),
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// It is done.
    Done,
    /// It could not be done.
    Failed,
    /// How far a queue is.
    QueueState(QueueState),
}

/// How far a queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueState {
    /// A split queue.
    Split {
        /// The index of the next entry of the available ring that the device looks at.
        next_available: u16,
    },
    /// A packed queue.
    Packed {
        /// The driver's wrap counter as the device saw it last.
        last_avail_counter: u16,
        /// The next descriptor that the device looks at.
        last_avail_index: u16,
        /// The device's wrap counter.
        last_used_counter: u16,
        /// The next descriptor that the device uses.
        last_used_index: u16,
    },
}

impl QueueState {
    /// The state as the union of linux/vduse.h has it.
    fn words(self) -> [u16; 4] {
        match self {
            Self::Split { next_available } => [next_available, 0, 0, 0],
            Self::Packed {
                last_avail_counter,
                last_avail_index,
                last_used_counter,
                last_used_index,
            } => [
                last_avail_counter,
                last_avail_index,
                last_used_counter,
                last_used_index,
            ],
        }
    }

    /// Reads the union, of which only the negotiated features tell what it is.
    pub(crate) fn read(words: [u16; 4], packed: bool) -> Self {
        let [first, second, third, fourth] = words;
        if packed {
            Self::Packed {
                last_avail_counter: first,
                last_avail_index: second,
                last_used_counter: third,
                last_used_index: fourth,
            }
        } else {
            Self::Split {
                next_available: first,
            }
        }
    }
}

impl Message {
    pub(crate) fn decode(request: &DevRequest) -> Self {
        let word = |at: usize| {
            let bytes = request.payload[at..at + 8].try_into();
            u64::from_ne_bytes(bytes.expect("eight bytes"))
        };
        let first = request.payload[..4].try_into().expect("four bytes");
        let request_of_kind = match request.kind {
            GET_VQ_STATE => Request::GetQueueState {
                queue: u32::from_ne_bytes(first),
            },
            SET_STATUS => Request::SetStatus(request.payload[0]),
            UPDATE_IOTLB => Request::UpdateIotlb {
                start: word(0),
                last: word(8),
            },
            other => Request::Unknown(other),
        };
        Self {
            id: MessageId(request.request_id),
            request: request_of_kind,
        }
    }
}

/// The answer as it is written; everything reserved in it is zero.
pub(crate) fn encode(id: MessageId, response: Response) -> DevResponse {
    let mut encoded = DevResponse::new_zeroed();
    encoded.request_id = id.0;
    encoded.result = match response {
        Response::Done | Response::QueueState(_) => RESULT_OK,
        Response::Failed => RESULT_FAILED,
    };
    if let Response::QueueState(state) = response {
        // Behind the queue's index, which nobody reads.
        encoded.payload[4..12].copy_from_slice(state.words().as_bytes());
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: u32, payload: &[u8]) -> DevRequest {
        let mut request = DevRequest::new_zeroed();
        request.kind = kind;
        request.request_id = 77;
        request.payload[..payload.len()].copy_from_slice(payload);
        request
    }

    #[test]
    fn messages_are_read_as_the_kernel_writes_them() {
        let decode = |kind, payload: &[u8]| Message::decode(&request(kind, payload)).request;
        assert_eq!(
            decode(0, &3u32.to_ne_bytes()),
            Request::GetQueueState { queue: 3 }
        );
        assert_eq!(decode(1, &[0xf]), Request::SetStatus(0xf));
        let range = [0x1000u64.to_ne_bytes(), u64::MAX.to_ne_bytes()].concat();
        assert_eq!(
            decode(2, &range),
            Request::UpdateIotlb {
                start: 0x1000,
                last: u64::MAX
            }
        );
        assert_eq!(decode(9, &[]), Request::Unknown(9));
    }

    #[test]
    fn answers_refer_to_their_message_and_have_zeroes_where_nothing_is() {
        let id = Message::decode(&request(1, &[])).id;
        let done = encode(id, Response::Done);
        assert_eq!((done.request_id, done.result), (77, 0));
        assert_eq!(done.reserved, [0; 4]);
        assert_eq!(done.payload, [0; 128]);
        assert_eq!(encode(id, Response::Failed).result, 1);
    }

    #[test]
    fn queue_state_is_behind_the_index() {
        let id = MessageId(1);
        let state = QueueState::Split {
            next_available: 0x1234,
        };
        let split = encode(id, Response::QueueState(state));
        assert_eq!(split.payload[4..6], 0x1234u16.to_ne_bytes());
        assert_eq!(split.payload[6..], [0; 122]);
        let state = QueueState::Packed {
            last_avail_counter: 1,
            last_avail_index: 2,
            last_used_counter: 3,
            last_used_index: 4,
        };
        let packed = encode(id, Response::QueueState(state));
        let words: Vec<u8> = [1u16, 2, 3, 4]
            .into_iter()
            .flat_map(u16::to_ne_bytes)
            .collect();
        assert_eq!(packed.payload[4..12], words);
        assert_eq!(QueueState::read([1, 2, 3, 4], true), state);
    }
}
