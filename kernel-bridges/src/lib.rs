//! Exports of stord: FUSE, VDUSE, vhost-user-blk, NBD.
