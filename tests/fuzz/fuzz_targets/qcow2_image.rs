//! An image that may be anything: eight bytes of seed, and then its file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some((seed, image)) = data.split_first_chunk() {
        stord_block::fuzzing::use_untrusted(u64::from_le_bytes(*seed), image);
    }
});
