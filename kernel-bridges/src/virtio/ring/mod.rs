//! Virtqueues: how a driver hands requests to a device and gets them back.

pub(crate) mod chain;
pub(crate) mod split;

use super::memory::Fault;

/// A rule of the ring that the driver broke. The queue serves no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    /// 2.7: a power of two, at most 32768.
    #[error("a queue of {0} descriptors")]
    Size(u16),
    /// 2.7: the parts of the ring begin at multiples of 16, 2 and 4.
    #[error("a part of the ring begins at an odd address")]
    Alignment,
    /// 2.7.13.3: the index counts entries, of which there are no more than descriptors.
    #[error("the available index went from {from} to {to} in a queue of {size}")]
    AvailableIndex {
        /// The next entry.
        from: u16,
        /// What the driver says.
        to: u16,
        /// The number of descriptors.
        size: u16,
    },
    /// A descriptor that does not exist.
    #[error("descriptor {0} does not exist")]
    Descriptor(u16),
    /// The driver made a chain available that it has not got back yet.
    #[error("descriptor {0} is under way already")]
    Twice(u16),
    /// 2.7.5.2: more descriptors than there can be, or a loop of them.
    #[error("a chain of descriptors does not end")]
    Endless,
    /// 2.7.5.3.1: a table in a table, one without the feature, or one that is not the last of its chain.
    #[error("an indirect descriptor where none may be")]
    Indirect,
    /// 2.7.5.3: a table is some descriptors long, and not too many.
    #[error("a table of descriptors of {0} bytes")]
    Table(u32),
    /// 2.7.4.2: what the device reads comes before what it writes.
    #[error("a descriptor to read from after one to write to")]
    Order,
    /// A descriptor of no bytes.
    #[error("an empty descriptor")]
    Empty,
    /// 2.7.5: a chain is at most 2^32 bytes long.
    #[error("a chain of more than 2^32 bytes")]
    Length,
    /// The driver named memory that is not there.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// 5.2.6: a request has a header of 16 bytes to read.
    #[error("a request without a whole header")]
    Header,
    /// 5.2.6: a request has a status byte to write.
    #[error("a request without room for its status")]
    Status,
}
