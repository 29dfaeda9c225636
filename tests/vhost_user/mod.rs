//! The vhost-user-blk export, against a front end and a guest's driver that are written here, and against virtual machines.

#![expect(
    clippy::cast_possible_truncation,
    reason = "disk and memory are small, and offsets into them are u64 on the wire"
)]

mod driver;
mod front_end;
mod hostile;
mod machines;
mod protocol;
mod recovery;

use std::path::PathBuf;

use crate::support::daemon::Daemon;
use crate::support::model;
use crate::support::{Qmp, Scratch};

use driver::{Machine, Queue};
use front_end::FrontEnd;

/// Bytes of the disk.
const SIZE: u64 = 32 << 20;

fn noise(seed: u64, len: u64) -> Vec<u8> {
    model::noise(seed, usize::try_from(len).unwrap())
}

/// A daemon with an export.
struct Served {
    daemon: Daemon,
    scratch: Scratch,
    socket: PathBuf,
    /// What further daemons are started with.
    args: Vec<String>,
}

impl Served {
    /// A raw image of that content, padded with zeroes, as `node-name=disk`; `export` are further options.
    #[track_caller]
    fn start(content: &[u8], export: &str) -> Self {
        let scratch = Scratch::new();
        let image = scratch.path("disk.raw");
        std::fs::write(&image, content).unwrap();
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        file.set_len(SIZE).unwrap();
        let socket = scratch.path("vhost.sock");
        let args = vec![
            "--chardev".to_owned(),
            "socket,id=m,path=qmp.sock,server=on,wait=off".to_owned(),
            "--monitor".to_owned(),
            "m".to_owned(),
            "--blockdev".to_owned(),
            "file,node-name=disk,filename=disk.raw,discard=unmap".to_owned(),
            "--export".to_owned(),
            format!(
                "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={}{export}",
                socket.display()
            ),
        ];
        Self {
            daemon: Daemon::start(&scratch, &args),
            scratch,
            socket,
            args,
        }
    }

    #[track_caller]
    fn qmp(&self) -> Qmp {
        Qmp::connect(&self.scratch.path("qmp.sock"))
    }

    /// A front end that has agreed on everything.
    #[track_caller]
    fn front_end(&self) -> FrontEnd {
        let mut front = FrontEnd::connect(&self.socket);
        front.agree();
        front
    }

    /// A front end with a machine and one queue that runs.
    #[track_caller]
    fn guest(&self) -> (FrontEnd, Machine, Queue) {
        let mut front = self.front_end();
        let machine = Machine::new();
        machine.share(&mut front);
        let queue = Queue::new(&machine, 0);
        queue.start(&mut front, 0);
        (front, machine, queue)
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.scratch.path("disk.raw")).unwrap()
    }
}
