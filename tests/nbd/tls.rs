//! NBD over TLS.

use std::fs;
use std::path::Path;

use super::{BYTES, SIZE, Served};
use crate::needs;
use crate::support::model::{assert_same, noise};
use crate::support::pki::Pki;
use crate::support::run::{run, run_ok};
use crate::support::{Scratch, qemu};

/// Starts a server with pre-shared keys, which need no certificates, and gives the URI of the client that has one.
pub(super) fn serve_with_keys(scratch: Scratch) -> (Served, String) {
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, SIZE, "");
    let keys = scratch.file("keys.psk", b"alice:000102030405060708090a0b0c0d0e0f\n");
    let credentials = format!(
        "tls-creds-psk,id=tls,endpoint=server,dir={}",
        scratch.dir().display()
    );
    let served = Served::start_over(
        scratch,
        image,
        &["--object", &credentials],
        ",tls-creds=tls",
        ",writable=on",
    );
    let uri = format!(
        "nbds+unix://alice@/disk?socket={}&tls-psk-file={}",
        served.socket.display(),
        keys.display()
    );
    (served, uri)
}

#[test]
fn tls_carries_everything_and_is_demanded() {
    needs!("qemu-img", "nbdcopy", "nbdinfo");
    let (served, uri) = serve_with_keys(Scratch::in_memory());
    let content = noise(8, BYTES);
    let source = served.scratch.file("source", &content);
    run_ok(
        "nbdcopy",
        &["--connections=2", source.to_str().unwrap(), &uri],
    );
    let target = served.scratch.path("target");
    run_ok("nbdcopy", &[&uri, target.to_str().unwrap()]);
    assert_same("the copy", &fs::read(&target).unwrap(), &content);
    let plain = run("nbdinfo", &[served.uri()]);
    assert!(!plain.success());
    let wrong = served
        .scratch
        .file("wrong.psk", b"alice:ff0102030405060708090a0b0c0d0e0f\n");
    let wrong = uri.replace("keys.psk", wrong.file_name().unwrap().to_str().unwrap());
    assert!(!run("nbdinfo", &[wrong]).success());
    served.assert_image_is(&content);
}

#[test]
fn tls_is_refused_where_there_is_none() {
    needs!("qemu-img", "nbdinfo");
    let served = Served::start(&[], "", "");
    let keys = served
        .scratch
        .file("keys.psk", b"alice:000102030405060708090a0b0c0d0e0f\n");
    let uri = format!(
        "nbds+unix://alice@/disk?socket={}&tls-psk-file={}",
        served.socket.display(),
        keys.display()
    );
    assert!(!run("nbdinfo", &[uri]).success());
    assert!(Path::new(&served.socket).exists());
    served.daemon.stop();
}

#[test]
fn certificates_and_a_rule_say_who_may_come() {
    needs!("qemu-img", "qemu-io", "certtool");
    let scratch = Scratch::in_memory();
    let pki = Pki::new(&scratch);
    let dir = pki.directory("creds", "ca", "expiration_days = 1");
    pki.authority("other");
    let stranger = pki.directory("stranger", "other", "expiration_days = 1");
    fs::copy(dir.join("ca-cert.pem"), stranger.join("ca-cert.pem")).unwrap();
    let image = scratch.path("disk.qcow2");
    qemu::create(&image, SIZE, "");
    let credentials = format!(
        "tls-creds-x509,id=tls,endpoint=server,dir={}",
        dir.display()
    );
    let serve = |scratch: Scratch, identity: &str| {
        let rule = format!(
            "authz-simple,id=rule,identity={}",
            identity.replace(',', ",,")
        );
        Served::start_over(
            scratch,
            image.clone(),
            &["--object", &credentials, "--object", &rule],
            ",tls-creds=tls,tls-authz=rule",
            "",
        )
    };
    let read = |served: &Served, dir: &Path| {
        let credentials = format!("tls-creds-x509,id=c,endpoint=client,dir={}", dir.display());
        let options = format!(
            "driver=nbd,export=disk,server.type=unix,server.path={},tls-creds=c,tls-hostname=localhost",
            served.socket.display()
        );
        run(
            "qemu-io",
            &[
                "--object",
                &credentials,
                "--image-opts",
                &options,
                "-r",
                "-c",
                "read 0 4k",
            ],
        )
    };
    let served = serve(Scratch::in_memory(), crate::support::pki::NAME);
    let good = read(&served, &dir);
    assert!(good.success(), "{}{}", good.stdout, good.stderr);
    assert!(!read(&served, &stranger).success());
    served.daemon.stop();
    let served = serve(Scratch::in_memory(), "CN=somebody.else");
    assert!(!read(&served, &dir).success());
    served.daemon.stop();
}
