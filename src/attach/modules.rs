//! What the kernel must have for each way: loaded if it can be, and named if not.

use std::path::Path;
use std::process::{Command, Stdio};

use clap::ValueEnum as _;
use nix::sys::utsname::uname;
use stord_qmp::Error;

use super::via::Via;

/// A part of the kernel.
struct Part {
    module: &'static str,
    config: &'static str,
    /// It is there when this is.
    sign: &'static str,
}

const fn part(module: &'static str, config: &'static str, sign: &'static str) -> Part {
    Part {
        module,
        config,
        sign,
    }
}

fn parts(via: Via) -> &'static [Part] {
    const VDUSE: &[Part] = &[
        part("vduse", "CONFIG_VDPA_USER", "/dev/vduse/control"),
        part(
            "virtio_vdpa",
            "CONFIG_VIRTIO_VDPA",
            "/sys/bus/vdpa/drivers/virtio_vdpa",
        ),
        part(
            "virtio_blk",
            "CONFIG_VIRTIO_BLK",
            "/sys/bus/virtio/drivers/virtio_blk",
        ),
    ];
    const NBD: &[Part] = &[part("nbd", "CONFIG_BLK_DEV_NBD", "/sys/block/nbd0")];
    const LOOP: &[Part] = &[
        part("loop", "CONFIG_BLK_DEV_LOOP", "/dev/loop-control"),
        part("fuse", "CONFIG_FUSE_FS", "/dev/fuse"),
    ];
    match via {
        Via::Vduse => VDUSE,
        Via::Nbd => NBD,
        Via::Loop => LOOP,
    }
}

impl Part {
    fn is_there(&self) -> bool {
        Path::new(self.sign).exists()
    }

    /// Whether loading it would work.
    fn is_to_be_had(&self) -> bool {
        self.is_there() || modprobe(&["-n", "-q", self.module]).is_ok()
    }
}

/// Loads what the way needs.
///
/// # Errors
/// The kernel does not have it; the error says what to do, and which other way there is.
pub fn make_ready(via: Via) -> Result<(), Error> {
    for part in parts(via) {
        if part.is_there() {
            continue;
        }
        let loaded = modprobe(&[part.module]);
        // Loop devices may be made by opening their control device only.
        if let Err(reason) = loaded {
            return Err(lacking(via, part, &reason));
        }
        if !part.is_there() {
            let reason = format!("it is loaded, but '{}' is not there", part.sign);
            return Err(lacking(via, part, &reason));
        }
    }
    Ok(())
}

fn lacking(via: Via, part: &Part, reason: &str) -> Error {
    let release = uname().map_or_else(
        |_| String::new(),
        |name| format!(" {}", name.release().to_string_lossy()),
    );
    let Part { module, config, .. } = part;
    let modules: Vec<_> = parts(via).iter().map(|part| part.module).collect();
    let mut hint = format!(
        "With a kernel that has it, run: modprobe -a {}",
        modules.join(" ")
    );
    let others = Via::value_variants().iter().filter(|other| **other != via);
    let others: Vec<_> = others
        .filter(|other| parts(**other).iter().all(Part::is_to_be_had))
        .map(|other| format!("--via {}", other.name()))
        .collect();
    hint.push_str(&match others.join(" or ") {
        others if others.is_empty() => {
            "\nNo other way works here either; 'stord mount' shows the image as a file.".to_owned()
        }
        others => format!("\nHere it works with: stord attach {others} IMAGE"),
    });
    Error::generic(format!(
        "cannot attach with --via {}: the kernel{release} lacks the module {module} ({config}): {reason}",
        via.name()
    ))
    .with_hint(hint)
}

/// Runs modprobe; on failure says why in a few words.
fn modprobe(args: &[&str]) -> Result<(), String> {
    const PROGRAMS: [&str; 3] = ["modprobe", "/usr/sbin/modprobe", "/sbin/modprobe"];
    for program in PROGRAMS {
        let Ok(output) = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .output()
        else {
            continue;
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or_default();
        let last = last.rsplit("FATAL: ").next().unwrap_or(last);
        return Err(match last.trim() {
            "" => "modprobe fails".to_owned(),
            last => last.trim_end_matches('.').to_owned(),
        });
    }
    Err("modprobe is not installed (package kmod)".to_owned())
}
