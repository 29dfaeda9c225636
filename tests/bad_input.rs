//! Bad input on the command line ends the daemon with status 1 and QEMU's wording, and leaves nothing behind: no mount, no
//! socket, no pid file. Bad images are refused or read with errors; none of them ends or blocks the daemon.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rand::RngExt;
use serde_json::json;

use crate::needs;
use crate::support::daemon::{Daemon, is_qemu, program, run_to_end};
use crate::support::model::{noise, rng};
use crate::support::{Qmp, Scratch, mounts, qemu};

/// Starts the daemon with arguments of which the last two (or the last one) are at fault, and compares what it says.
#[track_caller]
fn assert_refused(scratch: &Scratch, args: &[&str], message: &str) {
    let before = scratch.names();
    // Were the arguments accepted, QEMU's daemon would run on: then the time limit makes the test fail.
    let ended = run_to_end(scratch, args);
    let wrong = refusal_fault(scratch, args, message, &before, &ended);
    assert!(wrong.is_none(), "{}", wrong.unwrap_or_default());
}

fn refusal_fault(
    scratch: &Scratch,
    args: &[&str],
    message: &str,
    before: &[String],
    ended: &crate::support::run::Ended,
) -> Option<String> {
    let program = program();
    let name = program.file_name().unwrap().to_string_lossy().into_owned();
    let wanted = format!("{name}: {message}\n");
    // Faults of the option syntax itself come from below the program, which knows its whole path only.
    let said = ended.stderr.replace(program.to_str().unwrap(), &name);
    if said != wanted {
        return Some(format!(
            "{args:?}\n  said    {said:?}\n  instead {wanted:?}"
        ));
    }
    if ended.code != Some(1) {
        return Some(format!(
            "{args:?}\n  ended with {:?} instead of 1",
            ended.code
        ));
    }
    let after = scratch.names();
    if !is_qemu() && after != before {
        return Some(format!(
            "{args:?}\n  left behind {after:?}, there was {before:?}"
        ));
    }
    let left = mounts::below(scratch.dir());
    for mount in &left {
        mounts::detach(mount);
    }
    if !is_qemu() && !left.is_empty() {
        return Some(format!("{args:?}\n  left mounts behind: {left:?}"));
    }
    None
}

/// Checks many single options: `(option, its value, the message after both)`, each preceded by the options in `first`.
#[track_caller]
fn assert_all_refused(scratch: &Scratch, first: &[&str], cases: &[(&str, &str, &str)]) {
    let mut faults = Vec::new();
    for (option, value, message) in cases {
        let mut args = first.to_vec();
        args.extend([option, value]);
        let before = scratch.names();
        let ended = run_to_end(scratch, &args);
        let message = format!("{option} {value}: {message}");
        faults.extend(refusal_fault(scratch, &args, &message, &before, &ended));
    }
    assert!(
        faults.is_empty(),
        "{} of {} are wrong:\n{}",
        faults.len(),
        cases.len(),
        faults.join("\n")
    );
}

