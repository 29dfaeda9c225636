//! What a node is called: the file name that opens it again, or, where no file name does, a `json:` description of it.
//!
//! A file name does if it belongs to the leaf right below, and the user changed nothing that decides about the content: an offset, a
//! size, another backing file than the image names. These are the reference's rules, and so is the order of a description's members.

use serde_json::{Map, Value};
use stord_qmp::schema::block::{BlockdevDriver, BlockdevRefOrNull};
use stord_qmp::{order, to_json};

use super::filename;
use crate::driver::{BACKING, Driver, FILE};
use crate::graph::Node;

/// Options that decide about the content.
const STRONG: &[&str] = &[
    "filename",
    "path",
    "offset",
    "size",
    "read-zeroes",
    "server",
    "export",
    "tls-creds",
    "tls-hostname",
];

/// The name of a node.
pub fn of_node(node: &Node) -> String {
    exact_name(node).unwrap_or_else(|| {
        let description = Value::Object(describe(node));
        format!("json:{}", stord_qmp::json::to_compact(&description))
    })
}

/// The file name of the leaf that holds the node's image.
pub fn of_leaf(node: &Node) -> String {
    match node.driver() {
        Driver::Protocol(leaf) => leaf.filename(),
        Driver::Format(_) => node
            .children()
            .node(FILE)
            .map_or_else(String::new, |file| of_leaf(&file)),
    }
}

/// The file name that opens the node again.
fn exact_name(node: &Node) -> Option<String> {
    match node.driver() {
        Driver::Protocol(leaf) => {
            let is_null = node.driver_name().starts_with("null-");
            (!is_null || strong_options(node).is_empty()).then(|| leaf.filename())
        }
        Driver::Format(_) => {
            let file = node.children().node(FILE)?;
            let is_plain = strong_options(node).is_empty() && !has_other_backing(node);
            let is_leaf = matches!(file.driver(), Driver::Protocol(_));
            (is_plain && is_leaf).then(|| exact_name(&file)).flatten()
        }
    }
}

/// The options of the node's own that decide about its content.
fn strong_options(node: &Node) -> Map<String, Value> {
    let Some(Value::Object(mut options)) = node.definition().map(to_json) else {
        return Map::new();
    };
    options.retain(|name, _| STRONG.contains(&name.as_str()));
    options
}

/// Whether what lies behind the node is not what its image names.
fn has_other_backing(node: &Node) -> bool {
    let (Driver::Format(format), Some(definition)) = (node.driver(), node.definition()) else {
        return false;
    };
    let BlockdevDriver::Qcow2(options) = &definition.driver else {
        return false;
    };
    let named = format.info().backing_file;
    let actual = node.children().node(BACKING);
    match (&named, &actual, &options.backing) {
        (_, None, None | Some(BlockdevRefOrNull::Null)) => {
            named.is_some() && options.backing.is_some()
        }
        (Some(named), Some(actual), None) => {
            let base = of_leaf(node);
            let found = filename::full_name(named, &base);
            let found = found.as_ref().unwrap_or(named);
            !named.starts_with("json:") && *found != of_node(actual)
        }
        (Some(named), Some(actual), Some(_)) => *named != of_node(actual),
        (None, Some(_), _) => true,
        (_, None, Some(_)) => named.is_some(),
    }
}

/// The options that open the node again.
fn describe(node: &Node) -> Map<String, Value> {
    let mut members = strong_options(node);
    members.insert("driver".to_owned(), node.driver_name().into());
    let other_backing = has_other_backing(node);
    for edge in node.children().edges() {
        let is_backing = edge.name() == "backing";
        match edge.node() {
            Some(_) if is_backing && !other_backing => {}
            Some(child) => {
                members.insert(edge.name().to_owned(), describe(&child).into());
            }
            None if is_backing && other_backing => {
                members.insert(edge.name().to_owned(), Value::Null);
            }
            None => {}
        }
    }
    let mut ordered: Vec<(String, Value)> = members.into_iter().collect();
    ordered.sort_by_key(|(name, _)| order::rank(name));
    ordered.into_iter().collect()
}
