//! Ten thousand clients that say nothing: those who talk are served, memory is bounded, and nobody spins.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::{Holder, Served};
use crate::needs;
use crate::support::daemon::Daemon;
use crate::support::prerequisites::skip;
use crate::support::run::run_ok;

const CROWD: usize = 10_000;

/// Whether the test program may have that many descriptors now.
fn may_open(count: u64) -> bool {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    soft >= count
        || setrlimit(Resource::RLIMIT_NOFILE, count.min(hard), hard).is_ok() && hard >= count
}

/// Connects without waiting; `None` when the server lets nobody in at the moment.
fn try_connect(path: &Path) -> Option<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
    match connect(
        std::os::fd::AsRawFd::as_raw_fd(&fd),
        &UnixAddr::new(path).unwrap(),
    ) {
        Ok(()) => Some(fd),
        Err(Errno::EAGAIN) => None,
        Err(errno) => panic!("{errno}"),
    }
}

/// As many connections as the server takes, up to [`CROWD`], that say nothing.
fn crowd(path: &Path, patience: Duration) -> Vec<OwnedFd> {
    let mut clients = Vec::new();
    let deadline = Instant::now() + patience;
    while clients.len() < CROWD && Instant::now() < deadline {
        match try_connect(path) {
            Some(client) => clients.push(client),
            None => std::thread::yield_now(),
        }
    }
    clients
}

/// Seconds of processor time that a process has used.
fn cpu(daemon: &Daemon) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split(' ').collect();
    (fields[12].parse::<f64>().unwrap() + fields[13].parse::<f64>().unwrap()) / 100.0
}

#[test]
fn silent_crowd_shuts_nobody_out() {
    needs!("qemu-img", "nbdinfo", "nbdsh");
    if !may_open(CROWD as u64 + 1000) {
        skip("fewer than 11,000 descriptors: raise the hard limit (ulimit -Hn)");
        return;
    }
    let served = Served::start(
        &[],
        ",max-connections=100,handshake-max-seconds=10",
        ",writable=on",
    );
    let before = served.daemon.memory_kib("VmRSS");
    let holder = Holder::start(&served);
    // Some keep trying while others have their second.
    let silent = crowd(&served.socket, Duration::from_secs(3));
    assert!(silent.len() > 300, "only {}", silent.len());
    // Those within are served as ever, and whoever talks gets in before the crowd's ten seconds are over.
    let within = UnixStream::connect(&served.socket).map(drop);
    assert!(within.is_ok());
    let begun = Instant::now();
    run_ok("nbdinfo", &["--size", &served.uri()]);
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    let peak = served.daemon.memory_kib("VmHWM");
    assert!(peak < before + 16 * 1024, "{before} kB grew to {peak} kB");
    drop((silent, holder));
    served.daemon.stop();
}

#[test]
fn crowd_without_a_limit_costs_little_and_ends_in_time() {
    needs!("qemu-img", "nbdinfo");
    if !may_open(CROWD as u64 + 1000) {
        skip("fewer than 11,000 descriptors: raise the hard limit (ulimit -Hn)");
        return;
    }
    let served = Served::start(&[], ",max-connections=0,handshake-max-seconds=8", "");
    let before = served.daemon.memory_kib("VmRSS");
    let silent = crowd(&served.socket, Duration::from_secs(60));
    assert_eq!(silent.len(), CROWD);
    run_ok("nbdinfo", &["--size", &served.uri()]);
    let peak = served.daemon.memory_kib("VmHWM");
    // Less than 8 kB each.
    assert!(peak < before + 80 * 1024, "{before} kB grew to {peak} kB");
    for client in silent {
        let mut stream = UnixStream::from(client);
        stream.set_nonblocking(false).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut greeting = Vec::new();
        stream.read_to_end(&mut greeting).unwrap();
        assert_eq!(greeting.len(), 18);
    }
    served.daemon.stop();
}

/// With all descriptors taken, clients wait in the kernel, nothing spins, and everything goes on when some are free.
#[test]
fn few_descriptors_bound_the_clients() {
    needs!("qemu-img", "nbdinfo", "prlimit");
    let served = Served::start_limited(600, ",max-connections=0,handshake-max-seconds=8");
    let silent = crowd(&served.socket, Duration::from_secs(2));
    // 172 are in at a time, and some had their second already; as many as the kernel lets wait come after them.
    assert!((300..=900).contains(&silent.len()), "{}", silent.len());
    let used = std::fs::read_dir(format!("/proc/{}/fd", served.daemon.pid()))
        .unwrap()
        .count();
    assert!(used < 590, "{used}");
    let begun = (Instant::now(), cpu(&served.daemon));
    run_ok("nbdinfo", &["--size", &served.uri()]);
    let (waited, busy) = (
        begun.0.elapsed().as_secs_f64(),
        cpu(&served.daemon) - begun.1,
    );
    assert!(busy < 0.5 + waited / 4.0, "{busy} s of {waited} s");
    let mut qmp = served.qmp();
    qmp.execute("query-block-exports", serde_json::json!({}));
    drop(silent);
    served.daemon.quit(&mut qmp);
}

/// Where even the spare descriptors are gone, that is said once, and nothing spins.
#[test]
fn running_out_of_descriptors_is_said() {
    needs!("qemu-img", "nbdinfo", "prlimit");
    let served = Served::start(&[], ",max-connections=100,handshake-max-seconds=0", "");
    let pid = served.daemon.pid().to_string();
    let used = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count();
    let limit = |count: usize| {
        run_ok(
            "prlimit",
            &["--pid", &pid, &format!("--nofile={count}:4096")],
        )
    };
    limit(used);
    let begun = cpu(&served.daemon);
    let waiting = served.connect();
    crate::support::eventually("it says so", 30, || {
        served
            .daemon
            .log()
            .contains("NBD clients cannot be accepted")
    });
    let asked = Instant::now();
    while asked.elapsed() < Duration::from_secs(1) {
        assert!(served.daemon.is_alive());
        std::thread::yield_now();
    }
    assert!(cpu(&served.daemon) - begun < 0.5);
    assert_eq!(served.daemon.log().matches("cannot be accepted").count(), 1);
    limit(4096);
    run_ok("nbdinfo", &["--size", &served.uri()]);
    drop(waiting);
    served.daemon.stop();
}
