//! Tells a value that the reference knows and stord does not have yet from one that nobody knows:
//! the message stays the reference's, and the advice says which of the two it is.

use stord_qmp::Error;

/// Drivers, exports and objects of the reference. What is built is accepted before anybody looks
/// here.
const KNOWN: &[&str] = &[
    "authz-pam",
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "bochs",
    "cloop",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "dmg",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "http",
    "https",
    "iscsi",
    "luks",
    "nfs",
    "nvme",
    "nvme-io_uring",
    "parallels",
    "pr-manager-helper",
    "preallocate",
    "qcow",
    "qed",
    "quorum",
    "rbd",
    "replication",
    "snapshot-access",
    "ssh",
    "throttle",
    "throttle-group",
    "vdi",
    "vhdx",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-vdpa",
    "vmdk",
    "vpc",
    "vvfat",
];

/// Adds the advice to an error about an option's value, if it is one of those.
pub fn explain(error: Error) -> Error {
    let value = quoted(&error.message, "does not accept value '", "'");
    let known = value.filter(|value| KNOWN.contains(value));
    match known {
        Some(name) => {
            let advice = format!("stord does not have '{name}' yet.");
            error.with_hint(advice)
        }
        None => error,
    }
}

/// What stands between the two texts, the second of which ends the message.
fn quoted<'m>(message: &'m str, before: &str, after: &str) -> Option<&'m str> {
    let (_, rest) = message.split_once(before)?;
    rest.strip_suffix(after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_reference_knows_is_explained() {
        let explained = |value: &str| {
            let message = format!("Parameter 'type' does not accept value '{value}'");
            explain(Error::generic(message)).hint
        };
        assert_eq!(
            explained("throttle").as_deref(),
            Some("stord does not have 'throttle' yet.")
        );
        assert_eq!(explained("nope"), None);
        assert_eq!(explain(Error::generic("something else")).hint, None);
    }
}
