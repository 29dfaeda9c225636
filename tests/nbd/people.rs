//! The commands for people, with the URI of an export in place of a file.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::tls::serve_with_keys;
use super::{BYTES, SIZE, Served};
use crate::needs;
use crate::support::daemon::{Daemon, program, run_to_end};
use crate::support::disk::MIB;
use crate::support::model::{assert_same, noise};
use crate::support::run::run_ok;
use crate::support::{Scratch, qemu};

#[track_caller]
fn stord(scratch: &Scratch, args: &[&str]) -> String {
    let ended = run_to_end(scratch, args);
    assert!(
        ended.success(),
        "stord {args:?}: {}{}",
        ended.stdout,
        ended.stderr
    );
    ended.stdout
}

#[track_caller]
fn refusal(scratch: &Scratch, args: &[&str]) -> String {
    let ended = run_to_end(scratch, args);
    assert_eq!(ended.code, Some(1), "stord {args:?}: {}", ended.stdout);
    ended.stderr
}

#[test]
fn export_is_looked_at_and_copied_like_an_image() {
    needs!("qemu-img");
    let mut content = noise(1, 3 * MIB);
    content.resize(BYTES, 0);
    let served = Served::start(&content[..3 * MIB], "", ",writable=on");
    let (scratch, uri) = (&served.scratch, served.uri());
    let info: Value = serde_json::from_str(&stord(scratch, &["info", "--json", &uri])).unwrap();
    assert_eq!(
        (&info["format"], &info["virtual-size"]),
        (&"raw".into(), &SIZE.into())
    );
    assert_eq!(info["filename"], uri);
    let map: Value = serde_json::from_str(&stord(scratch, &["map", "--json", &uri])).unwrap();
    let lengths: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|it| (it["length"].as_u64(), &it["zero"]))
        .collect();
    assert_eq!(
        lengths,
        [
            (Some(3 << 20), &false.into()),
            (Some(SIZE - (3 << 20)), &true.into())
        ]
    );
    stord(scratch, &["convert", &uri, "copy.qcow2"]);
    let copy = scratch.path("copy.qcow2");
    assert_same(
        "the copy",
        &qemu::content(scratch, &copy, "qcow2"),
        &content,
    );
    // The other way: what is not in the image is not in the export either.
    let other = noise(2, MIB);
    qemu::create(&scratch.path("other.qcow2"), SIZE / 2, "");
    let raw = scratch.file("other.raw", &other);
    run_ok(
        "qemu-img",
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "qcow2",
            raw.to_str().unwrap(),
            scratch.path("other.qcow2").to_str().unwrap(),
        ],
    );
    assert!(refusal(scratch, &["convert", "other.qcow2", &uri]).contains("--force"));
    let done = stord(scratch, &["convert", "--force", "other.qcow2", &uri]);
    assert!(done.starts_with("Filled"), "{done}");
    assert!(
        refusal(
            scratch,
            &["convert", "--force", "-O", "qcow2", "other.qcow2", &uri]
        )
        .contains("raw disk")
    );
    assert_eq!(run_to_end(scratch, &["check", &uri]).code, Some(63));
    assert!(!run_to_end(scratch, &["resize", &uri, "1G"]).success());
    assert!(
        refusal(scratch, &["info", &uri.replace("/disk?", "/none?")])
            .contains("Requested export not available")
    );
    let mut wanted = other;
    wanted.resize(BYTES, 0);
    served.assert_image_is(&wanted);
}

