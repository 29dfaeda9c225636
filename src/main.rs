//! The stord daemon.

fn main() {}
