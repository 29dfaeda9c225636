//! The NBD server among the exports: it runs or not, and exports of its type need it; but for those whose clients are given to them
//! connected.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use stord_block::bitmap::DirtyBitmap;
use stord_block::drivers::protocol::nbd::wire::MAX_STRING;
use stord_credentials::Credentials;
use stord_qmp::Error;
use stord_qmp::schema::bitmap::{BlockDirtyBitmap, BlockDirtyBitmapOrStr};
use stord_qmp::schema::export::{
    BlockExportKind, BlockExportOptions, BlockExportOptionsNbd, BlockExportRemoveMode,
    BlockExportType,
};
use stord_qmp::schema::nbd::{NbdServerAddOptions, NbdServerOptions};
use stord_qmp::schema::object::QCryptoTLSCredsEndpoint;

use super::{Entry, ExportRegistry};
use crate::export::{Ended, Export, Parts};
use crate::nbd::{NbdExport, NbdServerSettings, Security};

/// A handshake may last so many seconds, unless told otherwise.
const HANDSHAKE_SECONDS: u32 = 10;
/// So many clients may be connected, unless told otherwise.
const MAX_CONNECTIONS: u32 = 100;

/// What an export with connected clients is to be.
#[derive(Clone, Debug)]
pub struct NbdLinkOptions {
    /// The export's unique id.
    pub id: String,
    /// The node.
    pub node_name: String,
    /// Whether the clients may write.
    pub writable: bool,
    /// How many clients there are, each on an I/O thread of its own; by default as many as other exports have threads.
    pub connections: Option<u16>,
}

/// The clients' side of an export whose clients are connected to it, past any handshake. They speak with simple replies.
#[derive(Debug)]
pub struct NbdLink {
    /// A socket for each client.
    pub sockets: Vec<OwnedFd>,
    /// The disk's size in bytes.
    pub size: u64,
    /// The transmission flags.
    pub flags: u16,
}

impl ExportRegistry {
    /// Exports a node to clients that are connected already. No server is needed, and nobody else can find the export.
    ///
    /// # Errors
    /// As [`add`](Self::add); there are no sockets.
    pub async fn link_nbd(self: &Rc<Self>, options: &NbdLinkOptions) -> Result<NbdLink, Error> {
        let NbdLinkOptions { id, node_name, .. } = options;
        let entry = self.enter(id, BlockExportType::Nbd, node_name, None)?;
        let linked = self.start_link(&entry, options).await;
        if linked.is_err() {
            self.forget(&entry);
        }
        linked
    }

    async fn start_link(
        self: &Rc<Self>,
        entry: &Rc<Entry>,
        options: &NbdLinkOptions,
    ) -> Result<NbdLink, Error> {
        let claim = self.claim(&options.node_name, options.writable, false)?;
        let placement = self.place(None, options.connections)?;
        let count = placement.contexts.len();
        let backend = match self
            .attach_active(&options.node_name, &options.id, claim)
            .await
        {
            Ok(backend) => backend,
            Err(error) => {
                self.release(&placement);
                return Err(error);
            }
        };
        let parts = Parts {
            backend: backend.clone(),
            contexts: placement.contexts.clone(),
            writable: options.writable,
            writethrough: false,
        };
        let name = options.id.clone();
        let export = NbdExport::new(name, &BlockExportOptionsNbd::default(), Vec::new(), parts);
        let linked = export.link(count);
        let ended = export.ended();
        let shared: Rc<dyn Export> = Rc::clone(&export) as _;
        self.supervise(entry, shared, ended, vec![backend], placement);
        match linked {
            Ok(link) => Ok(link),
            Err(error) => {
                export.shut_down().await;
                Err(Error::os("cannot connect clients", error))
            }
        }
    }

    /// Starts the NBD server.
    ///
    /// # Errors
    /// It runs already, there are no such credentials, or the address cannot be had.
    pub async fn nbd_server_start(
        &self,
        options: NbdServerOptions,
        credentials: Arc<Credentials>,
    ) -> Result<(), Error> {
        let NbdServerOptions {
            handshake_max_seconds,
            tls_creds,
            tls_authz,
            max_connections,
            addr,
        } = options;
        self.nbd.check_stopped()?;
        if tls_authz.is_some() && tls_creds.is_none() {
            return Err(Error::generic(
                "Parameter 'tls-authz' has no effect without 'tls-creds'",
            ));
        }
        let security = tls_creds
            .map(|id| {
                let tls = credentials.tls(&id, QCryptoTLSCredsEndpoint::Server)?;
                Ok::<_, Error>(Security {
                    tls,
                    authorization: tls_authz,
                    credentials,
                })
            })
            .transpose()?;
        let seconds = handshake_max_seconds.unwrap_or(HANDSHAKE_SECONDS);
        self.nbd
            .start(NbdServerSettings {
                address: addr.address,
                handshake_limit: Duration::from_secs(seconds.into()),
                max_connections: max_connections.unwrap_or(MAX_CONNECTIONS),
                security,
            })
            .await
    }

