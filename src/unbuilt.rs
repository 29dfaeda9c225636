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
    "nbd",
    "nfs",
    "nvme",
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
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
    "vdi",
    "vduse-blk",
    "vhdx",
    "vhost-user-blk",
    "vmdk",
    "vpc",
    "vvfat",
];

/// Adds the advice to an error about an option's value, if it is one of those.
pub fn explain(error: Error) -> Error {
    let refused = error
        .message
        .rsplit_once("does not accept value '")
        .and_then(|(_, rest)| rest.strip_suffix('\''));
    match refused {
        Some(value) if KNOWN.contains(&value) => {
            let advice = format!("stord does not have '{value}' yet.");
            error.with_hint(advice)
        }
        _ => error,
    }
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
            explained("nbd").as_deref(),
            Some("stord does not have 'nbd' yet.")
        );
        assert_eq!(explained("nope"), None);
        assert_eq!(explain(Error::generic("something else")).hint, None);
    }
}
