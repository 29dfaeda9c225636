//! Files that are opened through a descriptor that somebody supplied for their name, because the name does not lead to them any
//! more: an image that is mounted over itself, or that was renamed since.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

static SUPPLIED: LazyLock<Mutex<HashMap<String, OwnedFd>>> = LazyLock::new(Mutex::default);

/// Has the name lead to the file that the descriptor is open on, from now on. The descriptor may be one that only names the file
/// (`O_PATH`): the file is opened anew, with the rights and the locks of that opening.
pub fn supply(filename: &str, file: OwnedFd) {
    table().insert(filename.to_owned(), file);
}

/// Where to open the file of that name.
pub(super) fn path_of(filename: &str) -> String {
    match table().get(filename) {
        Some(file) => format!("/proc/self/fd/{}", file.as_raw_fd()),
        None => filename.to_owned(),
    }
}

fn table() -> MutexGuard<'static, HashMap<String, OwnedFd>> {
    SUPPLIED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn supplied_file_is_found_where_its_name_leads_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, "right").unwrap();
        let name = path.to_str().unwrap();
        assert_eq!(path_of(name), name);
        supply(name, File::open(&path).unwrap().into());
        std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        std::fs::write(&path, "wrong").unwrap();
        assert_eq!(std::fs::read_to_string(path_of(name)).unwrap(), "right");
    }
}
