//! Says what a mount shows and how to get rid of it.

use stord_qmp::Error;
use stord_qmp::schema::node_info::ImageInfo;

use super::MountArgs;
use super::guess::Format;
use super::plan::{IMAGE_NODE, Layout, Plan};
use crate::daemon::Daemon;
use crate::report::{self, Origin};

/// Says what is there now and how to get rid of it.
pub async fn announce(daemon: &Daemon, plan: &Plan, args: &MountArgs) -> Result<(), Error> {
    let nodes = daemon.graph.query_named_block_nodes(false).await?;
    let info = |name: &str| {
        let node = nodes
            .iter()
            .find(|node| node.node_name.as_deref() == Some(name));
        node.map(|node| &node.image)
    };
    let shown = args.image.display();
    if args.format.is_none() && plan.format == Format::Raw {
        Origin::none().info(&format!(
            "'{shown}' has no known image format and was opened as raw"
        ));
    }
    for line in info(IMAGE_NODE).into_iter().flat_map(other_files) {
        Origin::none().info(&format!("'{shown}' {line}"));
    }
    let node = plan.layout.node();
    let size = info(&node).and_then(|info| u64::try_from(info.virtual_size).ok());
    let mut details = plan.format.name().to_owned();
    match &plan.layout {
        Layout::Whole => {}
        Layout::Partition(partition) => {
            details.push_str(&format!(", partition {}", partition.number));
        }
        Layout::Directory(partitions) => details.push_str(&match partitions.len() {
            1 => ", 1 partition".to_owned(),
            count => format!(", {count} partitions"),
        }),
    }
    if let Some(size) = size {
        details.push_str(&format!(", {}", size_text(size)));
    }
    details.push_str(if plan.read_only { ", read-only" } else { "" });
    let at = plan.mountpoint.display();
    let end = if args.foreground {
        "Press Ctrl-C to unmount it.".to_owned()
    } else {
        format!("Unmount it with: stord umount '{at}'")
    };
    report::print(&format!("'{shown}' ({details}) is at '{at}'\n{end}\n"));
    Ok(())
}

/// The other files that the image makes us open, which a guest can choose if the format was
/// guessed from what it wrote.
fn other_files(info: &ImageInfo) -> Vec<String> {
    use stord_qmp::schema::node_info::ImageInfoSpecificKind;
    let mut lines = Vec::new();
    if let Some(backing) = info
        .full_backing_filename
        .as_ref()
        .or(info.backing_filename.as_ref())
    {
        lines.push(format!("has the backing file '{backing}'"));
    }
    if let Some(specific) = &info.format_specific
        && let ImageInfoSpecificKind::Qcow2(qcow2) = &specific.format
        && let Some(data_file) = &qcow2.data.data_file
    {
        lines.push(format!("has its data in '{data_file}'"));
    }
    lines
}

/// A number of bytes as people read it.
pub fn size_text(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut unit, mut whole, mut rest) = (None, bytes, 0);
    for name in UNITS {
        if whole < 1024 {
            break;
        }
        (unit, whole, rest) = (Some(name), whole / 1024, whole % 1024);
    }
    match (unit, rest * 10 / 1024) {
        (None, _) => format!("{whole} bytes"),
        (Some(unit), 0) => format!("{whole} {unit}"),
        (Some(unit), tenth) => format!("{whole}.{tenth} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(size_text(bytes), text);
        }
    }
}