#[test]
fn block_node_options() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("dir")).unwrap();
    qemu::create(&scratch.path("a.qcow2"), 1 << 20, "");
    let b = "--blockdev";
    assert_all_refused(
        &scratch,
        &[],
        &[
            (
                b,
                "file,filename=missing",
                "'node-name' must be specified for the root node",
            ),
            (
                b,
                "file,node-name=f,filename=missing",
                "Could not open 'missing': No such file or directory",
            ),
            (
                b,
                "file,node-name=f,filename=dir",
                "Could not open 'dir': Is a directory",
            ),
            (b, "file,node-name=f", "Parameter 'filename' is missing"),
            (b, "file", "Parameter 'filename' is missing"),
            (b, "", "Parameter 'driver' is missing"),
            (
                b,
                "node-name=f,filename=a.qcow2",
                "Parameter 'driver' is missing",
            ),
            (
                b,
                "driver=nope,node-name=f",
                "Parameter 'driver' does not accept value 'nope'",
            ),
            (b, "[1]", "Parameter 'driver' does not accept value '[1]'"),
            (
                b,
                "driver=file,node-name=f,filename=a.qcow2,bogus=1",
                "Parameter 'bogus' is unexpected",
            ),
            (
                b,
                "driver=qcow2,node-name=f,file.driver=file,file.filename=a.qcow2,file.bogus=1",
                "Parameter 'file.bogus' is unexpected",
            ),
            (
                b,
                "driver=qcow2,node-name=f,file.driver=file",
                "Parameter 'file.filename' is missing",
            ),
            (b, "driver=qcow2,node-name=f", "Parameter 'file' is missing"),
            (
                b,
                "driver=qcow2,node-name=f,file=nofile",
                "Cannot find device='nofile' nor node-name='nofile'",
            ),
            (
                b,
                "qcow2,node-name=f,file.driver=file,file.filename=a.qcow2,backing.driver=file",
                "Parameter 'backing.filename' is missing",
            ),
            (
                b,
                "qcow2,node-name=f,file.driver=file,file.filename=a.qcow2,backing=nonode",
                "Could not open backing file: Cannot find device='nonode' nor node-name='nonode'",
            ),
            (
                b,
                "driver=file,node-name=f,filename=a.qcow2,read-only=maybe",
                "Parameter 'read-only' expects 'on' or 'off'",
            ),
            (
                b,
                "driver=file,node-name=f,filename=a.qcow2,cache.direct=x",
                "Parameter 'cache.direct' expects 'on' or 'off'",
            ),
            (
                b,
                "driver=file,node-name=f,filename=a.qcow2,cache=x",
                "Invalid parameter type for 'cache', expected: object",
            ),
            (
                b,
                "driver=file,node-name=f,filename=a.qcow2,aio=foo",
                "Parameter 'aio' does not accept value 'foo'",
            ),
            (
                b,
                "driver=file,node-name=f,filename=a.qcow2,discard=foo",
                "Parameter 'discard' does not accept value 'foo'",
            ),
            (
                b,
                "driver=raw,node-name=r,offset=abc,file.driver=file,file.filename=a.qcow2",
                "Parameter 'offset' expects integer",
            ),
            (
                b,
                "driver=null-co,node-name=r,size=abc",
                "Parameter 'size' expects integer",
            ),
            (
                b,
                "driver=null-co,node-name=r,size=1M",
                "Parameter 'size' expects integer",
            ),
            (b, "driver=null-co,node-name=0r", "Invalid node-name: '0r'"),
            (
                b,
                "null-co,node-name=a-name-that-is-longer-than-the-thirty-one-allowed",
                "Node name too long",
            ),
            (
                b,
                r#"{"driver":"null-co","node-name":5}"#,
                "Invalid parameter type for 'node-name', expected: string",
            ),
            (
                b,
                r#"{"driver":"null-co","node-name":"x","size":"5"}"#,
                "Invalid parameter type for 'size', expected: integer",
            ),
            (
                b,
                r#"{"driver":"qcow2","node-name":"x","file":{"driver":"file","filename":7}}"#,
                "Invalid parameter type for 'file.filename', expected: string",
            ),
            (
                b,
                r#"{"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"a.qcow2","cache":{"direct":"on"}}}"#,
                "Invalid parameter type for 'file.cache.direct', expected: boolean",
            ),
            (
                b,
                r#"{"driver":"qcow2","node-name":"q","file":5}"#,
                "Invalid parameter type for 'file', expected: BlockdevRef",
            ),
            (
                b,
                r#"{"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"a.qcow2"},"backing":5}"#,
                "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
            ),
            (
                b,
                r#"{"driver":"null-co","#,
                "JSON parse error, premature EOI",
            ),
            (
                b,
                r#"{"driver":"null-co","node-name":"x"} x"#,
                "Expecting at most one JSON value",
            ),
            (
                b,
                "raw,node-name=r,size=100,offset=2000000,file.driver=null-co,file.size=197120",
                "Offset (2000000) cannot be greater than size of the containing file (197120)",
            ),
            (
                b,
                "raw,node-name=r,size=10000000,file.driver=null-co,file.size=197120",
                "The sum of offset (0) and size (10000000) has to be smaller or equal to the  actual size of the \
                 containing file (197120)",
            ),
            (
                b,
                "file,node-name=f,filename=a.qcow2,aio=native",
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            ),
            (
                b,
                "file,node-name=f,filename=a.qcow2,detect-zeroes=unmap",
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            ),
            (
                b,
                "host_device,node-name=f,filename=a.qcow2",
                "'host_device' driver requires 'a.qcow2' to be either a character or block device",
            ),
            (
                b,
                "file,node-name=f,filename=/dev/null",
                "'file' driver requires '/dev/null' to be a regular file",
            ),
            (
                b,
                "qcow2,node-name=d,file.driver=file,file.filename=a.qcow2,lazy-refcounts=7",
                "Parameter 'lazy-refcounts' expects 'on' or 'off'",
            ),
            (
                b,
                "qcow2,node-name=d,file.driver=file,file.filename=a.qcow2,l2-cache-size=1000000000,cache-size=5",
                "l2-cache-size may not exceed cache-size",
            ),
        ],
    );
}