    /// Exports a node by the NBD server, under an id that is the export's name.
    ///
    /// # Errors
    /// As [`add`](Self::add); the server does not run.
    pub async fn nbd_server_add(
        self: &Rc<Self>,
        options: NbdServerAddOptions,
    ) -> Result<(), Error> {
        let NbdServerAddOptions {
            name,
            description,
            device,
            writable,
            bitmap,
        } = options;
        self.nbd.check_running()?;
        let node = self.graph.find(&device).map_err(|_| {
            Error::generic(format!(
                "Cannot find device='{device}' nor node-name='{device}'"
            ))
        })?;
        let node_name = node.name().to_owned();
        // A node that cannot be written is exported all the same, for reading.
        let writable = writable.map(|writable| writable && !node.is_read_only());
        drop(node);
        let name = name.unwrap_or(device);
        self.add(BlockExportOptions {
            writable,
            ..BlockExportOptions::new(
                BlockExportKind::Nbd(BlockExportOptionsNbd {
                    name: Some(name.clone()),
                    description,
                    bitmaps: bitmap.map(|name| vec![BlockDirtyBitmapOrStr::Local(name)]),
                    ..BlockExportOptionsNbd::default()
                }),
                name,
                node_name,
            )
        })
        .await
    }

    /// Removes an export of the NBD server.
    ///
    /// # Errors
    /// As [`del`](Self::del); the server does not run, or the export is another's.
    pub async fn nbd_server_remove(
        self: &Rc<Self>,
        name: &str,
        mode: BlockExportRemoveMode,
    ) -> Result<(), Error> {
        if let Some(entry) = self.find(name)
            && entry.kind != BlockExportType::Nbd
        {
            return Err(Error::generic(format!(
                "Block export '{name}' is not an NBD export"
            )));
        }
        self.del(name, mode).await
    }

    /// Removes every export of the NBD server and stops it.
    ///
    /// # Errors
    /// It does not run.
    pub async fn nbd_server_stop(self: &Rc<Self>) -> Result<(), Error> {
        self.nbd.check_running()?;
        self.close(|entry| entry.kind == BlockExportType::Nbd).await;
        self.nbd.stop().await;
        Ok(())
    }

    /// Sees that an NBD export can be made.
    pub(super) fn check_nbd(
        &self,
        options: &BlockExportOptionsNbd,
        node_name: &str,
    ) -> Result<(), Error> {
        self.nbd.check_running()?;
        let name = options.name.as_deref().unwrap_or(node_name);
        if name.len() > MAX_STRING {
            return Err(Error::generic(format!("export name '{name}' too long")));
        }
        if let Some(description) = &options.description
            && description.len() > MAX_STRING
        {
            return Err(Error::generic(format!(
                "description '{description}' too long"
            )));
        }
        self.nbd.check_name(name)
    }

    fn borrow_bitmaps(
        &self,
        entry: &Entry,
        options: &BlockExportOptionsNbd,
        parts: &Parts,
        borrowed: &mut Vec<Arc<DirtyBitmap>>,
    ) -> Result<(), Error> {
        for bitmap in options.bitmaps.iter().flatten() {
            let (node, name) = match bitmap {
                BlockDirtyBitmapOrStr::Local(name) => (entry.node_name.as_str(), name),
                BlockDirtyBitmapOrStr::External(BlockDirtyBitmap { node, name }) => {
                    (node.as_str(), name)
                }
            };
            borrowed.push(self.graph.borrow_bitmap(node, name, !parts.writable)?);
        }
        Ok(())
    }

    pub(super) fn start_nbd(
        &self,
        entry: &Entry,
        options: &BlockExportOptionsNbd,
        parts: Parts,
    ) -> Result<(Rc<dyn Export>, Ended), Error> {
        let name = options.name.clone();
        let name = name.unwrap_or_else(|| entry.node_name.clone());
        let mut bitmaps: Vec<Arc<DirtyBitmap>> = Vec::new();
        let made = self.borrow_bitmaps(entry, options, &parts, &mut bitmaps);
        let offered = made.and_then(|()| {
            let export = NbdExport::new(name, options, bitmaps.clone(), parts);
            self.nbd.offer(&export).map(|()| export)
        });
        let export = offered.inspect_err(|_| {
            for bitmap in &bitmaps {
                bitmap.set_busy(false);
            }
        })?;
        let ended = export.ended();
        Ok((export, ended))
    }
}
