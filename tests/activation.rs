//! Sockets that somebody else has opened for the daemon.

use std::fs;
use std::process::Command;

use serde_json::json;

use crate::needs;
use crate::support::daemon::{Daemon, program, run_to_end};
use crate::support::{Qmp, Scratch, run_ok};

/// As a systemd socket unit starts it: the sockets are there before the daemon, which knows them by name.
#[test]
fn monitors_and_nbd_on_sockets_of_a_service_manager() {
    needs!("python3", "nbdinfo");
    let scratch = Scratch::new();
    fs::write(scratch.path("disk.raw"), vec![7; 1 << 20]).unwrap();
    // A service manager in small: listens, numbers the sockets from 3 on, and becomes the daemon.
    let manager = r#"
import os, socket, sys
names = ["monitor", "nbd"]
for number, name in enumerate(names, 3):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(name + ".sock")
    listener.listen(5)
    os.dup2(listener.fileno(), 20 + number)
for number, name in enumerate(names, 3):
    os.dup2(20 + number, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))
os.execv(sys.argv[1], sys.argv[1:])
"#;
    let mut command = Command::new("python3");
    command.args(["-c", manager]).arg(program());
    let daemon = Daemon::start_as(
        &scratch,
        command,
        &[
            "--blockdev",
            "file,node-name=disk,filename=disk.raw",
            "--nbd-server",
            "addr.type=fd,addr.str=nbd",
            "--export",
            "nbd,id=e,node-name=disk",
            "--chardev",
            "socket,id=c,fd=monitor,server=on,wait=off",
            "--monitor",
            "c",
        ],
    );
    let uri = format!(
        "nbd+unix:///disk?socket={}",
        scratch.path("nbd.sock").display()
    );
    assert_eq!(run_ok("nbdinfo", &["--size", &uri]).trim(), "1048576");
    for _ in 0..2 {
        let mut qmp = Qmp::connect(&scratch.path("monitor.sock"));
        let devices = qmp.execute("query-chardev", json!({}));
        assert!(
            devices[0]["filename"]
                .as_str()
                .unwrap()
                .starts_with("unix:"),
            "{devices}"
        );
    }
    let mut qmp = Qmp::connect(&scratch.path("monitor.sock"));
    daemon.quit(&mut qmp);
    assert!(scratch.path("monitor.sock").exists(), "it is the manager's");
}

#[test]
fn socket_that_nobody_has_passed_is_refused() {
    let scratch = Scratch::new();
    for (fd, message) in [
        ("monitor", "Unable to parse FD number monitor"),
        ("99", "File descriptor '99' is not a socket"),
        ("0", "File descriptor '0' is not a socket"),
    ] {
        let chardev = format!("socket,id=c,fd={fd},server=on,wait=off");
        let ended = run_to_end(&scratch, &["--chardev", &chardev]);
        assert_eq!(ended.code, Some(1));
        assert!(
            ended.stderr.trim_end().ends_with(message),
            "{}",
            ended.stderr
        );
    }
}
