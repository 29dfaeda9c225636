//! Mounts that go from one daemon to another under load: users of the file see a pause, and nothing else.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::RngExt;

use crate::mount_command::{arg, mount, only_stord, qcow2_with, umount};
use crate::needs;
use crate::support::daemon::{Daemon, program, run_to_end};
use crate::support::disk::assert_holes_are_zero;
use crate::support::model::{assert_same, noise, rng};
use crate::support::run::run_ok;
use crate::support::{Scratch, eventually, mounts, qemu};

const BLOCK: usize = 4096;
/// Blocks that one writer has for itself.
const BLOCKS: usize = 512;
const WRITERS: usize = 4;
const SIZE: usize = WRITERS * BLOCKS * BLOCK;
/// A daemon that lives so long is not taken for one that dies of what it is asked.
const GOOD_LIFE: Duration = Duration::from_millis(700);

/// Writers that check all they have written, while something is done to their daemon.
struct Load {
    done: AtomicBool,
    rounds: AtomicU64,
}

impl Load {
    /// Runs them beside `act`; gives what the disk holds in the end.
    fn run(mount: &Path, seed: u64, act: impl FnOnce(&Load)) -> Vec<u8> {
        let load = Load {
            done: AtomicBool::new(false),
            rounds: AtomicU64::new(0),
        };
        thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    let load = &load;
                    scope.spawn(move || load.write(mount, seed + writer as u64, writer))
                })
                .collect();
            act(&load);
            load.done.store(true, Ordering::Relaxed);
            let parts = writers.into_iter().map(|writer| writer.join().unwrap());
            parts.collect::<Vec<_>>().concat()
        })
    }

    /// Writes, zeroes, reads and syncs its blocks until told to end; gives what they hold.
    fn write(&self, mount: &Path, seed: u64, writer: usize) -> Vec<u8> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(mount)
            .unwrap();
        let mut rng = rng(seed);
        let begin = writer * BLOCKS * BLOCK;
        let mut model = vec![0; BLOCKS * BLOCK];
        while !self.done.load(Ordering::Relaxed) {
            let count = rng.random_range(1..=8);
            let at = rng.random_range(0..=BLOCKS - count) * BLOCK;
            let range = at..at + count * BLOCK;
            let offset = (begin + at) as u64;
            match rng.random_range(0..10) {
                0..6 => {
                    let data = noise(rng.random(), range.len());
                    file.write_all_at(&data, offset).unwrap();
                    model[range].copy_from_slice(&data);
                }
                6 => {
                    let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
                        | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    let (at, len) = (i64::try_from(offset).unwrap(), range.len());
                    nix::fcntl::fallocate(&file, punch, at, i64::try_from(len).unwrap()).unwrap();
                    model[range].fill(0);
                }
                7 => file.sync_data().unwrap(),
                _ => {
                    let mut read = vec![0; range.len()];
                    file.read_exact_at(&mut read, offset).unwrap();
                    assert_same("what was written before", &read, &model[range]);
                }
            }
            self.rounds.fetch_add(1, Ordering::Relaxed);
        }
        let mut read = vec![0; model.len()];
        file.read_exact_at(&mut read, begin as u64).unwrap();
        assert_same("all that was written", &read, &model);
        model
    }

    /// Waits until the writers have got on, and the daemon is older than one that dies of its work.
    fn get_on(&self) {
        let (rounds, began) = (self.rounds.load(Ordering::Relaxed), Instant::now());
        eventually("the writers get on", 60, || {
            self.rounds.load(Ordering::Relaxed) > rounds + 100 && began.elapsed() > GOOD_LIFE
        });
    }
}

/// The process that the registry names for a mountpoint.
fn serving(at: &Path) -> Option<i32> {
    let wanted = format!("\"mountpoint\":\"{}\"", at.display());
    let entries = fs::read_dir("/run/stord").ok()?.flatten();
    let found = entries.filter_map(|entry| {
        let path = entry.path();
        let is_entry = path.extension().is_some_and(|ending| ending == "json");
        let text = fs::read_to_string(&path).ok().filter(|_| is_entry)?;
        let pid: i32 = path.file_stem()?.to_str()?.parse().ok()?;
        (text.contains(&wanted) && kill(Pid::from_raw(pid), None).is_ok()).then_some(pid)
    });
    found.max()
}

