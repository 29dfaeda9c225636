//! What `stord mount` exports: one node as a file or several as the files of a directory, which may be taken over from another
//! process and left to another one.

use std::rc::Rc;

use stord_block::Backend;
use stord_qmp::Error;
use stord_qmp::schema::block::OnOffAuto;
use stord_qmp::schema::export::{BlockExportType, FuseExportAllowOther};

use super::{Entry, ExportRegistry, Placement, is_gone};
use crate::export::Ended;
use crate::fuse::{Connection, Contents, FileOptions, FuseExport, FuseOptions, check_mountpoint};

/// What a mount is to be.
#[derive(Clone, Debug)]
pub struct MountExport {
    /// The export's unique id.
    pub id: String,
    /// The file or directory to mount over.
    pub mountpoint: String,
    /// What is shown.
    pub layout: MountLayout,
    /// Whether it can be written.
    pub writable: bool,
    /// Whether requests come through io_uring.
    pub io_uring: OnOffAuto,
    /// Acknowledge a change only when it would outlive this process.
    pub outlives: bool,
}

/// What a mount shows.
#[derive(Clone, Debug)]
pub enum MountLayout {
    /// One node as a file.
    File {
        /// The node that is its content.
        node_name: String,
    },
    /// Several nodes as the files of a directory, none of which can change its length. The first stands for the file system in
    /// statfs(2).
    Directory(Vec<DirectoryFile>),
}

/// One file of a directory.
#[derive(Clone, Debug)]
pub struct DirectoryFile {
    /// The file's name, of at most 63 bytes.
    pub name: String,
    /// The node that is its content.
    pub node_name: String,
}

impl MountLayout {
    fn nodes(&self) -> Vec<&str> {
        match self {
            Self::File { node_name } => vec![node_name],
            Self::Directory(files) => files.iter().map(|file| file.node_name.as_str()).collect(),
        }
    }
}

impl ExportRegistry {
    /// Mounts; the mount can be used when this returns. With a connection, it is one that another process served before.
    ///
    /// # Errors
    /// As those of [`add`](Self::add), or the connection has ended.
    pub async fn mount(
        self: &Rc<Self>,
        options: &MountExport,
        connection: Option<Connection>,
    ) -> Result<(), Error> {
        let nodes = options.layout.nodes();
        let node_name = nodes.first().copied().unwrap_or_default();
        let mountpoint = Some(options.mountpoint.clone());
        let entry = self.enter(&options.id, BlockExportType::Fuse, node_name, mountpoint)?;
        let started = self.start_mount(&entry, options, connection).await;
        if started.is_err() {
            self.forget(&entry);
        }
        started
    }

    async fn start_mount(
        self: &Rc<Self>,
        entry: &Rc<Entry>,
        options: &MountExport,
        connection: Option<Connection>,
    ) -> Result<(), Error> {
        self.check_mountpoint_is_free(entry)?;
        let placement = self.place(None, None)?;
        let mut backends = Vec::new();
        let started = async {
            for node_name in options.layout.nodes() {
                let claim = self.claim(node_name, options.writable, false)?;
                let attached = self.attach_active(node_name, &options.id, claim);
                backends.push(attached.await?);
            }
            let contents = self.contents(entry, options, &backends, &placement);
            start(options, contents, connection, &placement).await
        };
        match started.await {
            Ok((export, ended)) => {
                self.supervise(entry, Rc::new(export), ended, backends, placement);
                Ok(())
            }
            Err(error) => {
                for backend in backends {
                    self.graph.detach(backend).await;
                }
                self.release(&placement);
                Err(error)
            }
        }
    }

    fn contents(
        &self,
        entry: &Entry,
        options: &MountExport,
        backends: &[Backend],
        placement: &Placement,
    ) -> Contents {
        let file = |backend: &Backend| FileOptions {
            backend: backend.clone(),
            writable: options.writable,
            growable: false,
            writethrough: false,
            outlives: options.outlives,
            resizes: None,
        };
        match (&options.layout, backends) {
            (MountLayout::File { .. }, [backend]) => Contents::File(FileOptions {
                resizes: options
                    .writable
                    .then(|| self.serve_resizes(entry, &placement.contexts)),
                ..file(backend)
            }),
            (MountLayout::File { .. }, _) => unreachable!("a file has one node"),
            (MountLayout::Directory(files), backends) => Contents::Directory(
                files
                    .iter()
                    .zip(backends)
                    .map(|(entry, backend)| (entry.name.clone(), file(backend)))
                    .collect(),
            ),
        }
    }

    /// What another process needs to serve an export's mount when this one is gone. `None` where it cannot be had: files that are open in
    /// passthrough cannot be left to another. With io_uring, it is of no use unless this process [leaves](Self::hand_over) the mount.
    pub fn connection(&self, id: &str) -> Option<Connection> {
        let entry = self.find(id)?;
        let export = entry.export.borrow().clone()?;
        export.connection()
    }

    /// Ends an export without ending its mount, whose users wait for whoever serves the connection next. There is no event.
    ///
    /// # Errors
    /// It cannot be left to another, or is ending already.
    pub async fn hand_over(self: &Rc<Self>, id: &str) -> Result<Connection, Error> {
        let entry = self
            .find(id)
            .ok_or_else(|| Error::generic(format!("Export '{id}' is not found")))?;
        let export = entry.export.borrow().clone();
        let export = export
            .filter(|_| !entry.shutting_down.get())
            .ok_or_else(|| Error::generic(format!("export '{id}' is ending")))?;
        let mut connection = export.connection().ok_or_else(|| {
            Error::generic("the mount cannot be handed over: the kernel reads its image by itself")
                .with_hint("Mounts made with 'stord mount --keep' can be.")
        })?;
        let stage = entry.stage.subscribe();
        let set_leaving = |leaving| {
            entry.shutting_down.set(leaving);
            entry.left.set(leaving);
        };
        set_leaving(true);
        if let Err(error) = export.leave(&mut connection).await {
            set_leaving(false);
            return Err(error);
        }
        drop(export);
        is_gone(stage).await;
        Ok(connection)
    }
}

async fn start(
    options: &MountExport,
    contents: Contents,
    connection: Option<Connection>,
    placement: &Placement,
) -> Result<(FuseExport, Ended), Error> {
    if let Some(connection) = connection {
        return FuseExport::adopt(connection, &contents, &placement.contexts).await;
    }
    let directory = matches!(options.layout, MountLayout::Directory(_));
    let options = FuseOptions {
        path: check_mountpoint(&options.mountpoint, directory).await?,
        allow_other: FuseExportAllowOther::Auto,
        io_uring: options.io_uring,
        // A file that is open past a daemon cannot be opened otherwise by the next.
        passthrough: if options.outlives {
            OnOffAuto::Off
        } else {
            OnOffAuto::Auto
        },
        contents,
    };
    FuseExport::start(&options, &placement.contexts).await
}
