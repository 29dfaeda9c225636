//! The file systems that this process serves itself: opening an image on one of them would make the daemon wait for itself.

use std::sync::{Mutex, PoisonError};

static DEVICES: Mutex<Vec<u64>> = Mutex::new(Vec::new());

/// Notes a file system served by this process, by its device number.
pub fn add(device: u64) {
    DEVICES
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(device);
}

/// Forgets one.
pub fn remove(device: u64) {
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(at) = devices.iter().position(|known| *known == device) {
        devices.swap_remove(at);
    }
}

/// Whether this process serves the file system.
pub fn contains(device: u64) -> bool {
    DEVICES
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .contains(&device)
}
