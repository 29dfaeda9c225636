//! Exports of block nodes.

use super::block::OnOffAuto;
use crate::Qapi;
use crate::schema::bitmap::BlockDirtyBitmapOrStr;
use crate::schema::socket::SocketAddress;

/// What `block-export-add` and `--export` create.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockExportOptions {
    /// The type of the export and its own options.
    #[qapi(union = "type")]
    pub kind: BlockExportKind,
    /// The export's unique id.
    pub id: String,
    /// Keep the export on its iothread although the node is elsewhere; default off.
    pub fixed_iothread: Option<bool>,
    /// The iothreads that serve the export; default several, chosen by the daemon.
    pub iothread: Option<BlockExportIothreads>,
    /// The exported node.
    pub node_name: String,
    /// Let users of the export write; default off.
    pub writable: Option<bool>,
    /// Complete writes only when they are on stable storage; default off.
    pub writethrough: Option<bool>,
    /// Let the node become inactive while exported; default off.
    pub allow_inactive: Option<bool>,
}

impl BlockExportOptions {
    /// An export of the given type with every common option at its default.
    pub fn new(kind: BlockExportKind, id: impl Into<String>, node_name: impl Into<String>) -> Self {
        Self {
            kind,
            id: id.into(),
            fixed_iothread: None,
            iothread: None,
            node_name: node_name.into(),
            writable: None,
            writethrough: None,
            allow_inactive: None,
        }
    }
}

/// A type of export and its own options.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union)]
pub enum BlockExportKind {
    /// A disk that clients of the NBD server see.
    Nbd(BlockExportOptionsNbd),
    /// A virtio disk for a virtual machine, over a socket.
    VhostUserBlk(BlockExportOptionsVhostUserBlk),
    /// A regular file in a file system of its own.
    Fuse(BlockExportOptionsFuse),
    /// A disk of this machine, `/dev/vdX`.
    VduseBlk(BlockExportOptionsVduseBlk),
}

/// Options of an NBD export.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct BlockExportOptionsNbd {
    /// The name that clients ask for; default the node's.
    pub name: Option<String>,
    /// What it is, for people; at most 4096 bytes.
    pub description: Option<String>,
    /// Dirty bitmaps that clients can see, as `qemu:dirty-bitmap:NAME`.
    pub bitmaps: Option<Vec<BlockDirtyBitmapOrStr>>,
    /// Let clients see how deep in the backing chain data lies, as `qemu:allocation-depth`; default off.
    pub allocation_depth: Option<bool>,
}

/// Options of a vhost-user-blk export.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockExportOptionsVhostUserBlk {
    /// Where virtual machines come: a Unix socket, or a descriptor of one that listens or is connected.
    pub addr: SocketAddress,
    /// The size of the disk's blocks in bytes, a power of two from 512 to 2097152; default 512.
    pub logical_block_size: Option<u64>,
    /// How many queues the disk has; default 1.
    pub num_queues: Option<u16>,
}

/// The iothreads of an export.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(alternate)]
pub enum BlockExportIothreads {
    /// One.
    Single(String),
    /// Several; the export's queues are spread over them.
    Multi(Vec<String>),
}

/// Options of a FUSE export.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockExportOptionsFuse {
    /// The regular file to mount over.
    pub mountpoint: String,
    /// Whether writes past the end make the node grow; default off.
    pub growable: Option<bool>,
    /// Whether other users may access the mount; default `auto`.
    pub allow_other: Option<FuseExportAllowOther>,
    /// Whether the kernel sends requests through io_uring; default `auto`, where it offers that.
    pub io_uring: Option<OnOffAuto>,
    /// How many queues serve the export, 1 to 64; default one for each iothread, or two.
    pub num_queues: Option<u16>,
    /// Whether the kernel reads the image's file by itself where nothing else has to see that; default `auto`, if the export is
    /// read-only.
    pub passthrough: Option<OnOffAuto>,
}

impl BlockExportOptionsFuse {
    /// An export over the file `mountpoint`, everything else by default.
    pub fn new(mountpoint: impl Into<String>) -> Self {
        Self {
            mountpoint: mountpoint.into(),
            growable: None,
            allow_other: None,
            io_uring: None,
            num_queues: None,
            passthrough: None,
        }
    }
}

/// Options of a VDUSE export.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockExportOptionsVduseBlk {
    /// The device's name in `/dev/vduse` and on the vdpa bus.
    pub name: String,
    /// How many queues the disk has; default 1.
    pub num_queues: Option<u16>,
    /// How many entries a queue has, a power of two from 2 to 1024; default 256.
    pub queue_size: Option<u16>,
    /// The size of the disk's blocks in bytes, a power of two from 512 to 2097152; default 512.
    pub logical_block_size: Option<u64>,
    /// The disk's serial number, of which 20 bytes count; default empty.
    pub serial: Option<String>,
    /// Whether the device is put on the vdpa bus, and taken off it at the end; default off.
    pub attach: Option<bool>,
}

impl BlockExportOptionsVduseBlk {
    /// A device of that name, everything else by default.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            num_queues: None,
            queue_size: None,
            logical_block_size: None,
            serial: None,
            attach: None,
        }
    }
}

/// Whether other users may access a FUSE export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum FuseExportAllowOther {
    /// No.
    Off,
    /// Yes, or fail.
    On,
    /// Yes where the host permits it.
    Auto,
}

/// The types of export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum BlockExportType {
    /// A disk that clients of the NBD server see.
    Nbd,
    /// A virtio disk for a virtual machine, over a socket.
    VhostUserBlk,
    /// A regular file in a file system of its own.
    Fuse,
    /// A disk of this machine, `/dev/vdX`.
    VduseBlk,
}

/// An export, as `query-block-exports` reports it.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockExportInfo {
    /// The id.
    pub id: String,
    /// The type.
    pub r#type: BlockExportType,
    /// The exported node.
    pub node_name: String,
    /// Whether it is going away and waits for its last user.
    pub shutting_down: bool,
    /// The block device of this machine that it is.
    pub device: Option<String>,
}

/// What becomes of an export's users when it is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum BlockExportRemoveMode {
    /// Nothing: the export stays if it has any.
    Safe,
    /// They are disconnected.
    Hard,
}

/// Arguments of `block-export-del`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockExportDel {
    /// The export to remove.
    pub id: String,
    /// What becomes of its users; default `safe`.
    pub mode: Option<BlockExportRemoveMode>,
}

/// Event: an export has become a block device of this machine.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(event = "BLOCK_EXPORT_ATTACHED")]
pub struct BlockExportAttached {
    /// The export's id.
    pub id: String,
    /// The block device's path, such as `/dev/vda`.
    pub device: String,
}

/// Event: an export is gone and its id is free.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(event = "BLOCK_EXPORT_DELETED")]
pub struct BlockExportDeleted {
    /// The export's id.
    pub id: String,
}
