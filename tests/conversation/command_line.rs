//! The same command lines to QEMU's storage daemon and to ours: the same exit status, the same words on standard output and on
//! standard error, each program calling itself by its own name.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::Scratch;
use crate::support::daemon::{is_qemu, program};
use crate::support::run::Ended;

/// What both are started as.
const NAME: &str = "qemu-storage-daemon";

/// Why a command line's outcome is meant to differ, or an empty text.
type Reason = &'static str;

const SAME: Reason = "";
const HELP: Reason = "the help is our own, with our own subcommands";
const OBJECTS: Reason = "only what is built is listed";
const STATUS: Reason = "printing the help is no failure";
const TRACE: Reason = "the names of our events are our own";
const OPEN: Reason = "nothing is left behind: the reference leaves the socket";
const ORDER: Reason = "the list is sorted";
const CLEARER: Reason = "the words of the reference lead astray";

/// The command lines. In front of each stands whether and why it is meant to differ.
const LINES: &[(Reason, &[&str])] = &[
    (HELP, &["--help"]),
    (HELP, &["-h"]),
    (HELP, &["--version"]),
    (HELP, &["-V"]),
    (SAME, &["--nosuch"]),
    (SAME, &["--nosuch=5"]),
    (SAME, &["-x"]),
    (SAME, &["operand"]),
    (SAME, &["--blockdev"]),
    (SAME, &["--export"]),
    (SAME, &["--object"]),
    (SAME, &["--chardev"]),
    (SAME, &["--monitor"]),
    (SAME, &["--pidfile"]),
    (SAME, &["--daemonize=yes"]),
    (SAME, &["--block", "null-co"]),
    (SAME, &["--blockdev", "null-co"]),
    (SAME, &["--blockdev", "driver=null-co,node-name=n"]),
    (SAME, &["--blockdev=null-co,node-name=n"]),
    (SAME, &["--blockdev", "null-co,node-name=n,size=1k"]),
    (SAME, &["--blockdev", "null-co,node-name=n,size=-1x"]),
    (SAME, &["--blockdev", "null-co,node-name=n,size=0x1000"]),
    (SAME, &["--blockdev", "null-co,node-name=n,size="]),
    (SAME, &["--blockdev", "null-co,node-name=n,read-only"]),
    (SAME, &["--blockdev", "null-co,node-name=n,read-only=on"]),
    (SAME, &["--blockdev", "null-co,node-name=n,read-only=true"]),
    (
        SAME,
        &[
            "--blockdev",
            "null-co,node-name=n,read-only=off,read-only=on",
        ],
    ),
    (SAME, &["--blockdev", "null-co,node-name=n,"]),
    (SAME, &["--blockdev", "null-co,,node-name=n"]),
    (SAME, &["--blockdev", ",node-name=n"]),
    (SAME, &["--blockdev", "=x"]),
    (SAME, &["--blockdev", "driver=,node-name=n"]),
    (SAME, &["--blockdev", "node-name=n"]),
    (SAME, &["--blockdev", "null-co,node-name=n,cache=none"]),
    (
        SAME,
        &["--blockdev", "null-co,node-name=n,cache.direct=on,cache=x"],
    ),
    (
        SAME,
        &["--blockdev", "null-co,node-name=n,cache.direct.x=on"],
    ),
    (SAME, &["--blockdev", "null-co,node-name=n,.x=1"]),
    (SAME, &["--blockdev", "null-co,node-name=n,a..b=1"]),
    (SAME, &["--blockdev", "null-co,node-name=n,1a=1"]),
    (SAME, &["--blockdev", "null-co,node-name=n,x!=1"]),
    (
        SAME,
        &["--blockdev", "file,node-name=f,filename=with,,comma.raw"],
    ),
    (
        SAME,
        &["--blockdev", "file,node-name=f,filename=missing,,comma.raw"],
    ),
    (
        SAME,
        &[
            "--blockdev",
            "raw,node-name=r,file.driver=file,file.filename=with,,comma.raw",
        ],
    ),
    (SAME, &["--blockdev", "raw,node-name=r,file.0=x"]),
    (
        SAME,
        &["--blockdev", "raw,node-name=r,file=x,file.driver=null-co"],
    ),
    (
        SAME,
        &["--blockdev", "raw,node-name=r,file.driver=null-co,file=x"],
    ),
    (SAME, &["--blockdev", "help"]),
    (SAME, &["--blockdev", "driver=help"]),
    (SAME, &["--blockdev", "null-co,help"]),
    (SAME, &["--blockdev", "null-co,node-name=n,?"]),
    (
        SAME,
        &["--blockdev", r#"{"driver":"null-co","node-name":"n"}"#],
    ),
    (
        SAME,
        &[
            "--blockdev",
            r#"{"driver":"null-co","node-name":"n","size":"5"}"#,
        ],
    ),
    (
        SAME,
        &[
            "--blockdev",
            r#"{"driver":"null-co","node-name":"n","bogus":1}"#,
        ],
    ),
    (SAME, &["--blockdev", r#"{"driver":"null-co""#]),
    (
        SAME,
        &["--blockdev", r#"{"driver":"null-co","node-name":"n"}x"#],
    ),
    (SAME, &["--blockdev", "{}"]),
    (SAME, &["--blockdev", "{"]),
    (SAME, &["--blockdev", " {}"]),
    (SAME, &["--blockdev", "[]"]),
    (OBJECTS, &["--object", "help"]),
    (SAME, &["--object", "iothread,help"]),
    (SAME, &["--object", "main-loop,help"]),
    (SAME, &["--object", "secret,help"]),
    (SAME, &["--object", "secret_keyring,help"]),
    (SAME, &["--object", "thread-context,help"]),
    (SAME, &["--object", "authz-list,help"]),
    (SAME, &["--object", "authz-list-file,help"]),
    (SAME, &["--object", "authz-simple,help"]),
    (SAME, &["--object", "qom-type=iothread,help"]),
    (SAME, &["--object", "iothread,id=i,help"]),
    (OBJECTS, &["--object", "nosuch,help"]),
    (SAME, &["--object", "nosuch,id=x"]),
    (SAME, &["--object", "iothread"]),
    (SAME, &["--object", "iothread,id="]),
    (SAME, &["--object", "iothread,id=1"]),
    (SAME, &["--object", "iothread,id=i"]),
    (
        SAME,
        &["--object", "iothread,id=i", "--object", "iothread,id=i"],
    ),
    (SAME, &["--object", "iothread,id=i,bogus=1"]),
    (SAME, &["--object", "iothread,id=i,poll-max-ns=x"]),
    (SAME, &["--object", "iothread,id=i,poll-max-ns=1M"]),
    (SAME, &["--object", "iothread,id=i,poll-max-ns=-5"]),
    (SAME, &["--object", "thread-context,id=t,cpu-affinity=0"]),
    (SAME, &["--object", "thread-context,id=t,cpu-affinity=0-0"]),
    (SAME, &["--object", "thread-context,id=t,cpu-affinity=x"]),
    (SAME, &["--object", "secret,id=s,data=x"]),
    (SAME, &["--object", "secret,id=s,file=missing"]),
    (SAME, &["--object", r#"{"qom-type":"iothread","id":"i"}"#]),
    (SAME, &["--object", r#"{"qom-type":"iothread"}"#]),
    (
        SAME,
        &[
            "--object",
            "authz-list,id=a,policy=deny,rules.0.match=x,rules.0.policy=allow",
        ],
    ),
    (
        SAME,
        &["--object", "authz-list,id=a,policy=deny,rules.1.match=x"],
    ),
    (ORDER, &["--chardev", "help"]),
    (ORDER, &["--chardev", "?"]),
    (SAME, &["--chardev", "null,id=c"]),
    (SAME, &["--chardev", "null"]),
    (SAME, &["--chardev", "null,id=1"]),
    (SAME, &["--chardev", "null,id=c", "--chardev", "null,id=c"]),
    (SAME, &["--chardev", "nosuch,id=c"]),
    (SAME, &["--chardev", "backend=null,id=c"]),
    (SAME, &["--chardev", "id=c"]),
    (SAME, &["--chardev", "null,id=c,bogus=1"]),
    (SAME, &["--chardev", "null,id=c,mux=maybe"]),
    (SAME, &["--chardev", "file,id=c"]),
    (SAME, &["--chardev", "file,id=c,path=nodir/x"]),
    (CLEARER, &["--chardev", "socket,id=c"]),
    (SAME, &["--chardev", "socket,id=c,path=missing.sock"]),
    (
        SAME,
        &["--chardev", "socket,id=c,path=s.sock,server=on,wait=off"],
    ),
    (
        SAME,
        &["--chardev", "socket,id=c,path=s.sock,server,nowait"],
    ),
    (
        SAME,
        &["--chardev", "socket,id=c,path=s.sock,host=x,port=1"],
    ),
    (SAME, &["--chardev", "socket,id=c,host=127.0.0.1"]),
    (SAME, &["--chardev", "ringbuf,id=c,size=3"]),
    (SAME, &["--chardev", "ringbuf,id=c,size=4k"]),
    (SAME, &["--chardev", "udp,id=c"]),
    (SAME, &["--chardev", "pipe,id=c,path=missing"]),
    (SAME, &["--chardev", "serial,id=c,path=missing"]),
    (SAME, &["--monitor", ""]),
    (SAME, &["--monitor", "nosuch"]),
    (SAME, &["--monitor", "chardev=nosuch"]),
    (SAME, &["--chardev", "null,id=c", "--monitor", "c"]),
    (
        SAME,
        &[
            "--chardev",
            "null,id=c",
            "--monitor",
            "chardev=c,mode=control,pretty=on",
        ],
    ),
    (SAME, &["--chardev", "null,id=c", "--monitor", "c,pretty"]),
    (
        SAME,
        &["--chardev", "null,id=c", "--monitor", "c,mode=readline"],
    ),
    (SAME, &["--chardev", "null,id=c", "--monitor", "c,mode=x"]),
    (SAME, &["--chardev", "null,id=c", "--monitor", "c,bogus=1"]),
    (
        SAME,
        &["--chardev", "null,id=c", "--monitor", "c", "--monitor", "c"],
    ),
    (
        SAME,
        &["--chardev", "null,id=c", "--monitor", r#"{"chardev":"c"}"#],
    ),
    (SAME, &["--export", "fuse"]),
    (SAME, &["--export", "fuse,id=e,node-name=n,mountpoint=m"]),
    (SAME, &["--export", "type=nosuch,id=e"]),
    (SAME, &["--export", "help"]),
    (
        SAME,
        &[
            "--blockdev",
            "null-co,node-name=n",
            "--export",
            "fuse,id=e,node-name=n,mountpoint=m",
        ],
    ),
    (
        SAME,
        &[
            "--blockdev",
            "null-co,node-name=n",
            "--export",
            "fuse,id=e,node-name=n,mountpoint=missing",
        ],
    ),
    (
        SAME,
        &[
            "--blockdev",
            "null-co,node-name=n",
            "--export",
            "fuse,id=e,node-name=n,mountpoint=m,writable=maybe",
        ],
    ),
    (
        SAME,
        &[
            "--blockdev",
            "null-co,node-name=n",
            "--export",
            r#"{"type":"fuse","id":"e","node-name":"n","mountpoint":"m"}"#,
        ],
    ),
    (
        SAME,
        &[
            "--blockdev",
            "null-co,node-name=n",
            "--export",
            "nbd,id=e,node-name=n",
        ],
    ),
    (
        SAME,
        &[
            "--export",
            "fuse,id=e,node-name=n,mountpoint=m",
            "--blockdev",
            "null-co,node-name=n",
        ],
    ),
    (SAME, &["--nbd-server", ""]),
    (SAME, &["--nbd-server", "addr.type=unix"]),
    (
        SAME,
        &["--nbd-server", "addr.type=unix,addr.path=n.sock,bogus=1"],
    ),
    (OPEN, &["--nbd-server", "addr.type=unix,addr.path=n.sock"]),
    (
        SAME,
        &[
            "--nbd-server",
            "addr.type=unix,addr.path=n.sock,max-connections=x",
        ],
    ),
    (
        OPEN,
        &[
            "--nbd-server",
            "addr.type=unix,addr.path=n.sock",
            "--nbd-server",
            "addr.type=unix,addr.path=n2.sock",
        ],
    ),
    (SAME, &["--daemonize", "--blockdev", "null-co"]),
    (
        SAME,
        &[
            "--daemonize",
            "--blockdev",
            "file,node-name=f,filename=missing",
        ],
    ),
    (SAME, &["--daemonize", "--chardev", "stdio,id=c"]),
    (STATUS, &["--daemonize", "--object", "help"]),
    (SAME, &["--daemonize", "--nosuch"]),
    (
        SAME,
        &[
            "--daemonize",
            "--chardev",
            "socket,id=c,path=nodir/x,server=on,wait=off",
        ],
    ),
    (SAME, &["-T", "nosuch*"]),
    (TRACE, &["-T", "help"]),
    (SAME, &["-T", "enable=nosuch,file=trace.log"]),
    (CLEARER, &["--trace", "events=missing"]),
    (SAME, &["--trace", "bogus=1"]),
    (SAME, &["-T"]),
];

/// How a start came out.
#[derive(PartialEq, Eq)]
struct Start {
    code: Option<i32>,
    stdout: String,
    stderr: String,
    /// It came as far as its pid file, and was told to end.
    was_up: bool,
    /// What it has left behind in its directory.
    left: Vec<String>,
}

impl Start {
    fn lines(&self) -> String {
        let Self {
            code,
            stdout,
            stderr,
            was_up,
            left,
        } = self;
        format!(
            "status {code:?} up {was_up} left {left:?}\n      out {stdout:?}\n      err {stderr:?}"
        )
    }
}

/// Starts the program with its pid file as the last option, and ends it once that is written.
fn start(program: &Path, name: &str, line: &[&str]) -> Start {
    let scratch = Scratch::new();
    scratch.empty_file("m");
    scratch.file("with,comma.raw", &[0; 512]);
    let before = scratch.names();
    let pid_file = scratch.path("pid");
    let link = scratch.path(name);
    std::os::unix::fs::symlink(program, &link).unwrap();
    let child = Command::new(&link)
        .args(line)
        .args(["--pidfile", "pid"])
        .current_dir(scratch.dir())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    let done = std::thread::spawn(move || child.wait_with_output());
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut was_up = false;
    while !done.is_finished() && Instant::now() < deadline {
        if !was_up && fs::read_to_string(&pid_file).is_ok_and(|text| text.ends_with('\n')) {
            was_up = true;
            kill(pid, Signal::SIGTERM).unwrap();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if !done.is_finished() {
        let _ = kill(pid, Signal::SIGKILL);
    }
    let ended: Ended = done.join().unwrap().unwrap().into();
    let own = link.to_str().unwrap();
    let plain = |text: &str| text.replace(own, "NAME").replace(name, "NAME");
    let left = scratch.names().into_iter();
    let left = left.filter(|file| !before.contains(file) && file != name);
    Start {
        code: ended.code,
        stdout: plain(&ended.stdout),
        stderr: plain(&ended.stderr),
        was_up,
        left: left.collect(),
    }
}

#[test]
fn command_lines_come_out_the_same() {
    if is_qemu() || !crate::support::needs_root() {
        return;
    }
    let Some(reference) = super::reference() else {
        return;
    };
    let mut differences = String::new();
    for (reason, line) in LINES {
        let theirs = start(&reference, NAME, line);
        let ours = start(&program(), NAME, line);
        match (*reason, theirs == ours) {
            (SAME, true) => {}
            (SAME, false) => {
                let (theirs, ours) = (theirs.lines(), ours.lines());
                let _ = writeln!(differences, "{line:?}\n    - {theirs}\n    + {ours}");
            }
            (_, true) => {
                let _ = writeln!(differences, "{line:?} does not differ any more");
            }
            (_, false) => {}
        }
    }
    assert!(
        differences.is_empty(),
        "the reference (-) and stord (+) differ:\n{differences}"
    );
}

#[test]
fn program_goes_by_the_name_it_is_started_under() {
    for name in [NAME, "stord", "storage"] {
        let ended = start(&program(), name, &["--blockdev", "x"]);
        assert_eq!(ended.code, Some(1));
        let message = "NAME: --blockdev x: Parameter 'driver' does not accept value 'x'\n";
        assert_eq!(ended.stderr, message);
    }
}
