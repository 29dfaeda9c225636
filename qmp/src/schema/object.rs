//! Objects that users create: iothreads and the main loop's properties.

use crate::Qapi;

/// What `object-add` and `--object` create.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct ObjectOptions {
    /// The type and its properties.
    #[qapi(union = "qom-type")]
    pub kind: ObjectKind,
    /// The object's unique id.
    pub id: String,
}

/// A type of object and its properties.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union)]
pub enum ObjectKind {
    /// A thread that serves I/O.
    Iothread(IothreadProperties),
    /// The thread that serves everything else.
    MainLoop(EventLoopBaseProperties),
}

/// What every event loop has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct EventLoopBaseProperties {
    /// The most requests submitted in one batch; 0 leaves it to the daemon.
    pub aio_max_batch: Option<i64>,
    /// The fewest threads its blocking pool keeps.
    pub thread_pool_min: Option<i64>,
    /// The most threads its blocking pool starts.
    pub thread_pool_max: Option<i64>,
}

/// What an iothread has besides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct IothreadProperties {
    /// What every event loop has.
    #[qapi(flatten)]
    pub event_loop: EventLoopBaseProperties,
    /// The longest time to poll before sleeping, in nanoseconds; 0 does not poll.
    pub poll_max_ns: Option<i64>,
    /// The factor by which polling grows; 0 picks one.
    pub poll_grow: Option<i64>,
    /// The divisor by which polling shrinks; 0 resets it.
    pub poll_shrink: Option<i64>,
}

/// Arguments of `object-del`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ObjectDel {
    /// The object to remove.
    pub id: String,
}