#[test]
fn node_names_and_references() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    qemu::create(&scratch.path("a.qcow2"), 1 << 20, "");
    assert_all_refused(
        &scratch,
        &["--blockdev", "null-co,node-name=a"],
        &[(
            "--blockdev",
            "null-co,node-name=a",
            "Duplicate nodes with node-name='a'",
        )],
    );
    assert_all_refused(
        &scratch,
        &[
            "--blockdev",
            "file,node-name=f,filename=a.qcow2",
            "--blockdev",
            "qcow2,node-name=d,file=f",
        ],
        &[(
            "--blockdev",
            "qcow2,node-name=e,file=f",
            "Permission conflict on node 'f': permissions 'write, resize' are both required by node 'd' (uses node 'f' \
             as 'file' child) and unshared by node 'e' (uses node 'f' as 'file' child).",
        )],
    );
}

#[test]
fn export_options() {
    needs!(root);
    let scratch = Scratch::new();
    scratch.empty_file("mnt");
    fs::create_dir(scratch.path("dir")).unwrap();
    let e = "--export";
    let node = ["--blockdev", "null-co,node-name=a,size=1048576"];
    assert_all_refused(
        &scratch,
        &node,
        &[
            (e, "", "Parameter 'type' is missing"),
            (
                e,
                "id=e,node-name=a,mountpoint=mnt",
                "Parameter 'type' is missing",
            ),
            (
                e,
                "bogus,id=e,node-name=a,mountpoint=mnt",
                "Parameter 'type' does not accept value 'bogus'",
            ),
            (
                e,
                "fuse,id=e,node-name=a",
                "Parameter 'mountpoint' is missing",
            ),
            (
                e,
                "fuse,id=e,node-name=b,mountpoint=mnt",
                "Cannot find device='' nor node-name='b'",
            ),
            (
                e,
                "fuse,id=e,node-name=a,mountpoint=dir",
                "'dir' is not a regular file",
            ),
            (
                e,
                "fuse,id=e,node-name=a,mountpoint=absent",
                "Failed to stat 'absent': No such file or directory",
            ),
            (
                e,
                "fuse,id=e,node-name=a,mountpoint=mnt,growable=1",
                "Parameter 'growable' expects 'on' or 'off'",
            ),
            (
                e,
                "fuse,id=e,node-name=a,mountpoint=mnt,allow-other=foo",
                "Parameter 'allow-other' does not accept value 'foo'",
            ),
            (
                e,
                "fuse,id=e,node-name=a,mountpoint=mnt,bogus=foo",
                "Parameter 'bogus' is unexpected",
            ),
            (
                e,
                "fuse,id=0e,node-name=a,mountpoint=mnt",
                "Invalid block export id",
            ),
            (
                e,
                "fuse,id=e,node-name=a,mountpoint=mnt,iothread=nope",
                "iothread \"nope\" not found",
            ),
            (
                e,
                r#"{"type":"fuse","id":"e","node-name":"a","mountpoint":"mnt","writable":"on"}"#,
                "Invalid parameter type for 'writable', expected: boolean",
            ),
            (
                e,
                r#"{"type":"fuse","id":"e","node-name":"a"}"#,
                "Parameter 'mountpoint' is missing",
            ),
        ],
    );
    assert_all_refused(
        &scratch,
        &[
            "--blockdev",
            "null-co,node-name=a,size=1048576,read-only=on",
        ],
        &[(
            e,
            "fuse,id=e,node-name=a,mountpoint=mnt,writable=on",
            "Cannot export read-only node as writable",
        )],
    );
    // A mount that was made before the fault must be gone again.
    scratch.empty_file("other");
    assert_all_refused(
        &scratch,
        &[&node[..], &[e, "fuse,id=e,node-name=a,mountpoint=mnt"]].concat(),
        &[
            (
                e,
                "fuse,id=e,node-name=a,mountpoint=other",
                "Block export id 'e' is already in use",
            ),
            (
                e,
                "fuse,id=f,node-name=a,mountpoint=absent",
                "Failed to stat 'absent': No such file or directory",
            ),
        ],
    );
}

