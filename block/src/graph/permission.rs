//! Permissions: what a user of a node does with it, and what it lets others do meanwhile.
//!
//! Every edge and every backend has a set it needs (`permissions`) and a set it tolerates in others (`shared`). A node's users agree
//! when each one's needs lie within what every other one shares. The file driver carries the same sets to other processes as locks.

use bitflags::bitflags;

bitflags! {
    /// A set of permissions; the bit numbers are those of the lock bytes in image files.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Permissions: u8 {
        /// Reads see a consistent state.
        const CONSISTENT_READ = 1;
        /// Writes that change the content.
        const WRITE = 2;
        /// Writes that leave the guest-visible content as it is.
        const WRITE_UNCHANGED = 4;
        /// Changes of the length.
        const RESIZE = 8;
    }
}

impl Permissions {
    /// What any writer needs.
    pub const WRITABLE: Self = Self::WRITE.union(Self::WRITE_UNCHANGED);

    /// The reference's names of the set's members, joined with ", ".
    pub fn names(self) -> String {
        const NAMES: [(Permissions, &str); 4] = [
            (Permissions::CONSISTENT_READ, "consistent read"),
            (Permissions::WRITE, "write"),
            (Permissions::WRITE_UNCHANGED, "write unchanged"),
            (Permissions::RESIZE, "resize"),
        ];
        let held: Vec<&str> = NAMES
            .iter()
            .filter(|(bit, _)| self.contains(*bit))
            .map(|(_, name)| *name)
            .collect();
        held.join(", ")
    }
}