/// Kills the daemon and waits until another one serves.
fn kill_and_wait(scratch: &Scratch, at: &Path) -> Daemon {
    let pid = serving(at).expect("somebody serves it");
    Daemon::adopt(scratch, pid).kill_hard();
    eventually("another daemon serves it", 60, || {
        serving(at).is_some_and(|other| other != pid)
    });
    Daemon::adopt(scratch, serving(at).unwrap())
}

fn upgrade(scratch: &Scratch, at: &Path) -> Daemon {
    let pid = serving(at).expect("somebody serves it");
    let ended = run_to_end(scratch, &["upgrade", at.to_str().unwrap()]);
    assert!(ended.success(), "{ended:?}");
    let next = serving(at).expect("somebody serves it");
    assert_ne!(next, pid, "{ended:?}");
    assert!(ended.stdout.contains(&next.to_string()), "{ended:?}");
    Daemon::adopt(scratch, next)
}

/// Makes an image of this format, and gives its absolute path.
fn image(scratch: &Scratch, format: &str) -> PathBuf {
    let path = scratch.path(&format!("disk.{format}"));
    let (size, path_text) = (SIZE.to_string(), path.to_str().unwrap());
    qemu::img(&["create", "-q", "-f", format, path_text, &size]);
    path
}

fn upgrade_and_kill(format: &str, times: usize) {
    let scratch = Scratch::new();
    let image = image(&scratch, format);
    let at = scratch.path("m");
    let args = ["--keep", image.to_str().unwrap(), at.to_str().unwrap()];
    let (_first, _) = mount(&scratch, &args, "m");
    let mut guards = Vec::new();
    let content = Load::run(&at, 41, |load| {
        for _ in 0..times {
            load.get_on();
            guards.push(upgrade(&scratch, &at));
            load.get_on();
            guards.push(kill_and_wait(&scratch, &at));
        }
        load.get_on();
    });
    let file = File::open(&at).unwrap();
    assert_holes_are_zero("the mount", &file, &content);
    drop(file);
    umount(&scratch, at.to_str().unwrap());
    assert_eq!(scratch.names(), [format!("disk.{format}")]);
    assert_same("image", &qemu::content(&scratch, &image, format), &content);
    if format == "qcow2" {
        // Space that a killed daemon was about to use may be lost, but nothing else.
        let check = run_ok(
            "qemu-img",
            &["check", "-q", "-r", "leaks", image.to_str().unwrap()],
        );
        assert_eq!(check, "");
        qemu::assert_clean(&image);
    }
}

#[test]
fn users_of_a_raw_image_see_a_pause() {
    only_stord!();
    needs!(root, "qemu-img");
    upgrade_and_kill("raw", 3);
}

#[test]
fn users_of_a_qcow2_image_see_a_pause() {
    only_stord!();
    needs!(root, "qemu-img");
    let times = std::env::var("STORD_TAKEOVERS").unwrap_or_default();
    upgrade_and_kill("qcow2", times.parse().unwrap_or(5));
}

/// Whether mounts are served over io_uring here; says so if not.
fn has_ring() -> bool {
    let enabled = fs::read_to_string("/sys/module/fuse/parameters/enable_uring");
    let is_enabled = enabled.is_ok_and(|text| text.trim() == "Y");
    if !is_enabled {
        eprintln!("SKIPPED: needs Linux 6.14 and fuse.enable_uring");
    }
    is_enabled
}