#[test]
fn chardev_monitor_and_object_options() {
    let scratch = Scratch::new();
    let (c, m, o) = ("--chardev", "--monitor", "--object");
    assert_all_refused(
        &scratch,
        &[],
        &[
            (
                c,
                "socket,id=a,path=/nonexistent/x,server=on,wait=off",
                "Failed to bind socket to /nonexistent/x: No such file or directory",
            ),
            (
                c,
                "socket,path=x,server=on,wait=off",
                "chardev: no id specified",
            ),
            (c, "null", "chardev: no id specified"),
            (c, "bogus,id=a", "'bogus' is not a valid char driver name"),
            (c, "id=a,path=x", "chardev: \"a\" missing backend"),
            (
                c,
                "socket,id=a,path=x,server=on,wait=off,bogus=1",
                "Invalid parameter 'bogus'",
            ),
            (
                c,
                "socket,id=a,server=maybe,path=x",
                "Parameter 'server' expects 'on' or 'off'",
            ),
            (
                c,
                "socket,id=a,path=absent.sock,server=off",
                "Failed to connect to 'absent.sock': No such file or directory",
            ),
            (
                c,
                "socket,id=a,host=127.0.0.1,port=1,server=off",
                "Failed to connect to '127.0.0.1:1': Connection refused",
            ),
            (c, "file,id=a", "chardev: file: no filename given"),
            (
                c,
                "file,id=a,path=/nonexistent/x",
                "Could not open '/nonexistent/x': No such file or directory",
            ),
            (m, "chardev=nope", "chardev \"nope\" not found"),
            (m, "nope", "chardev \"nope\" not found"),
            (m, "", "Parameter 'chardev' is missing"),
            (m, "mode=control", "Parameter 'chardev' is missing"),
            (
                m,
                "chardev=nope,mode=foo",
                "Parameter 'mode' does not accept value 'foo'",
            ),
            (o, "", "Parameter 'qom-type' is missing"),
            (o, "id=x", "Parameter 'qom-type' is missing"),
            (o, "iothread", "Parameter 'id' is missing"),
            (
                o,
                "bogus,id=x",
                "Parameter 'qom-type' does not accept value 'bogus'",
            ),
            (
                o,
                "iothread,id=x,bogus=1",
                "Parameter 'bogus' is unexpected",
            ),
            (
                o,
                "iothread,id=x,poll-max-ns=abc",
                "Parameter 'poll-max-ns' expects integer",
            ),
            (
                o,
                r#"{"qom-type":"iothread","id":"x","poll-max-ns":"5"}"#,
                "Invalid parameter type for 'poll-max-ns', expected: integer",
            ),
            (
                o,
                r#"{"qom-type":"iothread","id":"x","poll-max-ns":-5}"#,
                "poll-max-ns value must be in range [0, 9223372036854775807]",
            ),
        ],
    );
    assert_all_refused(
        &scratch,
        &[o, "iothread,id=x"],
        &[(
            o,
            "iothread,id=x",
            "attempt to add duplicate property 'x' to object (type 'container')",
        )],
    );
    // The socket that was listening before the fault must be gone again.
    assert_all_refused(
        &scratch,
        &[c, "socket,id=c,path=qmp.sock,server=on,wait=off", m, "c"],
        &[(m, "c", "chardev 'c' is already in use")],
    );
}

#[test]
fn unknown_options_and_arguments() {
    let scratch = Scratch::new();
    for (args, message) in [
        (&["--bogus"][..], "unrecognized option '--bogus'"),
        (&["-x"], "invalid option -- 'x'"),
        // In the first place it would be one of our own commands.
        (
            &["--blockdev", "null-co,node-name=n", "operand"],
            "operand: Unexpected argument",
        ),
        (&["--blockdev"], "option '--blockdev' requires an argument"),
        (&["--help=foo"], "option '--help' doesn't allow an argument"),
        (
            &["--daemonize=x"],
            "option '--daemonize' doesn't allow an argument",
        ),
    ] {
        assert_refused(&scratch, args, message);
    }
}

#[test]
fn pid_file_that_cannot_be_written() {
    needs!(root);
    let scratch = Scratch::new();
    scratch.empty_file("mnt");
    assert_refused(
        &scratch,
        &[
            "--blockdev",
            "null-co,node-name=a",
            "--export",
            "fuse,id=e,node-name=a,mountpoint=mnt",
            "--pidfile",
            "/nonexistent/pid",
        ],
        "cannot create PID file: Could not create '/nonexistent/pid': No such file or directory",
    );
}

