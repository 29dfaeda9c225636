//! Block nodes: how they are opened, referred to, resized and removed.

use crate::Qapi;
use crate::schema::socket::SocketAddress;

/// What `blockdev-add` and `--blockdev` open: a driver with its options, and what all nodes have.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockdevOptions {
    /// The driver and its own options.
    #[qapi(union = "driver")]
    pub driver: BlockdevDriver,
    /// The node's name; required at the root, made up elsewhere.
    pub node_name: Option<String>,
    /// What happens to discard requests; default `ignore`.
    pub discard: Option<BlockdevDiscardOptions>,
    /// How the host's page cache is used.
    pub cache: Option<BlockdevCacheOptions>,
    /// Whether the node's image may be used, rather than left to another process; default on.
    pub active: Option<bool>,
    /// Refuse writes; default off.
    pub read_only: Option<bool>,
    /// Fall back to read-only where writing is impossible; default off.
    pub auto_read_only: Option<bool>,
    /// Share the image with everybody, at the user's own risk; needs `read-only`.
    pub force_share: Option<bool>,
    /// Whether written zeroes are looked for and turned into zero requests; default `off`.
    pub detect_zeroes: Option<BlockdevDetectZeroesOptions>,
}

impl BlockdevOptions {
    /// A node of the given driver with every common option at its default.
    pub fn new(driver: BlockdevDriver) -> Self {
        Self {
            driver,
            node_name: None,
            discard: None,
            cache: None,
            active: None,
            read_only: None,
            auto_read_only: None,
            force_share: None,
            detect_zeroes: None,
        }
    }
}

impl BlockdevOptions {
    /// The same under a name.
    #[must_use]
    pub fn named(mut self, node_name: impl Into<String>) -> Self {
        self.node_name = Some(node_name.into());
        self
    }
}

/// A driver and its own options.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union)]
pub enum BlockdevDriver {
    /// Has the format below store compressed what is written.
    Compress(BlockdevOptionsGenericFormat),
    /// A regular file.
    File(BlockdevOptionsFile),
    /// A block device of the host.
    #[qapi(rename = "host_device")]
    HostDevice(BlockdevOptionsFile),
    /// A file or block device of the host, by io_uring.
    #[qapi(rename = "io_uring")]
    IoUring(BlockdevOptionsIoUring),
    /// A disk that an NBD server has.
    Nbd(BlockdevOptionsNbd),
    /// Discards what is written, completing later.
    NullAio(BlockdevOptionsNull),
    /// Discards what is written, in the context of the request.
    NullCo(BlockdevOptionsNull),
    /// A qcow2 image.
    Qcow2(BlockdevOptionsQcow2),
    /// The bytes of another node, or a part of them.
    Raw(BlockdevOptionsRaw),
    /// A disk that a vhost-user back end has.
    VirtioBlkVhostUser(BlockdevOptionsVirtioBlkVhostUser),
}

/// What happens to discard requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum BlockdevDiscardOptions {
    /// They are dropped.
    Ignore,
    /// They are passed on.
    Unmap,
}

/// Whether written zeroes are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum BlockdevDetectZeroesOptions {
    /// No.
    Off,
    /// Yes; they become zero requests.
    On,
    /// Yes; they become zero requests that may unmap.
    Unmap,
}

/// How the host's page cache is used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct BlockdevCacheOptions {
    /// Bypass the page cache; default off.
    pub direct: Option<bool>,
    /// Ignore flushes; default off.
    pub no_flush: Option<bool>,
}

/// Whether a file is locked against other processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum OnOffAuto {
    /// Where the host can.
    Auto,
    /// Yes, or fail.
    On,
    /// No.
    Off,
}

/// The way a file is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum BlockdevAioOptions {
    /// By a pool of threads.
    Threads,
    /// By Linux native I/O.
    Native,
    /// By io_uring.
    #[qapi(rename = "io_uring")]
    IoUring,
}

/// Options of `file` and `host_device`.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(features("dynamic-auto-read-only"))]
pub struct BlockdevOptionsFile {
    /// The path, or `/dev/fdset/N`.
    pub filename: String,
    /// Whether the file is locked; default `auto`.
    pub locking: Option<OnOffAuto>,
    /// How it is read and written; default `threads`.
    pub aio: Option<BlockdevAioOptions>,
    /// The most requests submitted in one batch; 0 leaves it to the daemon.
    pub aio_max_batch: Option<i64>,
    /// Drop what the page cache has of the file when the node becomes active; default on.
    pub drop_cache: Option<bool>,
    /// Fail where the page cache could not be dropped; default off.
    #[qapi(features("unstable"))]
    pub x_check_cache_dropped: Option<bool>,
}

