//! The daemon under test as a guard: started until usable, stopped in bounded time, killed when dropped.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::run::{Ended, run_in};
use super::{Qmp, Scratch, eventually};

/// A daemon older than this hangs: it is killed, so that whoever waits for its mount gets an error and the test fails.
const LIFE_LIMIT: Duration = Duration::from_secs(240);

/// The bound on an orderly end.
pub const STOP_SECONDS: u64 = 30;

/// The program under test.
pub fn program() -> PathBuf {
    std::env::var_os("STORD_BIN")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_stord")), PathBuf::from)
}

/// Whether the program under test is QEMU's own daemon, which has no subcommands and some known faults.
pub fn is_qemu() -> bool {
    program().ends_with("qemu-storage-daemon")
}

/// Runs the program under test in the scratch directory until it ends by itself.
#[track_caller]
pub fn run_to_end<S: AsRef<OsStr>>(scratch: &Scratch, args: &[S]) -> Ended {
    run_in(scratch.dir(), program(), args)
}

/// A running daemon.
pub struct Daemon {
    pid: Pid,
    /// `None` for a daemon that went into the background by itself.
    child: Option<Child>,
    log: PathBuf,
    _watchdog: mpsc::Sender<()>,
}

impl Daemon {
    /// Starts it in the foreground, working in the scratch directory, and waits until it has written its pid file:
    /// then all exports and monitors given on its command line are usable.
    #[track_caller]
    pub fn start<S: AsRef<OsStr>>(scratch: &Scratch, args: &[S]) -> Daemon {
        Daemon::start_as(scratch, Command::new(program()), args)
    }

    /// Like [`Daemon::start`], through another command (one that changes the user, for instance) that ends up as the daemon.
    #[track_caller]
    pub fn start_as<S: AsRef<OsStr>>(
        scratch: &Scratch,
        mut command: Command,
        args: &[S],
    ) -> Daemon {
        let number = next_number();
        let log = scratch.path(&format!("daemon-{number}.log"));
        let pid_file = scratch.path(&format!("daemon-{number}.pid"));
        let output = File::create(&log).unwrap();
        let mut child = command
            .args(args)
            .arg("--pidfile")
            .arg(&pid_file)
            .current_dir(scratch.dir())
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let deadline = Instant::now() + Duration::from_secs(60);
        while !fs::read_to_string(&pid_file).is_ok_and(|text| text.ends_with('\n')) {
            if let Some(status) = child.try_wait().unwrap() {
                panic!(
                    "the daemon did not start, {status}: {}",
                    fs::read_to_string(&log).unwrap()
                );
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                panic!(
                    "the daemon is not usable after a minute: {}",
                    fs::read_to_string(&log).unwrap()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        Daemon {
            pid,
            child: Some(child),
            log,
            _watchdog: watch(pid),
        }
    }

    /// Starts it with `--daemonize`: waits for the foreground process to end well, then watches over the one it left.
    #[track_caller]
    pub fn daemonize<S: AsRef<OsStr>>(scratch: &Scratch, args: &[S]) -> Daemon {
        let number = next_number();
        let pid_file = scratch.path(&format!("daemon-{number}.pid"));
        let mut all: Vec<OsString> = args.iter().map(|arg| arg.as_ref().to_owned()).collect();
        all.extend([
            "--daemonize".into(),
            "--pidfile".into(),
            pid_file.clone().into(),
        ]);
        let ended = run_to_end(scratch, &all);
        assert!(
            ended.success(),
            "the daemon did not go into the background: {ended:?}"
        );
        let text = fs::read_to_string(&pid_file)
            .expect("the pid file exists once the foreground process has ended");
        Daemon::adopt(
            scratch,
            text.trim().parse().expect("the pid file holds a number"),
        )
    }

    /// Takes over a daemon that runs already, by its process id.
    pub fn adopt(scratch: &Scratch, pid: i32) -> Daemon {
        let pid = Pid::from_raw(pid);
        Daemon {
            pid,
            child: None,
            log: scratch.path("background.log"),
            _watchdog: watch(pid),
        }
    }

    /// The daemon's process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// What it has printed so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether the process is there (a zombie is not).
    pub fn is_alive(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid)).is_ok_and(|stat| {
            !stat
                .rsplit(')')
                .next()
                .is_some_and(|rest| rest.starts_with(" Z"))
        })
    }

    /// The state of its first thread, as ps(1) shows it: `T` is stopped.
    pub fn state(&self) -> char {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
        let state = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next());
        state.expect("the state follows the name")
    }

