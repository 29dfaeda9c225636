//! The attributes of an exported file or directory: who owns it, who may use it, and when it changed.
//!
//! They live as long as the export. The kernel enforces them (`default_permissions`); what may be set is decided here: without
//! `allow_other` only the daemon's user can reach the file, so that a mode or an owner promising more is refused, and a read-only
//! export has no write bits.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::time::{ClockId, clock_gettime};
use nix::unistd::{getgid, getuid};
use serde_json::{Value, json};
use stord_aio::Errno;

use super::abi::{Attr, SetattrIn, SetattrValid};
use super::request::Setattr;

const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const PERMISSION_BITS: u32 = 0o7777;
const WRITE_BITS: u32 = 0o222;
const GROUP_AND_OTHERS: u32 = 0o077;
const OWNER_READS: u32 = 0o400;
const OWNER_WRITES: u32 = 0o200;
const OWNER_SEARCHES: u32 = 0o100;
/// Unit of `Attr::blocks`, in bytes.
const BLOCK: u64 = 512;
const NANOSECONDS: u64 = 1_000_000_000;

/// The attributes that are not the image's.
pub(super) struct Attributes {
    /// The type bits of the mode.
    kind: u32,
    writable: bool,
    allow_other: bool,
    state: Mutex<State>,
    /// Nanoseconds since the epoch; apart from the rest, because every write sets it.
    modified: AtomicU64,
}

struct State {
    mode: u32,
    uid: u32,
    gid: u32,
    /// Nanoseconds since the epoch.
    accessed: u64,
    changed: u64,
}

impl Attributes {
    /// The attributes of a new file: the daemon's user owns it, and nobody else may use it.
    pub(super) fn of_file(writable: bool, allow_other: bool) -> Self {
        let writes = if writable { OWNER_WRITES } else { 0 };
        Self::new(S_IFREG, OWNER_READS | writes, writable, allow_other)
    }

    /// The attributes of a directory that nobody can change.
    pub(super) fn of_directory(allow_other: bool) -> Self {
        Self::new(S_IFDIR, OWNER_READS | OWNER_SEARCHES, false, allow_other)
    }

    fn new(kind: u32, permissions: u32, writable: bool, allow_other: bool) -> Self {
        let now = now();
        Self {
            kind,
            writable,
            allow_other,
            state: Mutex::new(State {
                mode: kind | permissions,
                uid: getuid().as_raw(),
                gid: getgid().as_raw(),
                accessed: now,
                changed: now,
            }),
            modified: AtomicU64::new(now),
        }
    }

    /// Notes a change of the content.
    pub(super) fn touch(&self) {
        self.modified.store(now(), Ordering::Relaxed);
    }

    /// The attributes of `node` on the wire. `size` and `allocated` are the image's, in bytes.
    pub(super) fn to_wire(&self, node: u64, size: u64, allocated: u64, block_size: u32) -> Attr {
        let modified = self.modified.load(Ordering::Relaxed);
        let state = self.lock();
        // A change of the content is one of the attributes too.
        let changed = state.changed.max(modified);
        Attr {
            ino: node,
            size,
            blocks: allocated.div_ceil(BLOCK),
            atime: state.accessed / NANOSECONDS,
            atimensec: fraction(state.accessed),
            mtime: modified / NANOSECONDS,
            mtimensec: fraction(modified),
            ctime: changed / NANOSECONDS,
            ctimensec: fraction(changed),
            mode: state.mode,
            nlink: if self.kind == S_IFDIR { 2 } else { 1 },
            uid: state.uid,
            gid: state.gid,
            rdev: 0,
            blksize: block_size,
            flags: 0,
        }
    }

    /// Whether the attributes may be changed in this way; a size is not looked at.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for an attribute that cannot be set, `EROFS` and `EPERM` for a mode that promises too much.
    pub(super) fn check(&self, change: &Setattr) -> Result<(), Errno> {
        let owner = SetattrValid::UID | SetattrValid::GID;
        if change.unknown != 0 || (change.valid.intersects(owner) && !self.allow_other) {
            return Err(Errno::EOPNOTSUPP);
        }
        if change.valid.contains(SetattrValid::MODE) {
            if !self.writable && change.values.mode & WRITE_BITS != 0 {
                return Err(Errno::EROFS);
            }
            if !self.allow_other && change.values.mode & GROUP_AND_OTHERS != 0 {
                return Err(Errno::EPERM);
            }
        }
        Ok(())
    }

    /// Changes them, after `check`.
    pub(super) fn change(&self, change: &Setattr) {
        let (valid, values) = (change.valid, &change.values);
        let mut state = self.lock();
        if valid.contains(SetattrValid::MODE) {
            state.mode = self.kind | (values.mode & PERMISSION_BITS);
        }
        if valid.contains(SetattrValid::UID) {
            state.uid = values.uid;
        }
        if valid.contains(SetattrValid::GID) {
            state.gid = values.gid;
        }
        state.changed = now();
        if let Some(accessed) = accessed(valid, values) {
            state.accessed = accessed;
        }
        if let Some(modified) = modified(valid, values) {
            self.modified.store(modified, Ordering::Relaxed);
        }
    }