/// Overwrites bytes of a file.
fn patch(image: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new()
        .write(true)
        .open(image)
        .unwrap()
        .write_all_at(bytes, at)
        .unwrap();
}

fn open_qcow2(name: &str) -> String {
    format!("qcow2,node-name=q,file.driver=file,file.filename={name}")
}

#[test]
fn headers_that_cannot_be() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    let image = scratch.path("bad.qcow2");
    let option = open_qcow2("bad.qcow2");
    let cases: &[(u64, &[u8], &str)] = &[
        (0, b"QFI\xfa", "Image is not in qcow2 format"),
        (4, &[0, 0, 0, 4], "Unsupported qcow2 version 4"),
        (
            8,
            &[0, 0, 0, 0, 0, 0, 255, 0, 0, 0, 63, 0],
            "Backing file name too long",
        ),
        (20, &[0, 0, 0, 8], "Unsupported cluster size: 2^8"),
        (20, &[0, 0, 0, 63], "Unsupported cluster size: 2^63"),
        (24, &[63, 0, 0, 0, 0, 0, 0, 0], "Image is too big"),
        (36, &[63, 0, 0, 0], "Active L1 table too large"),
        (
            40,
            &[0, 0, 0, 0, 0, 3, 0, 1],
            "Active L1 table offset invalid",
        ),
        (
            48,
            &[0, 0, 0, 0, 0, 1, 0, 1],
            "Reference count table offset invalid",
        ),
        (56, &[63, 0, 0, 0], "Reference count table too large"),
        (60, &[63, 0, 0, 0], "Snapshot table too large"),
        (
            72,
            &[0, 0, 0, 0, 1, 0, 0, 0],
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 1000000",
        ),
        (
            72,
            &[0, 0, 0, 0, 0, 0, 0, 2],
            "qcow2: Image is corrupt; cannot be opened read/write",
        ),
        (
            96,
            &[0, 0, 0, 9],
            "Reference count entry width too large; may not exceed 64 bits",
        ),
        (100, &[0, 0, 0, 1], "qcow2 header too short"),
    ];
    for (at, bytes, message) in cases {
        qemu::create(&image, 64 << 20, "");
        patch(&image, *at, bytes);
        assert_all_refused(&scratch, &[], &[("--blockdev", &option, message)]);
    }
    for (length, message) in [
        (100, "qcow2 header too short"),
        (0, "Image is not in qcow2 format"),
    ] {
        qemu::create(&image, 64 << 20, "");
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(length)
            .unwrap();
        assert_all_refused(&scratch, &[], &[("--blockdev", &option, message)]);
    }
}

#[test]
fn backing_files_that_cannot_be_opened() {
    needs!("qemu-img");
    let scratch = Scratch::new();
    let make = |name: &str, backing: &str, format: &str| {
        let path = scratch.path(name);
        let options = format!("backing_file={backing},backing_fmt={format}");
        qemu::img(&[
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-o",
            &options,
            path.to_str().unwrap(),
            "1M",
        ]);
    };
    make("missing-backing.qcow2", "missing.qcow2", "qcow2");
    make("unknown-protocol.qcow2", "bogus:x", "raw");
    make("one.qcow2", "two.qcow2", "qcow2");
    make("two.qcow2", "one.qcow2", "qcow2");
    make("self.qcow2", "self.qcow2", "qcow2");
    // QEMU's daemon names the file as the image does; ours may resolve it first.
    assert_all_refused(
        &scratch,
        &[],
        &[
            (
                "--blockdev",
                &open_qcow2("missing-backing.qcow2"),
                "Could not open backing file: Could not open 'missing.qcow2': No such file or directory",
            ),
            (
                "--blockdev",
                &open_qcow2("unknown-protocol.qcow2"),
                "Could not open backing file: Unknown protocol 'bogus'",
            ),
        ],
    );
    if is_qemu() {
        return; // It follows a loop of read-only images for ever.
    }
    for name in ["one.qcow2", "self.qcow2"] {
        for read_only in ["", ",read-only=on,file.read-only=on"] {
            let before = scratch.names();
            let ended = run_to_end(&scratch, &["--blockdev", &(open_qcow2(name) + read_only)]);
            assert_eq!(ended.code, Some(1), "{ended:?}");
            assert!(
                ended.stderr.contains("Could not open backing file: "),
                "{ended:?}"
            );
            assert_eq!(scratch.names(), before);
        }
    }
}

