//! A life of an image, next to a plain vector of bytes that must agree with it; afterwards the check must find nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| stord_block::fuzzing::live_beside_model(data));