fn upgrade_over_io_uring(format: &str) {
    let scratch = Scratch::new();
    let image = image(&scratch, format);
    let at = scratch.path("m");
    let args = [image.to_str().unwrap(), at.to_str().unwrap()];
    let (_first, _) = mount(&scratch, &args, "m");
    let mut guards = Vec::new();
    let times = std::env::var("STORD_TAKEOVERS").unwrap_or_default();
    let content = Load::run(&at, 53, |load| {
        for _ in 0..times.parse().unwrap_or(5) {
            load.get_on();
            guards.push(upgrade(&scratch, &at));
        }
        load.get_on();
    });
    umount(&scratch, at.to_str().unwrap());
    assert_eq!(scratch.names(), [format!("disk.{format}")]);
    assert_same("image", &qemu::content(&scratch, &image, format), &content);
    if format == "qcow2" {
        qemu::assert_clean(&image);
    }
}

#[test]
fn requests_through_io_uring_go_to_the_next_daemon_raw() {
    only_stord!();
    needs!(root, "qemu-img");
    if has_ring() {
        upgrade_over_io_uring("raw");
    }
}

#[test]
fn requests_through_io_uring_go_to_the_next_daemon_qcow2() {
    only_stord!();
    needs!(root, "qemu-img");
    if has_ring() {
        upgrade_over_io_uring("qcow2");
    }
}

#[test]
fn directory_and_image_over_itself_change_hands() {
    only_stord!();
    needs!(root, "qemu-img", "sfdisk");
    let scratch = Scratch::new();
    let content = noise(5, 1 << 20);
    let image = PathBuf::from(qcow2_with(&scratch, "disk.qcow2", &content));
    let path = image.to_str().unwrap();
    let (_daemon, _) = mount(&scratch, &["--keep", path, path], "disk.qcow2");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    let mut guards = Vec::new();
    for round in 0..2u8 {
        guards.push(upgrade(&scratch, &image));
        file.write_all_at(&[round; 100], 100 * u64::from(round))
            .unwrap();
        guards.push(kill_and_wait(&scratch, &image));
    }
    let mut seen = vec![0; content.len()];
    file.read_exact_at(&mut seen, 0).unwrap();
    let mut wanted = content;
    wanted[..100].fill(0);
    wanted[100..200].fill(1);
    assert_same("the file", &seen, &wanted);
    drop(file);
    umount(&scratch, path);
    assert_same("image", &qemu::content(&scratch, &image, "qcow2"), &wanted);
}

#[test]
fn kept_mount_stays_where_nobody_takes_it() {
    only_stord!();
    needs!(root, "qemu-img");
    stay_where_nobody_takes_it(&["--keep"]);
}

#[test]
fn mount_stays_where_nobody_takes_it() {
    only_stord!();
    needs!(root, "qemu-img");
    stay_where_nobody_takes_it(&[]);
}

fn stay_where_nobody_takes_it(options: &[&str]) {
    let scratch = Scratch::new();
    let image = image(&scratch, "qcow2");
    let at = scratch.path("m");
    let mut args = options.to_vec();
    args.extend([image.to_str().unwrap(), at.to_str().unwrap()]);
    let (daemon, _) = mount(&scratch, &args, "m");
    let content = Load::run(&at, 43, |load| {
        for says in ["", "nonsense\n", "release\n"] {
            load.get_on();
            // Somebody asks for the mount, and goes away before serving it.
            let mut other =
                UnixStream::connect(format!("/run/stord/{}.sock", daemon.pid())).unwrap();
            let mut lines = BufReader::new(other.try_clone().unwrap()).lines();
            assert!(lines.next().unwrap().unwrap().contains("\"plan\""));
            other.write_all(says.as_bytes()).unwrap();
            if says == "release\n" {
                assert_eq!(lines.next().unwrap().unwrap(), "released");
            }
        }
        load.get_on();
    });
    assert_eq!(serving(&at), Some(daemon.pid()));
    umount(&scratch, at.to_str().unwrap());
    assert_same("image", &qemu::content(&scratch, &image, "qcow2"), &content);
    qemu::assert_clean(&image);
}