/// An image in an export, and one behind another.
#[test]
fn export_holds_an_image_or_lies_behind_one() {
    needs!("qemu-img");
    let scratch = Scratch::in_memory();
    let image = scratch.path("inner.qcow2");
    qemu::create(&image, SIZE, "");
    qemu::io(&image, "qcow2", &["write -P 5 1M 1M".to_owned()]);
    let daemon = Daemon::start(
        &scratch,
        &[
            "--blockdev",
            "driver=file,node-name=f,filename=inner.qcow2",
            "--nbd-server",
            "addr.type=unix,addr.path=nbd.sock",
            "--export",
            "nbd,id=e,node-name=f,name=x,writable=on",
        ],
    );
    let uri = format!(
        "nbd+unix:///x?socket={}",
        scratch.path("nbd.sock").display()
    );
    let info: Value = serde_json::from_str(&stord(
        &scratch,
        &["info", "--format", "qcow2", "--json", &uri],
    ))
    .unwrap();
    assert_eq!(
        (&info["format"], &info["virtual-size"]),
        (&"qcow2".into(), &SIZE.into())
    );
    stord(&scratch, &["check", "--format", "qcow2", &uri]);
    stord(
        &scratch,
        &["convert", "--format", "qcow2", &uri, "copy.raw"],
    );
    let copy = fs::read(scratch.path("copy.raw")).unwrap();
    assert!(copy[MIB..2 * MIB].iter().all(|byte| *byte == 5));
    // What a raw backing file on a server has is seen through.
    stord(
        &scratch,
        &[
            "create",
            "--backing",
            &uri,
            "--backing-format",
            "raw",
            "top.qcow2",
        ],
    );
    let top: Value =
        serde_json::from_str(&stord(&scratch, &["info", "--json", "top.qcow2"])).unwrap();
    assert_eq!(top["backing-filename"], uri);
    stord(&scratch, &["convert", "top.qcow2", "top.raw"]);
    let inner = fs::read(&image).unwrap();
    assert_same(
        "the copy",
        &fs::read(scratch.path("top.raw")).unwrap()[..inner.len()],
        &inner,
    );
    daemon.stop();
}

#[test]
fn export_is_served_again_and_mounted() {
    needs!(root, "qemu-img", "nbdcopy");
    let content = noise(3, BYTES);
    let served = Served::start(&content, "", ",writable=on");
    let (scratch, uri) = (&served.scratch, served.uri());
    assert!(refusal(scratch, &["serve", &uri]).contains("no address is given"));
    let again = format!("unix:{}", scratch.path("again.sock").display());
    let mut child = Command::new(program())
        .args(["serve", &uri, "--nbd", &again])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut passed = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut passed)
        .unwrap();
    let daemon = Daemon::adopt(scratch, child.id().try_into().unwrap());
    let copy = scratch.path("copy");
    run_ok("nbdcopy", &[passed.trim(), copy.to_str().unwrap()]);
    assert_same("the copy", &fs::read(&copy).unwrap(), &content);
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(child.wait().unwrap().success());
    drop(daemon);

    assert!(refusal(scratch, &["mount", &uri]).contains("no mountpoint is given"));
    stord(scratch, &["mount", &uri, "disk.raw"]);
    let mount = scratch.path("disk.raw");
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&mount)
        .unwrap();
    file.write_all_at(&[7; 100_000], 5000).unwrap();
    let mut read = vec![0; MIB];
    file.read_exact_at(&mut read, 10 << 20).unwrap();
    assert_same("the mount", &read, &content[10 * MIB..11 * MIB]);
    drop(file);
    stord(scratch, &["umount", "disk.raw"]);
    let mut wanted = content;
    wanted[5000..105_000].fill(7);
    served.assert_image_is(&wanted);
}

#[test]
fn tls_is_asked_for_in_the_uri() {
    needs!("qemu-img");
    let (served, uri) = serve_with_keys(Scratch::in_memory());
    let scratch = &served.scratch;
    let info: Value = serde_json::from_str(&stord(scratch, &["info", "--json", &uri])).unwrap();
    assert_eq!(info["virtual-size"], SIZE);
    assert!(refusal(scratch, &["info", &served.uri()]).contains("server requires TLS"));
    assert!(
        refusal(scratch, &["info", &uri.replace("alice@", "bob@")])
            .contains("Username bob not found")
    );
    assert!(
        refusal(scratch, &["info", &uri.replace("keys.psk", "other.txt")])
            .contains("must be called keys.psk")
    );
    // A name in an image must not choose files here.
    let create = [
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        &uri,
        "top.qcow2",
        "1M",
    ];
    let top = scratch.path("top.qcow2");
    let create: Vec<&str> = create
        .iter()
        .map(|it| {
            if *it == "top.qcow2" {
                top.to_str().unwrap()
            } else {
                it
            }
        })
        .collect();
    run_ok("qemu-img", &create);
    assert!(refusal(scratch, &["map", "top.qcow2"]).contains("asks for TLS"));
    served.daemon.stop();
}
