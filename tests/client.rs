//! `stord qmp`, the client for people, against stord's monitor and QEMU's.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use nix::pty::openpty;
use serde_json::{Value, json};

use crate::needs;
use crate::support::daemon::{Daemon, is_qemu, program};
use crate::support::run::{Ended, run_in};
use crate::support::{Scratch, eventually};

const MONITOR: [&str; 4] = [
    "--chardev",
    "socket,id=c,path=qmp.sock,server=on,wait=off",
    "--monitor",
    "c",
];

/// A daemon of each make, with its name, listening on qmp.sock.
fn with_both(test: impl Fn(&Scratch, &str)) {
    for name in ["stord", "qemu-storage-daemon"] {
        let scratch = Scratch::new();
        let command = match name {
            "stord" => Command::new(program()),
            other => Command::new(other),
        };
        let daemon = Daemon::start_as(&scratch, command, &MONITOR);
        test(&scratch, name);
        daemon.stop();
    }
}

fn qmp(scratch: &Scratch, args: &[&str]) -> Ended {
    let mut all = vec!["qmp", "qmp.sock"];
    all.extend(args);
    run_in(scratch.dir(), program(), &all)
}

#[track_caller]
fn result(scratch: &Scratch, args: &[&str]) -> Value {
    let ended = qmp(scratch, args);
    assert!(ended.success(), "{args:?}: {ended:?}");
    serde_json::from_str(&ended.stdout).unwrap()
}

#[test]
fn commands_are_done_and_refused() {
    needs!("qemu-storage-daemon");
    if is_qemu() {
        return;
    }
    with_both(|scratch, name| {
        assert_eq!(
            result(scratch, &["query-version"])["qemu"]["major"],
            10,
            "{name}"
        );
        let node = ["driver=null-co", "node-name=a,b"];
        let refused = qmp(scratch, &["blockdev-add", node[0], node[1]]);
        assert_eq!(refused.code, Some(1));
        assert_eq!(refused.stdout, "");
        assert!(
            refused.stderr.contains("Invalid node-name: 'a,b'"),
            "{}",
            refused.stderr
        );
        for arguments in [
            &[
                "driver=null-co",
                "node-name=one",
                "size=1G",
                "read-zeroes=on",
            ][..],
            &["{\"driver\": \"null-co\", \"node-name\": \"two\", \"size\": 512}"],
            &[
                "driver=raw",
                "node-name=three",
                "file.driver=null-co",
                "file.size=1M",
                "read-only=true",
            ],
            &["driver=raw", "node-name=four", "file=two", "size=512"],
        ] {
            let all = [&["blockdev-add"], arguments].concat();
            assert_eq!(result(scratch, &all), json!({}), "{name} {arguments:?}");
        }
        let nodes = result(scratch, &["query-named-block-nodes", "flat=true"]);
        let size = |name: &str| {
            let mut nodes = nodes.as_array().unwrap().iter();
            let node = nodes.find(|node| node["node-name"] == name);
            node.unwrap()["image"]["virtual-size"].as_u64().unwrap()
        };
        assert_eq!(
            ["one", "two", "three", "four"].map(size),
            [1 << 30, 512, 1 << 20, 512]
        );
        for (args, message) in [
            (
                &["no-such-command"][..],
                "The command no-such-command has not been found",
            ),
            (&["blockdev-del"], "Parameter 'node-name' is missing"),
            (&["blockdev-del", "node-name=two"], "two"),
            (
                &["blockdev-del", "two"],
                "'two' is neither key=value nor a JSON object",
            ),
            (&["blockdev-del", "{"], "the arguments are no JSON"),
        ] {
            let refused = qmp(scratch, args);
            assert_eq!(refused.code, Some(1), "{name} {args:?}");
            assert!(
                refused.stderr.contains(message),
                "{name} {args:?}: {}",
                refused.stderr
            );
        }
    });
    let scratch = Scratch::new();
    let ended = qmp(&scratch, &["query-version"]);
    assert_eq!(ended.code, Some(1));
    assert_eq!(
        ended.stderr,
        "stord: cannot connect to 'qmp.sock': No such file or directory\n"
    );
}