#[test]
fn daemons_that_die_one_after_the_other_are_given_up() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let image = image(&scratch, "qcow2");
    let at = scratch.path("m");
    let args = ["--keep", image.to_str().unwrap(), at.to_str().unwrap()];
    let (_daemon, _) = mount(&scratch, &args, "m");
    let mut last = None;
    eventually("they are given up", 60, || {
        let pid = serving(&at).filter(|pid| Some(*pid) != last);
        if let Some(pid) = pid {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            last = Some(pid);
        }
        pid.is_none() && nix::sys::statfs::statfs(&at).is_err()
    });
    assert!(mounts::on(&at).is_some(), "the kernel keeps the dead mount");
    umount(&scratch, at.to_str().unwrap());
    assert_eq!(scratch.names(), ["disk.qcow2"]);
}

/// A service manager with a store of descriptors, as systemd is one: it starts the program again when that was killed, and hands
/// back what it had been given. It says when the program is ready, and ends with it.
const MANAGER: &str = r#"
import array, os, signal, socket, subprocess, sys
path = sys.argv[1]
listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener.bind(path)
stored = {}
child = None
def start():
    def before():
        names, own = list(stored), [os.dup(descriptor) for descriptor in stored.values()]
        own = [os.dup2(os.dup(descriptor), 100 + number) for number, descriptor in enumerate(own)]
        for number, descriptor in enumerate(own):
            os.dup2(descriptor, 3 + number)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))
        for descriptor in range(3 + len(own), 200):
            try: os.close(descriptor)
            except OSError: pass
    def begin():
        before()
        os.execve(sys.argv[2], sys.argv[2:], dict(os.environ, NOTIFY_SOCKET=path))
    pid = os.fork()
    if pid == 0:
        begin()
    return pid
child = start()
listener.settimeout(0.05)
while True:
    try:
        data, control, _, _ = listener.recvmsg(4096, socket.CMSG_SPACE(64))
    except TimeoutError:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == 0:
            continue
        if not os.WIFSIGNALED(status):
            sys.exit(os.WEXITSTATUS(status))
        child = start()
        continue
    lines = dict(line.split("=", 1) for line in data.decode().splitlines())
    if "FDSTORE" in lines:
        for level, kind, value in control:
            descriptors = array.array("i", value)
            stored[lines["FDNAME"]] = descriptors[0]
    elif "FDSTOREREMOVE" in lines:
        descriptor = stored.pop(lines["FDNAME"], None)
        if descriptor is not None:
            os.close(descriptor)
    elif "READY" in lines:
        print("ready", child, flush=True)
"#;

#[test]
fn service_is_started_again_by_its_manager() {
    only_stord!();
    needs!(root, "qemu-img", "python3");
    let scratch = Scratch::new();
    let image = image(&scratch, "qcow2");
    let at = scratch.path("m");
    let mut manager = Command::new("python3")
        .args(["-c", MANAGER])
        .arg(scratch.path("notify"))
        .arg(program())
        .args(["mount", "--foreground", "--keep"])
        .args([&image, &at])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(manager.stdout.take().unwrap()).lines();
    let mut ready = || -> i32 {
        let line = said
            .by_ref()
            .map(Result::unwrap)
            .find(|line| line.starts_with("ready"));
        line.expect("it is ready")["ready ".len()..]
            .parse()
            .unwrap()
    };
    let mut daemon = Daemon::adopt(&scratch, ready());
    let content = Load::run(&at, 47, |load| {
        for _ in 0..3 {
            load.get_on();
            daemon.kill_hard();
            daemon = Daemon::adopt(&scratch, ready());
        }
        load.get_on();
    });
    assert_eq!(serving(&at), Some(daemon.pid()));
    umount(&scratch, at.to_str().unwrap());
    assert!(manager.wait().unwrap().success());
    assert_same("image", &qemu::content(&scratch, &image, "qcow2"), &content);
    assert!(!at.exists(), "it had been made for the mount");
}

#[test]
fn mounts_that_cannot_change_hands_say_why() {
    only_stord!();
    needs!(root, "qemu-img");
    let scratch = Scratch::new();
    let nobody = run_to_end(&scratch, &["upgrade", &arg(&scratch, "m")]);
    assert_eq!(nobody.code, Some(1));
    assert!(nobody.stderr.contains("no stord of yours"), "{nobody:?}");
    let which = run_to_end(&scratch, &["upgrade"]);
    assert!(which.stderr.contains("--all"), "{which:?}");
}
