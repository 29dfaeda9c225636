//! `stord info`: what an image is.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};
use stord_qmp::schema::node_info::{BlockDeviceInfo, ImageInfo};
use stord_qmp::{Error, to_json};

use super::{IMAGE, Mode, Subject, text_of};
use crate::mount::guess::Format;
use crate::mount::size_text;

/// Show what an image is: its format, its sizes, its backing file, its snapshots.
#[derive(Clone, Debug, Args)]
pub struct InfoArgs {
    /// The image
    file: PathBuf,
    /// Show the backing files, too
    #[arg(long)]
    backing_chain: bool,
    /// Print it as JSON, as qemu-img info does
    #[arg(long)]
    json: bool,
    /// Read along although another program writes to the image: what is shown may be inconsistent
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Open the image as this format instead of guessing it
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
}

/// Shows it, and returns the exit status.
pub fn run(args: &InfoArgs) -> ExitCode {
    super::run(async |_, graph| {
        let subject = Subject::look_at(&graph, &args.file, args.format)?;
        let mode = Mode {
            force_share: args.force_share,
            ..Mode::READ
        };
        graph
            .blockdev_add(subject.options(mode, !args.backing_chain))
            .await?;
        let nodes = graph.query_named_block_nodes(false).await?;
        let top = nodes
            .iter()
            .find(|node| node.node_name.as_deref() == Some(IMAGE))
            .ok_or_else(|| Error::generic("the image has gone"))?;
        // Opened without what lies behind it, it has another name for itself.
        let named = ImageInfo {
            filename: text_of(&args.file)?.to_owned(),
            ..top.image.clone()
        };
        let mut chain = Vec::new();
        let mut next = Some(&named);
        while let Some(image) = next {
            chain.push(image);
            next = image.backing_image.as_deref();
        }
        if args.json {
            let mut images: Vec<Value> = chain.iter().map(|i| as_json(i, &nodes)).collect();
            let shown = if args.backing_chain {
                Value::Array(images)
            } else {
                images.swap_remove(0)
            };
            println!("{shown:#}");
        } else {
            let texts: Vec<String> = chain.iter().map(|image| prose(image)).collect();
            print!("{}", texts.join("\n"));
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// An image as `qemu-img` describes it: with its file as a child, and without the image behind it.
fn as_json(image: &ImageInfo, nodes: &[BlockDeviceInfo]) -> Value {
    let alone = ImageInfo {
        backing_image: None,
        ..image.clone()
    };
    let mut value = to_json(&alone);
    let is_file = |node: &&BlockDeviceInfo| {
        ["file", "host_device"].contains(&node.drv.as_str()) && node.file == image.filename
    };
    let children: Vec<Value> = nodes
        .iter()
        .find(is_file)
        .map(|node| {
            let mut info = to_json(&node.image);
            info["children"] = json!([]);
            json!({"name": "file", "info": info})
        })
        .into_iter()
        .collect();
    value["children"] = Value::Array(children);
    value
}

fn prose(image: &ImageInfo) -> String {
    let size = |bytes: i64| size_text(u64::try_from(bytes).unwrap_or(0));
    let mut lines = vec![
        ("image", image.filename.clone()),
        ("format", image.format.clone()),
        (
            "size",
            format!(
                "{} ({} bytes)",
                size(image.virtual_size),
                image.virtual_size
            ),
        ),
    ];
    if let Some(actual) = image.actual_size {
        lines.push(("on disk", size(actual)));
    }
    if let Some(cluster) = image.cluster_size {
        lines.push(("cluster", size(cluster)));
    }
    if image.dirty_flag == Some(true) {
        lines.push(("state", "was not closed properly".to_owned()));
    }
    if let Some(backing) = &image.backing_filename {
        let format = image.backing_filename_format.as_deref();
        let format = format.map_or_else(String::new, |format| format!(" ({format})"));
        lines.push(("backing file", format!("{backing}{format}")));
    }
    let specific = image.format_specific.as_ref().map(to_json);
    let members = specific
        .as_ref()
        .and_then(|value| value["data"].as_object());
    for (name, value) in members.into_iter().flatten() {
        let shown = match value {
            Value::String(text) => text.clone(),
            Value::Bool(true) => "yes".to_owned(),
            Value::Bool(false) => continue,
            other => other.to_string(),
        };
        lines.push((name.as_str(), shown));
    }
    finish(&lines, image)
}

fn finish(lines: &[(&str, String)], image: &ImageInfo) -> String {
    let mut text: String = lines
        .iter()
        .map(|(name, value)| format!("{name:<17} {value}\n"))
        .collect();
    for snapshot in image.snapshots.iter().flatten() {
        let name = format!("{} '{}'", snapshot.id, snapshot.name);
        text.push_str(&format!("{:<17} {name}\n", "snapshot"));
    }
    text
}