#[test]
fn events_are_watched() {
    if is_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let args = [
        &MONITOR[..],
        &[
            "--chardev",
            "socket,id=d,path=other.sock,server=on,wait=off",
            "--monitor",
            "d",
        ],
    ]
    .concat();
    let daemon = Daemon::start(&scratch, &args);
    scratch.empty_file("image.raw");
    let mut watcher = Command::new(program())
        .args(["qmp", "other.sock", "query-version", "--watch"])
        .current_dir(scratch.dir())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watcher.stdout.take().unwrap()).lines();
    // The result is the sign that the watcher is there.
    let mut text = String::new();
    while serde_json::from_str::<Value>(&text).is_err() {
        text += &lines.next().unwrap().unwrap();
    }
    let size = ["options={\"driver\": \"file\", \"filename\": \"image.raw\", \"size\": 512}"];
    result(&scratch, &["blockdev-create", "job-id=make", size[0]]);
    let event: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(event["event"], "JOB_STATUS_CHANGE");
    assert_eq!(event["data"]["id"], "make");
    daemon.stop();
    assert!(watcher.wait().unwrap().success(), "it ends with the daemon");
}

/// A shell on a terminal.
struct Shell {
    keys: File,
    screen: std::sync::mpsc::Receiver<u8>,
    seen: String,
    child: std::process::Child,
}

impl Shell {
    fn start(scratch: &Scratch) -> Shell {
        let terminal = openpty(None, None).unwrap();
        let slave = |fd: &OwnedFd| Stdio::from(fd.try_clone().unwrap());
        let child = Command::new(program())
            .args(["qmp", "qmp.sock"])
            .current_dir(scratch.dir())
            .env("TERM", "xterm")
            .env("XDG_STATE_HOME", scratch.path("state"))
            .env_remove("NO_COLOR")
            .stdin(slave(&terminal.slave))
            .stdout(slave(&terminal.slave))
            .stderr(slave(&terminal.slave))
            .spawn()
            .unwrap();
        drop(terminal.slave);
        let keys = File::from(terminal.master);
        let mut master = keys.try_clone().unwrap();
        let (sender, screen) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut byte = [0];
            while matches!(master.read(&mut byte), Ok(1)) && sender.send(byte[0]).is_ok() {}
        });
        Shell {
            keys,
            screen,
            seen: String::new(),
            child,
        }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the screen has shown this since it was asked last.
    #[track_caller]
    fn expect(&mut self, text: &str) {
        eventually(&format!("'{text}' in {:?}", self.seen), 60, || {
            while let Ok(byte) = self.screen.try_recv() {
                self.seen.push(char::from(byte));
            }
            self.seen.contains(text)
        });
        let at = self.seen.find(text).unwrap();
        self.seen.drain(..at + text.len());
    }
}

#[test]
fn shell_completes_remembers_and_shows_errors() {
    needs!("qemu-storage-daemon");
    if is_qemu() {
        return;
    }
    with_both(|scratch, _| {
        let mut shell = Shell::start(scratch);
        shell.expect("'help' explains");
        shell.expect("qmp> ");
        shell.press("query-ver\t\r");
        shell.expect("\x1b[36m\"major\"\x1b[0m: \x1b[33m10\x1b[0m");
        shell.expect("qmp> ");
        shell.press("blockdev-add driver=null-c\tnode-n\tdisk siz\t1M\r");
        shell.expect("{}");
        shell.press("query-named-block-nodes\r");
        shell.expect("\x1b[32m\"disk\"\x1b[0m");
        shell.press("blockdev-del node-name=nope\r");
        shell.expect("stord: ");
        shell.expect("nope");
        shell.press("help blockdev-del\r");
        shell.expect("node-name=str");
        // What was typed before.
        shell.press("\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A\r");
        shell.expect("\"major\"");
        shell.press("\x04");
        assert!(shell.child.wait().unwrap().success());
        let history = std::fs::read_to_string(scratch.path("state/stord/qmp-history")).unwrap();
        assert!(history.contains("query-version"), "{history}");
    });
}

