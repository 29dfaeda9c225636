//! Counters of block nodes and their users.

use crate::Qapi;
use crate::schema::node_info::BlockDeviceInfo;

/// Arguments of `query-blockstats`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct QueryBlockstats {
    /// Ask for nodes rather than devices; default off.
    pub query_nodes: Option<bool>,
}

/// The counters of a node, and of those below it.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockStats {
    /// The device; there are none here.
    pub device: Option<String>,
    /// The device's path in the object tree; there are none here.
    pub qdev: Option<String>,
    /// The node.
    pub node_name: Option<String>,
    /// The counters.
    pub stats: BlockDeviceStats,
    /// What only its driver counts.
    pub driver_specific: Option<BlockStatsSpecific>,
    /// The node that holds the image file.
    pub parent: Option<Box<BlockStats>>,
    /// The backing node.
    pub backing: Option<Box<BlockStats>>,
}

/// Counters of requests. Times are in nanoseconds; requests in flight together count each.
#[derive(Clone, Debug, Default, PartialEq, Qapi)]
#[qapi(snake_case)]
pub struct BlockDeviceStats {
    /// Bytes read.
    pub rd_bytes: i64,
    /// Bytes written.
    pub wr_bytes: i64,
    /// Bytes appended to zones.
    pub zone_append_bytes: i64,
    /// Bytes discarded.
    pub unmap_bytes: i64,
    /// Reads.
    pub rd_operations: i64,
    /// Writes.
    pub wr_operations: i64,
    /// Appends to zones.
    pub zone_append_operations: i64,
    /// Flushes.
    pub flush_operations: i64,
    /// Discards.
    pub unmap_operations: i64,
    /// Time of reads.
    pub rd_total_time_ns: i64,
    /// Time of writes.
    pub wr_total_time_ns: i64,
    /// Time of appends to zones.
    pub zone_append_total_time_ns: i64,
    /// Time of flushes.
    pub flush_total_time_ns: i64,
    /// Time of discards.
    pub unmap_total_time_ns: i64,
    /// The end of the highest write, in bytes.
    pub wr_highest_offset: i64,
    /// Reads merged into others.
    pub rd_merged: i64,
    /// Writes merged into others.
    pub wr_merged: i64,
    /// Appends merged into others.
    pub zone_append_merged: i64,
    /// Discards merged into others.
    pub unmap_merged: i64,
    /// Time since the last request.
    pub idle_time_ns: Option<i64>,
    /// Reads that failed.
    pub failed_rd_operations: i64,
    /// Writes that failed.
    pub failed_wr_operations: i64,
    /// Appends that failed.
    pub failed_zone_append_operations: i64,
    /// Flushes that failed.
    pub failed_flush_operations: i64,
    /// Discards that failed.
    pub failed_unmap_operations: i64,
    /// Reads refused as invalid.
    pub invalid_rd_operations: i64,
    /// Writes refused as invalid.
    pub invalid_wr_operations: i64,
    /// Appends refused as invalid.
    pub invalid_zone_append_operations: i64,
    /// Flushes refused as invalid.
    pub invalid_flush_operations: i64,
    /// Discards refused as invalid.
    pub invalid_unmap_operations: i64,
    /// Whether invalid requests count for the time of the last request.
    pub account_invalid: bool,
    /// Whether failed requests count for latencies and the time of the last request.
    pub account_failed: bool,
    /// Statistics of intervals; there are none yet.
    pub timed_stats: Vec<BlockDeviceTimedStats>,
}

/// Statistics of an interval. Times are in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Qapi)]
#[qapi(snake_case)]
pub struct BlockDeviceTimedStats {
    /// The interval in seconds.
    pub interval_length: i64,
    /// The shortest read.
    pub min_rd_latency_ns: i64,
    /// The longest read.
    pub max_rd_latency_ns: i64,
    /// The average read.
    pub avg_rd_latency_ns: i64,
    /// The shortest write.
    pub min_wr_latency_ns: i64,
    /// The longest write.
    pub max_wr_latency_ns: i64,
    /// The average write.
    pub avg_wr_latency_ns: i64,
    /// The shortest append.
    pub min_zone_append_latency_ns: i64,
    /// The longest append.
    pub max_zone_append_latency_ns: i64,
    /// The average append.
    pub avg_zone_append_latency_ns: i64,
    /// The shortest flush.
    pub min_flush_latency_ns: i64,
    /// The longest flush.
    pub max_flush_latency_ns: i64,
    /// The average flush.
    pub avg_flush_latency_ns: i64,
    /// Reads in flight on average.
    pub avg_rd_queue_depth: f64,
    /// Writes in flight on average.
    pub avg_wr_queue_depth: f64,
    /// Appends in flight on average.
    pub avg_zone_append_queue_depth: f64,
}

/// What only one driver counts.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockStatsSpecific {
    /// The driver and its counters.
    #[qapi(union = "driver")]
    pub driver: BlockStatsSpecificDriver,
}

