//! The NBD server, asked by everybody who speaks NBD: libnbd, QEMU, nbdkit, fio, and some who do not speak it well.

mod crowd;
mod hostile;
mod oracle;
mod peers;
mod people;
mod sessions;
mod tls;
mod tools;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::daemon::{Daemon, program};
use crate::support::disk::MIB;
use crate::support::model::assert_same;
use crate::support::run::{Ended, limited, run_ok};
use crate::support::{Qmp, Scratch, qemu};

const SIZE: u64 = BYTES as u64;
const BYTES: usize = 64 * MIB;

/// A daemon that exports a qcow2 image over NBD.
struct Served {
    scratch: Scratch,
    image: PathBuf,
    socket: PathBuf,
    daemon: Daemon,
}

impl Served {
    /// Serves an image with this content from the start on; `server` and `export` are further options with commas in front.
    fn start(content: &[u8], server: &str, export: &str) -> Served {
        let scratch = Scratch::in_memory();
        let image = scratch.path("disk.qcow2");
        qemu::create(&image, SIZE, "");
        if !content.is_empty() {
            let raw = scratch.file("content", content);
            run_ok(
                "qemu-img",
                &[
                    "dd",
                    "-f",
                    "raw",
                    "-O",
                    "qcow2",
                    "bs=1M",
                    &format!("if={}", raw.display()),
                    &format!("of={}", image.display()),
                ],
            );
            qemu::img(&["resize", "-q", image.to_str().unwrap(), &SIZE.to_string()]);
        }
        Served::start_over(scratch, image, &[], server, export)
    }

    /// Serves an empty image from a process that may have so many descriptors.
    fn start_limited(descriptors: u32, server: &str) -> Served {
        let scratch = Scratch::in_memory();
        let image = scratch.path("disk.qcow2");
        qemu::create(&image, SIZE, "");
        let mut command = Command::new("prlimit");
        command
            .arg(format!("--nofile={descriptors}:{descriptors}"))
            .arg(program());
        Served::start_as(scratch, image, command, &[], server, "")
    }

    fn start_over(
        scratch: Scratch,
        image: PathBuf,
        before: &[&str],
        server: &str,
        export: &str,
    ) -> Served {
        let command = Command::new(program());
        Served::start_as(scratch, image, command, before, server, export)
    }

    fn start_as(
        scratch: Scratch,
        image: PathBuf,
        command: Command,
        before: &[&str],
        server: &str,
        export: &str,
    ) -> Served {
        let socket = scratch.path("nbd.sock");
        let mut args: Vec<String> = before.iter().map(|arg| (*arg).to_owned()).collect();
        args.extend([
            "--blockdev".to_owned(),
            format!(
                "driver=file,node-name=file,discard=unmap,filename={}",
                image.display()
            ),
            "--blockdev".to_owned(),
            "driver=qcow2,node-name=disk,discard=unmap,file=file".to_owned(),
            "--nbd-server".to_owned(),
            format!("addr.type=unix,addr.path={}{server}", socket.display()),
            "--export".to_owned(),
            format!("type=nbd,id=e,node-name=disk{export}"),
            "--chardev".to_owned(),
            "socket,id=qmp,path=qmp.sock,server=on,wait=off".to_owned(),
            "--monitor".to_owned(),
            "chardev=qmp".to_owned(),
        ]);
        let daemon = Daemon::start_as(&scratch, command, &args);
        Served {
            scratch,
            image,
            socket,
            daemon,
        }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket.display())
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(&self.scratch.path("qmp.sock"))
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        stream
    }

    /// Runs a script of nbdsh with the export open as `h`; `assert` in it makes the test fail.
    #[track_caller]
    fn nbdsh(&self, script: &str) {
        let connect = format!("h.connect_uri('{}')", self.uri());
        let output = nbdsh().args(["-c", &connect, "-c", script]).output();
        let ended = Ended::from(output.unwrap());
        assert!(ended.success(), "{}\n{}", ended.stdout, ended.stderr);
    }

    /// Ends the daemon and asserts that the image is sound and holds `content`.
    #[track_caller]
    fn assert_image_is(self, content: &[u8]) {
        self.daemon.stop();
        qemu::assert_clean(&self.image);
        let got = qemu::content(&self.scratch, &self.image, "qcow2");
        assert_same("the image", &got, content);
    }
}

/// libnbd's shell. It takes the first Python of the path, which has to be the one that the package is for.
fn nbdsh() -> Command {
    let mut command = limited("nbdsh");
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:{path}"));
    command
}

/// An `nbdsh` that holds the export open.
struct Holder(Child);

impl Holder {
    fn start(served: &Served) -> Holder {
        let connect = format!("h.connect_uri('{}')", served.uri());
        let mut child = nbdsh()
            .args([
                "-c",
                &connect,
                "-c",
                "import sys; print('here', flush=True); sys.stdin.read()",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut word = [0; 4];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut word)
            .unwrap();
        assert_eq!(&word, b"here");
        Holder(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // It may have been killed.
        let _ = self.0.wait();
    }
}
