//! What is left of an answer when everything is taken out that differs from run to run: times, numbers of threads, names made up
//! on the way, and the order of lists that have none.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

/// Lists that come in no particular order, and the member that tells their entries apart.
const UNORDERED: &[&str] = &[
    "qom-list",
    "qom-list-types",
    "qom-list-properties",
    "query-chardev",
    "query-chardev-backends",
];

/// Members whose values are as they happen to be.
const ACCIDENTAL: &[&str] = &["idle_time_ns", "thread-id", "date-sec", "date-nsec"];

/// What has been made up so far.
#[derive(Default)]
pub struct Normal {
    nodes: HashMap<String, String>,
}

impl Normal {
    /// Makes a message comparable.
    pub fn message(&mut self, message: &mut Value) {
        match message {
            Value::Object(members) => self.members(members),
            Value::Array(values) => values.iter_mut().for_each(|value| self.message(value)),
            Value::String(text) => *text = self.text(text),
            _ => {}
        }
    }

    /// Makes the answer to a request comparable.
    pub fn answer(&self, request: &[u8], answer: &mut Value) {
        let request: Value = serde_json::from_slice(request).unwrap_or_default();
        let command = request["execute"].as_str().unwrap_or_default();
        if UNORDERED.contains(&command)
            && let Some(Value::Array(entries)) = answer.get_mut("return")
        {
            entries.sort_by_key(|entry| {
                let name = entry.get("name").or(entry.get("label"));
                name.map(Value::to_string)
            });
        }
    }

    fn members(&mut self, members: &mut Map<String, Value>) {
        members.retain(|name, _| name != "timestamp");
        for (name, value) in members {
            let is_time = name.ends_with("_total_time_ns");
            if ACCIDENTAL.contains(&name.as_str()) || (is_time && value.as_i64() != Some(0)) {
                *value = json!("as it happens");
            } else {
                self.message(value);
            }
        }
    }

    /// Numbers the names of nodes that the user has not named in the order in which they are told.
    fn text(&mut self, text: &str) -> String {
        let mut parts = text.split("#block");
        let mut normal = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (number, rest) = part.split_at(digits);
            let next = format!("#node{}", self.nodes.len());
            normal += self.nodes.entry(number.to_owned()).or_insert(next);
            normal += rest;
        }
        normal
    }
}
