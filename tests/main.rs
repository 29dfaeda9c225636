//! Integration tests: the built daemon seen from outside, as its users see it.

mod support;

mod activation;
mod bad_images;
mod bad_input;
mod bitmaps;
mod client;
mod compress;
mod content;
mod conversation;
mod crash;
mod exerciser;
mod file_systems;
mod fuse_file;
mod fuse_life;
mod fuse_semantics;
mod hostile_clients;
mod image_commands;
mod io_errors;
mod locking;
mod memory;
mod mount_command;
mod mount_partitions;
mod nbd;
mod nbd_client;
mod nodes;
mod parallel_writes;
mod qmp_clients;
mod qmp_programs;
mod schema;
mod sequences;
mod snapshots;
mod takeover;
mod tls;
mod vm;
mod writes;
