//! The serial number of a device: what the user says, or one that an image has as long as it stays where it is.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// What a virtio disk can tell, in bytes.
const LONGEST: usize = 20;

/// Looks whether a serial number can be one.
///
/// # Errors
/// It is too long, or udev would have to change it.
pub fn check(text: &str) -> Result<String, String> {
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:+@#=".contains(&byte);
    if text.is_empty() || text.len() > LONGEST {
        return Err(format!("it has 1 to {LONGEST} characters"));
    }
    if !text.bytes().all(is_fit) {
        return Err("it consists of letters, digits and -_.:+@#=".to_owned());
    }
    Ok(text.to_owned())
}

/// The serial number of an image, or of a partition of it.
pub fn of(given: Option<&str>, image: &Path, partition: Option<u32>) -> String {
    match given {
        Some(given) => given.to_owned(),
        None => {
            let number = partition.unwrap_or(0).to_le_bytes();
            let bytes = image.as_os_str().as_bytes().iter().chain(&number);
            format!("stord-{:014x}", hash(bytes) >> 8)
        }
    }
}

/// FNV-1a, which is the same in every version of everything.
fn hash<'b>(bytes: impl Iterator<Item = &'b u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_and_partitions_have_serials_of_their_own() {
        let whole = of(None, Path::new("/images/a"), None);
        assert_eq!(whole.len(), LONGEST);
        assert_eq!(check(&whole), Ok(whole.clone()));
        assert_eq!(whole, of(None, Path::new("/images/a"), None));
        assert_ne!(whole, of(None, Path::new("/images/b"), None));
        assert_ne!(whole, of(None, Path::new("/images/a"), Some(1)));
        assert_eq!(of(Some("mine"), Path::new("/images/a"), None), "mine");
    }

    #[test]
    fn serials_that_udev_would_change_are_refused() {
        for bad in ["", "a b", "a/b", "äh", "123456789012345678901"] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