#[test]
fn shell_reads_commands_from_a_file() {
    if is_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let daemon = Daemon::start(&scratch, &MONITOR);
    std::fs::write(
        scratch.path("commands"),
        "blockdev-add driver=null-co node-name=x\nnope\n{\"execute\": \"query-block-exports\"}\n",
    )
    .unwrap();
    let output = Command::new(program())
        .args(["qmp", "qmp.sock"])
        .current_dir(scratch.dir())
        .env("XDG_STATE_HOME", scratch.path("state"))
        .stdin(File::open(scratch.path("commands")).unwrap())
        .output()
        .unwrap();
    let ended = Ended::from(output);
    assert!(ended.success(), "{ended:?}");
    assert_eq!(ended.stdout, "{}\n[]\n");
    assert!(
        ended.stderr.contains("The command nope has not been found"),
        "{ended:?}"
    );
    daemon.stop();
}

/// What `stord ps` says in a world where nobody else's daemons are.
fn ps(scratch: &Scratch, args: &[&str]) -> Ended {
    let output = of_nobody(Command::new(program()), scratch)
        .arg("ps")
        .args(args)
        .output()
        .unwrap();
    Ended::from(output)
}

/// An ordinary user without any daemon, whose directory is in the scratch directory.
fn of_nobody(mut command: Command, scratch: &Scratch) -> Command {
    if nix::unistd::geteuid().is_root() {
        let mut unprivileged = Command::new("setpriv");
        unprivileged
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(command.get_program());
        command = unprivileged;
    }
    command
        .current_dir(scratch.dir())
        .env("XDG_RUNTIME_DIR", scratch.path("run"));
    command
}

#[test]
fn running_daemons_are_listed() {
    needs!("setpriv");
    if is_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let open_to_all = |path: &std::path::Path| {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o777))
            .unwrap();
    };
    std::fs::create_dir(scratch.path("run")).unwrap();
    open_to_all(&scratch.path("run"));
    open_to_all(scratch.dir());
    assert_eq!(ps(&scratch, &[]).stdout, "No daemon runs.\n");

    std::fs::write(scratch.path("disk.raw"), vec![0; 1 << 20]).unwrap();
    let command = of_nobody(Command::new(program()), &scratch);
    let image = scratch.path("disk.raw");
    let node = format!(
        "file,node-name=disk,read-only=on,filename={}",
        image.display()
    );
    let args = [
        &MONITOR[..],
        &[
            "--blockdev",
            &node,
            "--nbd-server",
            "addr.type=unix,addr.path=nbd.sock",
        ],
        &["--export", "nbd,id=first,node-name=disk"],
    ]
    .concat();
    let mut daemon = Daemon::start_as(&scratch, command, &args);
    let listed = ps(&scratch, &["--json"]);
    let listed: Value = serde_json::from_str(&listed.stdout).unwrap();
    assert_eq!(listed[0]["pid"], daemon.pid());
    assert_eq!(listed[0]["exports"][0]["id"], "first");
    assert_eq!(listed[0]["exports"][0]["image"], image.to_str().unwrap());
    assert_eq!(listed.as_array().unwrap().len(), 1);
    let table = ps(&scratch, &[]).stdout;
    assert!(
        table.contains("unix:qmp.sock") && table.contains("nbd first"),
        "{table}"
    );

    // What comes and goes is seen at once.
    let ended = Command::new(program())
        .args(["qmp", "qmp.sock", "block-export-del", "id=first"])
        .current_dir(scratch.dir())
        .status()
        .unwrap();
    assert!(ended.success());
    assert!(!ps(&scratch, &[]).stdout.contains("nbd first"));

    // One that was killed leaves its socket behind, which the next look removes.
    daemon.kill_hard();
    let socket = scratch.path(&format!("run/stord/{}.status", daemon.pid()));
    assert!(socket.exists());
    assert_eq!(ps(&scratch, &[]).stdout, "No daemon runs.\n");
    assert!(!socket.exists());
}