    /// All of them, for [`restore`](Self::restore).
    pub(super) fn save(&self) -> Value {
        let state = self.lock();
        json!({
            "mode": state.mode & PERMISSION_BITS,
            "uid": state.uid,
            "gid": state.gid,
            "accessed": state.accessed,
            "changed": state.changed,
            "modified": self.modified.load(Ordering::Relaxed),
        })
    }

    /// Takes on what [`save`](Self::save) gave; what is missing stays as it is.
    pub(super) fn restore(&self, saved: &Value) {
        let number = |key: &str| saved.get(key).and_then(Value::as_u64);
        let small = |key: &str| number(key).and_then(|value| u32::try_from(value).ok());
        let mut state = self.lock();
        if let Some(mode) = small("mode") {
            state.mode = self.kind | (mode & PERMISSION_BITS);
        }
        state.uid = small("uid").unwrap_or(state.uid);
        state.gid = small("gid").unwrap_or(state.gid);
        state.accessed = number("accessed").unwrap_or(state.accessed);
        state.changed = number("changed").unwrap_or(state.changed);
        if let Some(modified) = number("modified") {
            self.modified.store(modified, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accessed(valid: SetattrValid, values: &SetattrIn) -> Option<u64> {
    if valid.contains(SetattrValid::ATIME_NOW) {
        return Some(now());
    }
    let set = valid.contains(SetattrValid::ATIME);
    set.then(|| nanoseconds(values.atime, values.atimensec))
}

fn modified(valid: SetattrValid, values: &SetattrIn) -> Option<u64> {
    if valid.contains(SetattrValid::MTIME_NOW) {
        return Some(now());
    }
    let set = valid.contains(SetattrValid::MTIME);
    set.then(|| nanoseconds(values.mtime, values.mtimensec))
}

fn nanoseconds(seconds: u64, fraction: u32) -> u64 {
    seconds
        .saturating_mul(NANOSECONDS)
        .saturating_add(fraction.into())
}

fn fraction(time: u64) -> u32 {
    u32::try_from(time % NANOSECONDS).expect("less than 2^30")
}

/// The time to the precision of the kernel's tick, which file systems use too.
fn now() -> u64 {
    match clock_gettime(ClockId::CLOCK_REALTIME_COARSE) {
        Ok(time) => nanoseconds(
            u64::try_from(time.tv_sec()).unwrap_or(0),
            u32::try_from(time.tv_nsec()).unwrap_or(0),
        ),
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setattr(valid: SetattrValid, values: SetattrIn) -> Setattr {
        Setattr {
            valid,
            unknown: 0,
            values,
        }
    }

    fn chmod(mode: u32) -> Setattr {
        setattr(
            SetattrValid::MODE,
            SetattrIn {
                mode,
                ..SetattrIn::default()
            },
        )
    }

    #[test]
    fn a_new_file_is_for_its_owner_only() {
        let mode = |writable| {
            Attributes::of_file(writable, true)
                .to_wire(1, 0, 0, 4096)
                .mode
        };
        assert_eq!(mode(false), 0o100_400);
        assert_eq!(mode(true), 0o100_600);
    }

    #[test]
    fn modes_that_promise_too_much_are_refused() {
        let private = Attributes::of_file(true, false);
        assert_eq!(private.check(&chmod(0o640)), Err(Errno::EPERM));
        assert_eq!(private.check(&chmod(0o4700)), Ok(()));
        let read_only = Attributes::of_file(false, true);
        assert_eq!(read_only.check(&chmod(0o600)), Err(Errno::EROFS));
        assert_eq!(read_only.check(&chmod(0o444)), Ok(()));
    }

    #[test]
    fn the_owner_can_be_changed_only_where_others_may_come_in() {
        let chown = setattr(
            SetattrValid::UID,
            SetattrIn {
                uid: 77,
                ..SetattrIn::default()
            },
        );
        let private = Attributes::of_file(true, false);
        assert_eq!(private.check(&chown), Err(Errno::EOPNOTSUPP));
        let open = Attributes::of_file(true, true);
        assert_eq!(open.check(&chown), Ok(()));
        open.change(&chown);
        assert_eq!(open.to_wire(1, 0, 0, 4096).uid, 77);
    }

    #[test]
    fn times_can_be_set_and_a_write_moves_them_on() {
        let attributes = Attributes::of_file(true, true);
        attributes.change(&setattr(
            SetattrValid::MTIME,
            SetattrIn {
                mtime: 5,
                mtimensec: 7,
                ..SetattrIn::default()
            },
        ));
        let wire = attributes.to_wire(1, 0, 0, 4096);
        assert_eq!((wire.mtime, wire.mtimensec), (5, 7));
        attributes.touch();
        assert!(attributes.to_wire(1, 0, 0, 4096).mtime > 5);
    }

    #[test]
    fn attributes_survive_a_change_of_process() {
        let old = Attributes::of_file(true, true);
        old.change(&chmod(0o640));
        let new = Attributes::of_file(true, true);
        new.restore(&old.save());
        assert_eq!(new.to_wire(1, 0, 0, 4096).mode, 0o100_640);
        assert_eq!(new.save(), old.save());
        new.restore(&json!({"mode": "odd", "uid": -1}));
        assert_eq!(new.save(), old.save());
    }

    #[test]
    fn blocks_are_what_is_allocated() {
        let wire = Attributes::of_file(true, true).to_wire(1, 1 << 30, 4097, 4096);
        assert_eq!((wire.size, wire.blocks), (1 << 30, 9));
    }
}
