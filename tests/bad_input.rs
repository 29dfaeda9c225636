//! Bad input on the command line ends the daemon with status 1 and QEMU's wording, and leaves nothing behind: no mount, no
//! socket, no pid file.

use std::fs;

use crate::needs;
use crate::support::refusal::{assert_all_refused, assert_refused};
use crate::support::{Scratch, qemu};

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
