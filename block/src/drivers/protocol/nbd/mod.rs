//! The `nbd` driver: a disk that an NBD server has.
//!
//! ```text
//! mod        the driver: requests as the server takes them
//!   lanes      which connection takes a request, and how a lost one comes back
//!     negotiate  the handshake of a new connection             (on a thread of the pool)
//!     link       one connection on one context                 (transport: plain or TLS; inbox: what was received)
//! uri        names of servers
//! wire       the protocol
//! ```
//!
//! `wire`, `transport` and `inbox` are the server's too (`stord-bridges`).

pub mod inbox;
mod lanes;
mod link;
mod negotiate;
pub mod transport;
pub mod uri;
pub mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use stord_aio::{Errno, IoVec, join_all};
use stord_credentials::Credentials;
use stord_qmp::Error;
use stord_qmp::schema::block::BlockdevOptionsNbd;
use stord_qmp::schema::create::PreallocMode;
use stord_qmp::schema::object::QCryptoTLSCredsEndpoint;
use stord_qmp::schema::socket::{InetSocketAddress, SocketAddressKind};

use self::lanes::{Lanes, Target};
use self::link::Ask;
use self::negotiate::Wanted;
use self::wire::{
    BASE_ALLOCATION, Command, CommandFlags, STATE_HOLE, STATE_ZERO, TransmissionFlags,
};
use crate::driver::{BlockStatus, IoFuture, Limits, Protocol, ZeroFlags};
use crate::graph::Permissions;

/// So many connections are made to a server that allows several, unless told otherwise.
const CONNECTIONS: u32 = 4;
/// Between two attempts to open.
const OPEN_PAUSE: Duration = Duration::from_millis(200);
/// The most bytes of one request without payload to a server with numbers of 32 bits.
const MAX_LENGTH: u64 = 1 << 31;

/// The `nbd` driver.
pub struct Nbd {
    lanes: Arc<Lanes>,
    filename: String,
}

impl Nbd {
    /// Connects to a server.
    ///
    /// # Errors
    /// The server cannot be reached within `open-timeout`, or does not have the export.
    pub async fn open(
        options: &BlockdevOptionsNbd,
        credentials: &Credentials,
    ) -> Result<Self, Error> {
        let address = options.server.address.clone();
        let export = options.export.clone().unwrap_or_default();
        let tls = options
            .tls_creds
            .as_deref()
            .map(|id| credentials.tls(id, QCryptoTLSCredsEndpoint::Client))
            .transpose()?;
        if options.tls_hostname.is_some() && tls.is_none() {
            return Err(Error::generic(
                "Parameter 'tls-hostname' has no effect without 'tls-creds'",
            ));
        }
        let hostname = options.tls_hostname.clone().or_else(|| match &address {
            SocketAddressKind::Inet(InetSocketAddress { host, .. }) => Some(host.clone()),
            _ => None,
        });
        let connections = options.connections.unwrap_or(CONNECTIONS);
        if connections == 0 {
            return Err(Error::generic(
                "Parameter 'connections' expects a value of at least 1",
            ));
        }
        let filename = uri::of(&address, &export);
        let target = Arc::new(Target {
            address,
            wanted: Wanted {
                export,
                context: options
                    .x_dirty_bitmap
                    .clone()
                    .unwrap_or_else(|| BASE_ALLOCATION.to_owned()),
                tls,
                hostname,
            },
        });
        let patience = Duration::from_secs(options.open_timeout.unwrap_or(0).into());
        let deadline = Instant::now() + patience;
        let first = loop {
            match target.connect().await {
                Ok(connected) => break connected,
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => tokio::time::sleep(OPEN_PAUSE).await,
            }
        };
        let is_shared = first
            .terms
            .flags
            .contains(TransmissionFlags::CAN_MULTI_CONN);
        let limit = if is_shared {
            usize::try_from(connections).unwrap_or(usize::MAX)
        } else {
            1
        };
        let delay = Duration::from_secs(options.reconnect_delay.unwrap_or(0).into());
        Ok(Self {
            lanes: Lanes::new(target, first, delay, limit),
            filename,
        })
    }

    /// Whether the server refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.has(TransmissionFlags::READ_ONLY)
    }

    fn has(&self, flags: TransmissionFlags) -> bool {
        self.lanes.terms().flags.contains(flags)
    }

    async fn ask(
        &self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> Result<(), Errno> {
        let ask = Ask {
            command,
            flags,
            offset,
            length,
            data: IoVec::new(),
        };
        self.lanes.request(ask).await.map(drop)
    }

    /// Asks for a range without payload in pieces as long as the server takes them.
    async fn ask_in_pieces(
        &self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> Result<(), Errno> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < length {
            let part = (length - done).min(MAX_LENGTH);
            pieces.push(self.ask(command, flags, offset + done, part));
            done += part;
        }
        join_all(pieces).await.into_iter().collect()
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        self.lanes.close();
    }
}

impl Protocol for Nbd {
    fn limits(&self) -> Limits {
        let terms = self.lanes.terms();
        Limits {
            request_alignment: terms.minimum,
            max_transfer: terms.maximum,
            zero_alignment: terms.minimum,
            discard_alignment: terms.minimum,
            ..Limits::default()
        }
    }

