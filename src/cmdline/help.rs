//! The texts of `--help` and `--version`. What is listed is what is built.

use crate::report::program;

/// The version of the reference whose command line and QMP are spoken.
pub const REFERENCE: &str = "10.0.2";

/// The name under which the daemon stands in for the reference.
pub const REFERENCE_NAME: &str = "qemu-storage-daemon";

/// What `--version` prints. Under the reference's name it is the reference's version, because
/// programs that drive it read what it can do from that.
pub fn version() -> String {
    let ours = env!("CARGO_PKG_VERSION");
    if program() == REFERENCE_NAME {
        format!("{REFERENCE_NAME} version {REFERENCE} (stord {ours})\n")
    } else {
        format!("stord version {ours} (compatible with {REFERENCE_NAME} {REFERENCE})\n")
    }
}

/// What `--help` prints.
pub fn usage() -> String {
    let program = program();
    let mut text = format!("Usage: {program} [options]\n");
    if program != REFERENCE_NAME {
        text.push_str(&format!(
            "       {program} mount IMAGE [MOUNTPOINT]   (see {program} mount --help)\n\
             \x20      {program} umount MOUNTPOINT|IMAGE\n"
        ));
    }
    text.push_str(OPTIONS);
    text
}

const OPTIONS: &str = "\
Storage daemon: serves disk images to the host, controlled over QMP

  -h, --help             show this help and exit
  -V, --version          show version information and exit
  -T, --trace [[enable=]<pattern>][,events=<file>][,file=<file>]
                         log the events whose name matches the pattern;
                         '-T help' explains the patterns

  --blockdev [driver=]<driver>,node-name=<N>[,discard=ignore|unmap]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,auto-read-only=on|off]
             [,force-share=on|off][,detect-zeroes=on|off|unmap]
             [,driver specific parameters...]
                         open a block node; drivers are file, host_device,
                         null-aio, null-co, qcow2 and raw

  --chardev <backend>,id=<id>[,backend specific parameters...]
                         make a character device
  --chardev socket,id=<id>,path=<path>[,abstract=on|off][,tight=on|off]
            [,server=on|off][,wait=on|off]
  --chardev socket,id=<id>,host=<host>,port=<port>[,to=<port>]
            [,ipv4=on|off][,ipv6=on|off][,nodelay=on|off]
            [,server=on|off][,wait=on|off]
  --chardev file,id=<id>,path=<path>[,input-path=<path>][,append=on|off]
  --chardev stdio,id=<id>[,signal=on|off]
  --chardev null,id=<id>

  --daemonize            go into the background; the process that was
                         started exits once start-up is complete

  --export [type=]fuse,id=<id>,node-name=<node-name>,mountpoint=<file>
           [,growable=on|off][,writable=on|off][,allow-other=on|off|auto]
                         show a block node as a file through FUSE

  --export [type=]nbd,id=<id>,node-name=<node-name>[,name=<export-name>]
           [,description=<text>][,writable=on|off]
                         show a block node to clients of the NBD server

  --monitor [chardev=]<id>[,mode=control][,pretty=on|off]
                         speak QMP on a character device

  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>
               [,max-connections=<n>][,handshake-max-seconds=<n>]
  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<n>]
               [,handshake-max-seconds=<n>]
                         start the NBD server

  --object help          list the object types
  --object <type>,help   list the properties of an object type
  --object <type>,id=<id>[,<property>=<value>...]
                         make an object

  --pidfile <path>       write the process ID to a file after start-up

The values of --blockdev, --export, --monitor and --object may also be
JSON objects. Options are done in the order given.
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_fits_a_terminal() {
        assert!(usage().lines().all(|line| line.len() < 80));
    }
}
