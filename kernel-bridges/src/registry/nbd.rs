//! The NBD server among the exports: it runs or not, and exports of its type need it.

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

impl ExportRegistry {
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
