//! Exports of several nodes as the files of one directory.

use std::rc::Rc;

use stord_block::Backend;
use stord_qmp::Error;
use stord_qmp::schema::block::OnOffAuto;
use stord_qmp::schema::export::{BlockExportType, FuseExportAllowOther};

use super::{Entry, ExportRegistry};
use crate::fuse::{Contents, FileOptions, FuseExport, FuseOptions, check_mountpoint};

/// What a directory of files is to be.
#[derive(Clone, Debug)]
pub struct DirectoryExport {
    /// The export's unique id.
    pub id: String,
    /// The directory to mount over.
    pub mountpoint: String,
    /// The files, the first of them the one that stands for the file system in statfs(2).
    pub files: Vec<DirectoryFile>,
    /// Whether the files can be written; none of them can change its length.
    pub writable: bool,
    /// Whether requests come through io_uring.
    pub io_uring: OnOffAuto,
}

/// One file of a directory.
#[derive(Clone, Debug)]
pub struct DirectoryFile {
    /// The file's name, of at most 63 bytes.
    pub name: String,
    /// The node that is its content.
    pub node_name: String,
}

impl ExportRegistry {
    /// Creates an export that is a directory of files; it can be used when this returns.
    ///
    /// # Errors
    /// As those of [`add`](Self::add).
    pub async fn add_directory(self: &Rc<Self>, options: &DirectoryExport) -> Result<(), Error> {
        let first = options.files.first();
        let node_name = first.map_or("", |file| file.node_name.as_str());
        let mountpoint = Some(options.mountpoint.clone());
        let entry = self.enter(&options.id, BlockExportType::Fuse, node_name, mountpoint)?;
        let started = self.start_directory(&entry, options).await;
        if started.is_err() {
            self.forget(&entry);
        }
        started
    }

    async fn start_directory(
        self: &Rc<Self>,
        entry: &Rc<Entry>,
        options: &DirectoryExport,
    ) -> Result<(), Error> {
        self.check_mountpoint_is_free(entry)?;
        let path = check_mountpoint(&options.mountpoint, true).await?;
        let placement = self.place(None)?;
        let mut backends = Vec::new();
        let started = async {
            let mut files = Vec::new();
            for file in &options.files {
                let backend = self
                    .attach(&file.node_name, &options.id, options.writable, false)
                    .await?;
                backends.push(backend.clone());
                files.push((file.name.clone(), fixed_length(backend, options.writable)));
            }
            let options = FuseOptions {
                path,
                allow_other: FuseExportAllowOther::Auto,
                io_uring: options.io_uring,
                contents: Contents::Directory(files),
            };
            FuseExport::start(&options, &placement.contexts).await
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
}

fn fixed_length(backend: Backend, writable: bool) -> FileOptions {
    FileOptions {
        backend,
        writable,
        growable: false,
        writethrough: false,
        resizes: None,
    }
}