    /// A value in kB from the process's status, `VmRSS` for instance.
    pub fn memory_kib(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with(field))
            .expect("the field is in the status");
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid, signal).unwrap();
    }

    /// Ends it at once, as a crash would, and waits until the process is gone.
    pub fn kill_hard(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        self.wait_gone();
    }

    /// Sends the signal and asserts that the daemon then ends well and in time.
    #[track_caller]
    pub fn stop_by(mut self, signal: Signal) {
        self.signal(signal);
        self.assert_ends_well();
    }

    /// Ends it with SIGTERM and asserts that it ends well and in time.
    #[track_caller]
    pub fn stop(self) {
        self.stop_by(Signal::SIGTERM);
    }

    /// Ends it over QMP and asserts that it ends well and in time.
    #[track_caller]
    pub fn quit(mut self, qmp: &mut Qmp) {
        qmp.execute("quit", serde_json::json!({}));
        self.assert_ends_well();
    }

    /// Asserts that the daemon, told to stop already, ends well and in time.
    #[track_caller]
    pub fn assert_ends_well(&mut self) {
        let log = self.log.clone();
        let status = self.wait_end();
        if let Some(status) = status {
            let log = fs::read_to_string(log).unwrap_or_default();
            assert!(status.success(), "the daemon ended with {status}: {log}");
        }
    }

    #[track_caller]
    fn wait_end(&mut self) -> Option<ExitStatus> {
        let pid = self.pid;
        match self.child.as_mut() {
            Some(child) => {
                let mut status = None;
                eventually("the daemon ends", STOP_SECONDS, || {
                    status = child.try_wait().unwrap();
                    status.is_some()
                });
                self.child = None;
                status
            }
            None => {
                eventually("the daemon ends", STOP_SECONDS, || {
                    kill(pid, None) == Err(Errno::ESRCH)
                });
                None
            }
        }
    }

    fn wait_gone(&mut self) {
        match self.child.take() {
            Some(mut child) => {
                let _ = child.wait();
            }
            None => eventually("the killed daemon is gone", 30, || {
                kill(self.pid, None) == Err(Errno::ESRCH)
            }),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("-- the daemon printed:\n{}", self.log());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        } else if kill(self.pid, None).is_ok() && is_daemon(self.pid) {
            let _ = kill(self.pid, Signal::SIGKILL);
        }
    }
}

/// Whether the process still is the program under test: the id of one long gone may be another's by now.
fn is_daemon(pid: Pid) -> bool {
    let name = program();
    let name = name
        .file_name()
        .map(OsStr::to_string_lossy)
        .unwrap_or_default();
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .is_ok_and(|comm| name.starts_with(comm.trim()) || comm.starts_with("stord"))
}

/// Kills the daemon when the returned sender lives longer than any daemon of a test should.
fn watch(pid: Pid) -> mpsc::Sender<()> {
    let (sender, receiver) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        if receiver.recv_timeout(LIFE_LIMIT) == Err(mpsc::RecvTimeoutError::Timeout)
            && is_daemon(pid)
        {
            eprintln!("the daemon {pid} still runs after {LIFE_LIMIT:?}: killed");
            let _ = kill(pid, Signal::SIGKILL);
        }
    });
    sender
}

fn next_number() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The arguments that open `image` as node `disk` in its format and export it as the file `mountpoint`.
/// `node` and `export` are further options, each beginning with a comma, or empty.
pub fn fuse_args(
    image: &Path,
    format: &str,
    node: &str,
    mountpoint: &Path,
    export: &str,
) -> Vec<String> {
    let protocol = format!(
        "driver=file,node-name=protocol,filename={}",
        comma_safe(image)
    );
    let format = format!("driver={format},node-name=disk,file=protocol{node}");
    let export = format!(
        "type=fuse,id=export,node-name=disk,mountpoint={}{export}",
        comma_safe(mountpoint)
    );
    let read_only = if node.contains("read-only=on") {
        ",read-only=on"
    } else {
        ""
    };
    [
        "--blockdev".to_owned(),
        protocol + read_only,
        "--blockdev".to_owned(),
        format,
        "--export".to_owned(),
        export,
    ]
    .into()
}

fn comma_safe(path: &Path) -> String {
    path.to_str().unwrap().replace(',', ",,")
}