/// A daemon with a QMP socket and nothing else.
fn with_monitor(scratch: &Scratch) -> (Daemon, Qmp) {
    let daemon = Daemon::start(
        scratch,
        &[
            "--chardev",
            "socket,id=c,path=qmp.sock,server=on,wait=off",
            "--monitor",
            "chardev=c",
        ],
    );
    let qmp = Qmp::connect(&scratch.path("qmp.sock"));
    (daemon, qmp)
}

/// Opens the image if the daemon takes it, reads all of it and writes here and there if it can: errors are welcome, but the
/// daemon must answer afterwards.
fn exercise(scratch: &Scratch, qmp: &mut Qmp, name: &str, writable: bool) -> bool {
    let added = qmp.try_execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "q", "read-only": !writable,
               "file": {"driver": "file", "filename": name, "read-only": !writable}}),
    );
    if added.is_err() {
        return false;
    }
    let mountpoint = scratch.empty_file("mnt");
    qmp.execute(
        "block-export-add",
        json!({"type": "fuse", "id": "e", "node-name": "q", "mountpoint": "mnt", "writable": writable}),
    );
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .open(&mountpoint)
        .unwrap();
    let size = file.metadata().unwrap().len();
    let mut piece = vec![0; 256 << 10];
    for at in (0..size.min(64 << 20)).step_by(piece.len()) {
        let _ = file.read_at(&mut piece, at);
    }
    if writable {
        for n in 0..40 {
            let _ = file.write_at(&noise(n, 3000), n * 99_991 % size.max(1));
        }
        let _ = file.sync_all();
    }
    drop(file);
    qmp.execute("block-export-del", json!({"id": "e"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.execute("blockdev-del", json!({"node-name": "q"}));
    true
}

#[test]
fn truncated_images_give_errors_and_nothing_worse() {
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::in_memory();
    let whole = scratch.path("whole.qcow2");
    qemu::create(&whole, 8 << 20, "cluster_size=4096");
    qemu::io(&whole, "qcow2", &["write -P 1 0 8M".to_owned()]);
    let length = whole.metadata().unwrap().len();
    let (mut daemon, mut qmp) = with_monitor(&scratch);
    for part in 0..12 {
        let name = format!("part-{part}.qcow2");
        fs::copy(&whole, scratch.path(&name)).unwrap();
        File::options()
            .write(true)
            .open(scratch.path(&name))
            .unwrap()
            .set_len(length * part / 12)
            .unwrap();
        exercise(&scratch, &mut qmp, &name, part % 2 == 1);
        assert!(daemon.is_alive(), "cut to {part}/12: {}", daemon.log());
    }
    qmp.execute("quit", json!({}));
    daemon.assert_ends_well();
}

#[test]
fn fuzzed_images_give_errors_and_nothing_worse() {
    needs!(root, "qemu-img", "qemu-io");
    let scratch = Scratch::in_memory();
    let sound = scratch.path("sound.qcow2");
    qemu::create(&sound, 8 << 20, "cluster_size=4096");
    qemu::io(
        &sound,
        "qcow2",
        &["write -P 1 0 4M".to_owned(), "write -z 5M 1M".to_owned()],
    );
    qemu::img(&["snapshot", "-c", "s", sound.to_str().unwrap()]);
    qemu::io(&sound, "qcow2", &["write -P 2 1M 1M".to_owned()]);
    let bytes = fs::read(&sound).unwrap();
    let (mut daemon, mut qmp) = with_monitor(&scratch);
    let mut opened = 0;
    for seed in 0..80 {
        let mut rng = rng(seed);
        let mut fuzzed = bytes.clone();
        // The tables lie at the front, between data clusters; the header is what decides whether they are looked at.
        for _ in 0..rng.random_range(1..12) {
            let region = if rng.random_bool(0.3) { 112 } else { 128 << 10 };
            let at = rng.random_range(4..region);
            fuzzed[at] = if rng.random() {
                rng.random()
            } else {
                1 << rng.random_range(0..8)
            };
        }
        let name = format!("fuzzed-{seed}.qcow2");
        fs::write(scratch.path(&name), fuzzed).unwrap();
        opened += u32::from(exercise(&scratch, &mut qmp, &name, seed % 2 == 1));
        assert!(daemon.is_alive(), "seed {seed}: {}", daemon.log());
        fs::remove_file(scratch.path(&name)).unwrap();
    }
    assert!(
        (10..80).contains(&opened),
        "{opened} of 80 could be opened: the test no longer shows both ways"
    );
    qmp.execute("quit", json!({}));
    daemon.assert_ends_well();
}