impl BlockdevOptionsFile {
    /// The file of that path with every option at its default.
    pub fn new(filename: impl Into<String>) -> Self {
        Self {
            filename: filename.into(),
            locking: None,
            aio: None,
            aio_max_batch: None,
            drop_cache: None,
            x_check_cache_dropped: None,
        }
    }
}

/// Options of `io_uring`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevOptionsIoUring {
    /// The path.
    pub filename: String,
}

/// Options of `virtio-blk-vhost-user`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevOptionsVirtioBlkVhostUser {
    /// The path of the socket that the back end listens at.
    pub path: String,
    /// When the back end goes, requests wait so many seconds for it to come back, then fail; default 0. Ours.
    pub reconnect_delay: Option<u32>,
}

/// Options of `nbd`.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockdevOptionsNbd {
    /// Where the server is.
    pub server: SocketAddress,
    /// The name of the export; default the empty one.
    pub export: Option<String>,
    /// The id of TLS credentials; with them, TLS is spoken.
    pub tls_creds: Option<String>,
    /// The name that the server's certificate must be for; default the server's host name.
    pub tls_hostname: Option<String>,
    /// The metadata context to take in place of `base:allocation`.
    #[qapi(features("unstable"))]
    pub x_dirty_bitmap: Option<String>,
    /// When the connection is lost, requests wait so many seconds for it to come back, then fail; default 0.
    pub reconnect_delay: Option<u32>,
    /// Opening tries again for so many seconds while the server cannot be reached; default 0.
    pub open_timeout: Option<u32>,
    /// So many connections may be made if the server allows several; default 4. Ours.
    pub connections: Option<u32>,
}

impl BlockdevOptionsNbd {
    /// The default export of that server with every option at its default.
    pub fn new(server: SocketAddress) -> Self {
        Self {
            server,
            export: None,
            tls_creds: None,
            tls_hostname: None,
            x_dirty_bitmap: None,
            reconnect_delay: None,
            open_timeout: None,
            connections: None,
        }
    }
}

/// Options of `null-co` and `null-aio`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct BlockdevOptionsNull {
    /// The size in bytes; default 1 GiB.
    pub size: Option<i64>,
    /// How long each request takes, in nanoseconds; default 0.
    pub latency_ns: Option<u64>,
    /// Whether reads fill the buffer with zeroes; default off, leaving it as it was.
    pub read_zeroes: Option<bool>,
}

/// Options of drivers over one other node.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockdevOptionsGenericFormat {
    /// The node below.
    pub file: BlockdevRef,
}

/// Options of `raw`.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockdevOptionsRaw {
    /// The node below.
    pub file: BlockdevRef,
    /// Where the node's first byte is in the file, in bytes; default 0.
    pub offset: Option<i64>,
    /// The size in bytes; default the rest of the file.
    pub size: Option<i64>,
}

impl BlockdevOptionsRaw {
    /// All of the file.
    pub fn new(file: BlockdevRef) -> Self {
        Self {
            file,
            offset: None,
            size: None,
        }
    }
}

/// Options of `qcow2`.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockdevOptionsQcow2 {
    /// The node that holds the image.
    pub file: BlockdevRef,
    /// The backing node; default what the image names, `null` for none.
    pub backing: Option<BlockdevRefOrNull>,
    /// Write reference counts late; default what the image says.
    pub lazy_refcounts: Option<bool>,
    /// Whether guest discards reach the file; default what `discard` says.
    pub pass_discard_request: Option<bool>,
    /// Whether deleting a snapshot discards its clusters; default on.
    pub pass_discard_snapshot: Option<bool>,
    /// Whether other freed clusters are discarded; default off.
    pub pass_discard_other: Option<bool>,
    /// Keep the mapping of discarded clusters; default off.
    pub discard_no_unref: Option<bool>,
    /// Which writes are checked against metadata; default `cached`.
    pub overlap_check: Option<Qcow2OverlapChecks>,
    /// Bytes of all metadata caches together.
    pub cache_size: Option<i64>,
    /// Bytes of the L2 table cache.
    pub l2_cache_size: Option<i64>,
    /// Bytes of one entry of the L2 table cache.
    pub l2_cache_entry_size: Option<i64>,
    /// Bytes of the refcount block cache.
    pub refcount_cache_size: Option<i64>,
    /// Seconds after which unused cache entries are dropped; default 600, 0 for never.
    pub cache_clean_interval: Option<i64>,
    /// The node of the external data file; default what the image names.
    pub data_file: Option<BlockdevRef>,
}