/// A driver and its counters.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union)]
pub enum BlockStatsSpecificDriver {
    /// A regular file.
    File(BlockStatsSpecificFile),
    /// A device of the host.
    #[qapi(rename = "host_device")]
    HostDevice(BlockStatsSpecificFile),
    /// Counts nothing.
    NullAio,
    /// Counts nothing.
    NullCo,
    /// Counts nothing.
    Qcow2,
    /// Counts nothing.
    Raw,
}

/// What file drivers count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Qapi)]
pub struct BlockStatsSpecificFile {
    /// Discards that succeeded.
    pub discard_nb_ok: u64,
    /// Discards that failed.
    pub discard_nb_failed: u64,
    /// Bytes discarded.
    pub discard_bytes_ok: u64,
}

/// The whole graph, for debugging.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct XDbgBlockGraph {
    /// Nodes and their users.
    pub nodes: Vec<XDbgBlockGraphNode>,
    /// Who uses what.
    pub edges: Vec<XDbgBlockGraphEdge>,
}

/// A node of the graph or a user of one.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct XDbgBlockGraphNode {
    /// A number of its own.
    pub id: u64,
    /// What it is.
    pub r#type: XDbgBlockGraphNodeType,
    /// Its name.
    pub name: String,
}

/// What a node of the graph is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum XDbgBlockGraphNodeType {
    /// A user from outside the graph.
    BlockBackend,
    /// A job.
    BlockJob,
    /// A block node.
    BlockDriver,
}

/// Who uses what, and how.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct XDbgBlockGraphEdge {
    /// The user.
    pub parent: u64,
    /// What it uses.
    pub child: u64,
    /// As what.
    pub name: String,
    /// What it does.
    pub perm: Vec<BlockPermission>,
    /// What it lets others do.
    pub shared_perm: Vec<BlockPermission>,
}

/// Permissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum BlockPermission {
    /// Reads see a consistent state.
    ConsistentRead,
    /// Writes.
    Write,
    /// Writes that change nothing for the guest.
    WriteUnchanged,
    /// Changes of the length.
    Resize,
}

/// Arguments of `block-set-write-threshold`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockSetWriteThreshold {
    /// The node.
    pub node_name: String,
    /// The offset in bytes that no write may pass unreported; 0 for none.
    pub write_threshold: u64,
}

/// Event: a write passed a node's threshold, which is off now.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(event = "BLOCK_WRITE_THRESHOLD")]
pub struct BlockWriteThreshold {
    /// The node.
    pub node_name: String,
    /// By how many bytes.
    pub amount_exceeded: u64,
    /// The threshold.
    pub write_threshold: u64,
}

/// Event: an image was found to be corrupt.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(event = "BLOCK_IMAGE_CORRUPTED")]
pub struct BlockImageCorrupted {
    /// The device, of which there are none here.
    pub device: String,
    /// The node.
    pub node_name: Option<String>,
    /// What was found.
    pub msg: String,
    /// Where in the image file, in bytes, if that is known.
    pub offset: Option<i64>,
    /// Of how many bytes, if that is known.
    pub size: Option<i64>,
    /// Whether the image is of no more use.
    pub fatal: bool,
}

/// A guest's device. There are none here; the type is for introspection.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockInfo {
    /// The name.
    pub device: String,
    /// The path in the object tree.
    pub qdev: Option<String>,
    /// The type, for old clients.
    pub r#type: String,
    /// Whether the medium can be changed.
    pub removable: bool,
    /// Whether the guest has locked it.
    pub locked: bool,
    /// The medium.
    pub inserted: Option<BlockDeviceInfo>,
    /// Whether the tray is open.
    #[qapi(rename = "tray_open")]
    pub tray_open: Option<bool>,
    /// What became of its requests.
    pub io_status: Option<BlockDeviceIoStatus>,
}

/// What became of a device's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum BlockDeviceIoStatus {
    /// They succeed.
    Ok,
    /// The last failed.
    Failed,
    /// The last failed for want of space.
    Nospace,
}

/// Event: a request failed. It is sent for requests of exports; of many failures at a node not all are told.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(event = "BLOCK_IO_ERROR")]
pub struct BlockIoError {
    /// The path of the device in the object tree; exports have none.
    pub qom_path: String,
    /// Who made the request: the export's id.
    pub device: String,
    /// The node.
    pub node_name: Option<String>,
    /// What failed.
    pub operation: IoOperationType,
    /// What became of the error.
    pub action: BlockErrorAction,
    /// The storage is full.
    pub nospace: Option<bool>,
    /// Why it failed, for people.
    pub reason: String,
}

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum IoOperationType {
    /// Reading.
    Read,
    /// Anything that changes something.
    Write,
}

/// What becomes of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum BlockErrorAction {
    /// It is ignored.
    Ignore,
    /// Whoever made the request is told.
    Report,
    /// The guest is stopped.
    Stop,
}