    fn length(&self) -> u64 {
        self.lanes.terms().size
    }

    fn read<'a>(&'a self, offset: u64, dst: IoVec) -> IoFuture<'a> {
        Box::pin(async move {
            let size = self.length();
            let inside = size.saturating_sub(offset).min(dst.len());
            if inside < dst.len() {
                dst.slice(inside..dst.len()).fill(0);
            }
            if inside == 0 {
                return Ok(());
            }
            let ask = Ask {
                command: Command::Read,
                flags: CommandFlags::empty(),
                offset,
                length: inside,
                data: dst.slice(0..inside),
            };
            self.lanes.request(ask).await.map(drop)
        })
    }

    fn write<'a>(&'a self, offset: u64, src: IoVec, durable: bool) -> IoFuture<'a> {
        Box::pin(async move {
            let has_fua = self.has(TransmissionFlags::SEND_FUA);
            let mut flags = CommandFlags::empty();
            flags.set(CommandFlags::FUA, durable && has_fua);
            let ask = Ask {
                command: Command::Write,
                flags,
                offset,
                length: src.len(),
                data: src,
            };
            self.lanes.request(ask).await?;
            if durable && !has_fua {
                self.flush().await?;
            }
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            let is_fast = flags.contains(ZeroFlags::NO_FALLBACK);
            if !self.has(TransmissionFlags::SEND_WRITE_ZEROES)
                || (is_fast && !self.has(TransmissionFlags::SEND_FAST_ZERO))
            {
                return Err(Errno::ENOTSUP);
            }
            let durable = flags.contains(ZeroFlags::DURABLE);
            let has_fua = self.has(TransmissionFlags::SEND_FUA);
            let mut wire = CommandFlags::empty();
            wire.set(CommandFlags::NO_HOLE, !flags.contains(ZeroFlags::MAY_UNMAP));
            wire.set(CommandFlags::FAST_ZERO, is_fast);
            wire.set(CommandFlags::FUA, durable && has_fua);
            self.ask_in_pieces(Command::WriteZeroes, wire, offset, len)
                .await?;
            if durable && !has_fua {
                self.flush().await?;
            }
            Ok(())
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a> {
        Box::pin(async move {
            if !self.has(TransmissionFlags::SEND_TRIM) {
                return Err(Errno::ENOTSUP);
            }
            self.ask_in_pieces(Command::Trim, CommandFlags::empty(), offset, len)
                .await
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move {
            if !self.has(TransmissionFlags::SEND_FLUSH) {
                return Ok(());
            }
            self.ask(Command::Flush, CommandFlags::empty(), 0, 0).await
        })
    }

    fn status<'a>(&'a self, offset: u64, len: u64) -> IoFuture<'a, BlockStatus> {
        Box::pin(async move {
            let data = |len| BlockStatus {
                len,
                data: true,
                zero: false,
                allocated: true,
            };
            let size = self.length();
            if offset >= size {
                return Ok(BlockStatus {
                    zero: true,
                    data: false,
                    ..data(len)
                });
            }
            let len = len.min(size - offset);
            if self.lanes.terms().context.is_none() {
                return Ok(data(len));
            }
            let minimum = u64::from(self.lanes.terms().minimum);
            let start = offset / minimum * minimum;
            let ask = Ask {
                command: Command::BlockStatus,
                flags: CommandFlags::REQ_ONE,
                offset: start,
                length: (offset + len - start)
                    .next_multiple_of(minimum)
                    .min(size - start)
                    .min(MAX_LENGTH),
                data: IoVec::new(),
            };
            let extent = self.lanes.request(ask).await?.ok_or(Errno::EIO)?;
            // What the server says of bytes in front of those asked for is left out.
            let known = extent.length.saturating_sub(offset - start).min(len);
            if known == 0 {
                return Ok(data(len.min(minimum)));
            }
            Ok(BlockStatus {
                len: known,
                data: extent.flags & u64::from(STATE_HOLE) == 0,
                zero: extent.flags & u64::from(STATE_ZERO) != 0,
                allocated: true,
            })
        })
    }

    fn truncate<'a>(
        &'a self,
        size: u64,
        exact: bool,
        _preallocation: PreallocMode,
    ) -> IoFuture<'a> {
        let is_enough = size == self.length() || (!exact && size < self.length());
        Box::pin(async move {
            if is_enough {
                Ok(())
            } else {
                Err(Errno::ENOTSUP)
            }
        })
    }

    fn allocated_size<'a>(&'a self) -> IoFuture<'a, u64> {
        Box::pin(async { Err(Errno::ENOTSUP) })
    }

    fn prepare_permissions(
        &self,
        permissions: Permissions,
        _shared: Permissions,
    ) -> Result<(), Error> {
        if permissions.contains(Permissions::WRITE) && self.is_read_only() {
            return Err(Error::generic(
                "request on write denied without write permission",
            ));
        }
        Ok(())
    }

    fn filename(&self) -> String {
        self.filename.clone()
    }
}