impl BlockdevOptionsQcow2 {
    /// The image in that node with every option at its default.
    pub fn new(file: BlockdevRef) -> Self {
        Self {
            file,
            backing: None,
            lazy_refcounts: None,
            pass_discard_request: None,
            pass_discard_snapshot: None,
            pass_discard_other: None,
            discard_no_unref: None,
            overlap_check: None,
            cache_size: None,
            l2_cache_size: None,
            l2_cache_entry_size: None,
            refcount_cache_size: None,
            cache_clean_interval: None,
            data_file: None,
        }
    }
}

/// Which writes are checked against metadata: each kind by itself, or a preset.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(alternate)]
pub enum Qcow2OverlapChecks {
    /// A preset with exceptions.
    Flags(Qcow2OverlapCheckFlags),
    /// A preset.
    Mode(Qcow2OverlapCheckMode),
}

/// Presets of overlap checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum Qcow2OverlapCheckMode {
    /// None.
    None,
    /// Those that cost nothing: structures of fixed place and size.
    Constant,
    /// Also those whose data is in memory anyway.
    Cached,
    /// Also those that need reads.
    All,
}

/// A preset of overlap checks, and for each kind of metadata whether it differs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct Qcow2OverlapCheckFlags {
    /// What the others default to; default `cached`.
    pub template: Option<Qcow2OverlapCheckMode>,
    /// The header.
    pub main_header: Option<bool>,
    /// The active L1 table.
    pub active_l1: Option<bool>,
    /// The active L2 tables.
    pub active_l2: Option<bool>,
    /// The refcount table.
    pub refcount_table: Option<bool>,
    /// The refcount blocks.
    pub refcount_block: Option<bool>,
    /// The snapshot table.
    pub snapshot_table: Option<bool>,
    /// The L1 tables of snapshots.
    pub inactive_l1: Option<bool>,
    /// The L2 tables of snapshots.
    pub inactive_l2: Option<bool>,
    /// The bitmap directory.
    pub bitmap_directory: Option<bool>,
}

/// A node: defined here, or by the name it has.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(alternate)]
pub enum BlockdevRef {
    /// Opens a new node.
    Definition(Box<BlockdevOptions>),
    /// Names an existing one.
    Reference(String),
}

/// A node, or explicitly none.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(alternate)]
pub enum BlockdevRefOrNull {
    /// Opens a new node.
    Definition(Box<BlockdevOptions>),
    /// Names an existing one.
    Reference(String),
    /// None.
    Null,
}

/// Arguments of `blockdev-reopen`.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockdevReopen {
    /// The nodes, by their names, and what they are to become.
    pub options: Vec<BlockdevOptions>,
}

/// Arguments of `blockdev-del`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevDel {
    /// The node to remove.
    pub node_name: String,
}

/// Arguments of `blockdev-set-active`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevSetActive {
    /// The node; default all.
    pub node_name: Option<String>,
    /// Whether its image may be used from now on.
    pub active: bool,
}

/// A string, or explicitly none.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(alternate)]
pub enum StrOrNull {
    /// The string.
    S(String),
    /// None.
    Null,
}

/// Arguments of `x-blockdev-set-iothread`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevSetIothread {
    /// The node.
    pub node_name: String,
    /// The iothread, or none.
    pub iothread: StrOrNull,
    /// Do it although the node has users; default off.
    pub force: Option<bool>,
}

/// Arguments of `change-backing-file`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ChangeBackingFile {
    /// The node at the top of the chain.
    pub device: String,
    /// The node of the image to change.
    pub image_node_name: String,
    /// What the image is to call its backing file from now on; empty for none.
    pub backing_file: String,
}

/// Arguments of `block_resize`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockResize {
    /// The device to resize.
    pub device: Option<String>,
    /// The node to resize.
    pub node_name: Option<String>,
    /// The new size in bytes.
    pub size: i64,
}

/// Arguments of `query-named-block-nodes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct QueryNamedBlockNodes {
    /// Leave out the backing images; default off.
    pub flat: Option<bool>,
}
