//! I/O contexts: one thread, one loop, one ring, for stord.
