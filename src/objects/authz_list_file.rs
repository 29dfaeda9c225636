//! `authz-list-file`: rules in a file, read again whenever it changes. The file's directory is
//! watched rather than the file, since editors put another file in its place.
//!
//! The reference lists this type as `authz-listfile`, which it then cannot create, and documents it
//! as `authz-list-file`. Both are taken.

use std::cell::RefCell;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::Value;
use stord_credentials::Credential;
use stord_credentials::authorization::ListFile;
use stord_qmp::schema::object::AuthZListFileProperties;
use stord_qmp::{Error, from_json_member};
use tokio::io::Interest;
use tokio::task::AbortHandle;

use super::class::{Class, Form, Property};
use super::{Object, blocking, unknown};
use crate::report::{Origin, reason};
use stord_sockets::Polled;

/// The type.
pub const CLASS: Class = Class {
    name: "authz-list-file",
    parent: Some("authz"),
    form: Form::Creatable,
    properties: &[
        Property::new("filename", "string"),
        Property::new("refresh", "bool"),
    ],
};

/// The rules.
pub struct AuthzListFile {
    rules: Arc<ListFile>,
    watch: RefCell<Option<Watch>>,
}

/// The task that reads the file again, ended when dropped.
struct Watch(AbortHandle);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl AuthzListFile {
    /// Reads the file, and watches it unless told otherwise. Needs a `LocalSet`.
    ///
    /// # Errors
    /// The file cannot be read, holds no rules, or cannot be watched.
    pub async fn open(properties: AuthZListFileProperties) -> Result<Self, Error> {
        let AuthZListFileProperties { filename, refresh } = properties;
        // Watched first, so that no change between reading and watching is missed.
        let inotify = match refresh.unwrap_or(true) {
            true => Some(watch_directory(Path::new(&filename))?),
            false => None,
        };
        let rules = blocking(move || ListFile::open(Path::new(&filename))).await?;
        let rules = Arc::new(rules);
        let watch = inotify.map(|inotify| Watch::start(inotify, &rules));
        Ok(Self {
            rules,
            watch: RefCell::new(watch),
        })
    }
}

impl Object for AuthzListFile {
    fn class(&self) -> &'static Class {
        &CLASS
    }

    fn get(&self, property: &str) -> Result<Value, Error> {
        match property {
            "filename" => Ok(self.rules.path().to_string_lossy().into()),
            "refresh" => Ok(self.watch.borrow().is_some().into()),
            _ => Err(unknown(&CLASS, property)),
        }
    }

    fn set(&self, property: &str, value: Value) -> Result<(), Error> {
        match property {
            "filename" => {
                let filename: String = from_json_member(property, value)?;
                if Path::new(&filename) != self.rules.path() {
                    return Err(Error::generic(
                        "The file cannot be changed once its rules are in force",
                    ));
                }
            }
            "refresh" => {
                let refresh: bool = from_json_member(property, value)?;
                let mut watch = self.watch.borrow_mut();
                if !refresh {
                    *watch = None;
                } else if watch.is_none() {
                    let inotify = watch_directory(self.rules.path())?;
                    *watch = Some(Watch::start(inotify, &self.rules));
                }
            }
            _ => return Err(unknown(&CLASS, property)),
        }
        Ok(())
    }

    fn credential(&self) -> Credential {
        Credential::Authorization(Arc::clone(&self.rules) as Arc<_>)
    }
}

impl Watch {
    fn start(inotify: Changes, rules: &Arc<ListFile>) -> Self {
        let rules = Arc::clone(rules);
        let task = tokio::task::spawn_local(async move {
            while let Ok(()) = inotify.next().await {
                let again = Arc::clone(&rules);
                if let Err(error) = blocking(move || again.reload()).await {
                    Origin::none().warning(&error.message, Some("Until it can, nobody is let in."));
                }
            }
        });
        Self(task.abort_handle())
    }
}

/// Changes of one file in a directory.
struct Changes {
    inotify: Polled<Inotify>,
    name: OsString,
}

impl Changes {
    /// Waits for a change.
    async fn next(&self) -> io::Result<()> {
        loop {
            let read = |inotify: &Inotify| Ok(inotify.read_events()?);
            let events = self.inotify.transfer(Interest::READABLE, read).await?;
            // Without a name there were more events than the kernel keeps.
            let is_ours = |name: &Option<OsString>| name.as_ref().is_none_or(|n| *n == self.name);
            if events.iter().any(|event| is_ours(&event.name)) {
                return Ok(());
            }
        }
    }
}

fn watch_directory(path: &Path) -> Result<Changes, Error> {
    let shown = path.display();
    let failed = |error: io::Error| {
        let reason = reason(&error);
        Error::generic(format!("Unable to watch '{shown}': {reason}")).with_source(error)
    };
    let name = path.file_name().ok_or_else(|| {
        Error::generic(format!(
            "Unable to watch '{shown}': it does not name a file"
        ))
    })?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
        .map_err(|errno| failed(errno.into()))?;
    let changes = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_DELETE;
    inotify
        .add_watch(&directory, changes)
        .map_err(|errno| failed(errno.into()))?;
    Ok(Changes {
        inotify: Polled::new(inotify, Interest::READABLE).map_err(failed)?,
        name: name.to_owned(),
    })
}
