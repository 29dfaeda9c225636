//! What a monitor says of its commands (`query-qmp-schema`), and what text becomes by it: people type
//! `size=1G` and `read-only=on`, and the schema knows which of it is a number.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Number, Value};

/// The most types inside each other that are looked at.
const DEPTH_MAX: usize = 16;

/// The types and commands of a monitor.
#[derive(Debug, Default)]
pub struct Schema {
    entities: BTreeMap<String, Value>,
}

/// A member of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The name.
    pub name: String,
    /// The name of the type of its value.
    pub kind: String,
    /// Whether it may be left out.
    pub is_optional: bool,
}

impl Schema {
    /// Reads the result of `query-qmp-schema`.
    pub fn new(described: Value) -> Self {
        let described = match described {
            Value::Array(described) => described,
            _ => Vec::new(),
        };
        let named = |entity: Value| Some((entity["name"].as_str()?.to_owned(), entity));
        Self {
            entities: described.into_iter().filter_map(named).collect(),
        }
    }

    /// The commands, by name.
    pub fn commands(&self) -> impl Iterator<Item = &str> {
        let commands = self.entities.iter();
        let commands = commands.filter(|(_, entity)| entity["meta-type"] == "command");
        commands.map(|(name, _)| name.as_str())
    }

    /// The type of a command's arguments.
    pub fn arguments_of(&self, command: &str) -> Option<&str> {
        let entity = self.entities.get(command)?;
        (entity["meta-type"] == "command").then(|| entity["arg-type"].as_str())?
    }

    /// The members of an object's type, as far as they depend on nothing or on what is given: the
    /// values of members by name.
    pub fn members(&self, kind: &str, given: &BTreeMap<String, String>) -> Vec<Member> {
        let mut members = Vec::new();
        self.collect(kind, given, &mut members, DEPTH_MAX);
        let mut seen = BTreeSet::new();
        members.retain(|member| seen.insert(member.name.clone()));
        members
    }

    fn collect(
        &self,
        kind: &str,
        given: &BTreeMap<String, String>,
        members: &mut Vec<Member>,
        depth: usize,
    ) {
        let Some(entity) = self.entities.get(kind).filter(|_| depth > 0) else {
            return;
        };
        let texts = |list: &Value, key: &str| {
            let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
            let texts = list.iter().filter_map(|item| item[key].as_str());
            texts.map(str::to_owned).collect::<Vec<_>>()
        };
        if entity["meta-type"] == "alternate" {
            for kind in texts(&entity["members"], "type") {
                self.collect(&kind, given, members, depth - 1);
            }
            return;
        }
        if entity["meta-type"] != "object" {
            return;
        }
        for member in entity["members"].as_array().into_iter().flatten() {
            if let (Some(name), Some(kind)) = (member["name"].as_str(), member["type"].as_str()) {
                members.push(Member {
                    name: name.to_owned(),
                    kind: kind.to_owned(),
                    is_optional: member.get("default").is_some(),
                });
            }
        }
        let tag = entity["tag"].as_str().and_then(|tag| given.get(tag));
        for variant in entity["variants"].as_array().into_iter().flatten() {
            if let (Some(case), Some(kind)) = (variant["case"].as_str(), variant["type"].as_str())
                && tag.is_some_and(|tag| tag == case)
            {
                self.collect(kind, given, members, depth - 1);
            }
        }
    }

    /// The values that a type may have, if they can be listed.
    pub fn values(&self, kind: &str) -> Vec<String> {
        let Some(entity) = self.entities.get(kind) else {
            return Vec::new();
        };
        match entity["meta-type"].as_str() {
            Some("builtin") if entity["json-type"] == "boolean" => {
                vec!["on".to_owned(), "off".to_owned()]
            }
            Some("enum") => {
                let values = entity["values"].as_array().into_iter().flatten();
                let values = values.filter_map(Value::as_str);
                values.map(str::to_owned).collect()
            }
            Some("alternate") => {
                let members = entity["members"].as_array().into_iter().flatten();
                let kinds = members.filter_map(|member| member["type"].as_str());
                kinds.flat_map(|kind| self.values(kind)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// How a type is shown to people.
    pub fn describe(&self, kind: &str) -> String {
        let values = self.values(kind);
        let entity = self.entities.get(kind).unwrap_or(&Value::Null);
        match entity["meta-type"].as_str() {
            Some("array") => {
                let element = entity["element-type"].as_str().unwrap_or_default();
                format!("list of {}", self.describe(element))
            }
            _ if !values.is_empty() => values.join("|"),
            Some("builtin") => kind.to_owned(),
            Some(other) => other.to_owned(),
            None => String::new(),
        }
    }

    /// What text, structured as far as it was written so, is as a value of that type. What does not
    /// fit is left alone: the monitor says what is wrong with it.
    pub fn convert(&self, value: Value, kind: &str) -> Value {
        self.convert_within(value, kind, DEPTH_MAX)
    }

    fn convert_within(&self, value: Value, kind: &str, depth: usize) -> Value {
        let Some(entity) = self.entities.get(kind).filter(|_| depth > 0) else {
            return value;
        };
        let meta = entity["meta-type"].as_str().unwrap_or_default();
        match value {
            Value::String(text) => match meta {
                "builtin" => scalar(text, entity["json-type"].as_str().unwrap_or_default()),
                "array" | "object" => json(&text).unwrap_or(Value::String(text)),
                "alternate" => self.alternative(text, entity),
                _ => Value::String(text),
            },
            Value::Array(elements) => {
                let element = match meta {
                    "alternate" => self.member_kind(entity, "array"),
                    _ => Some(entity),
                };
                let element = element.and_then(|entity| entity["element-type"].as_str());
                let element = element.unwrap_or_default();
                let convert = |value| self.convert_within(value, element, depth - 1);
                elements.into_iter().map(convert).collect()
            }
            Value::Object(members) => {
                let given: BTreeMap<_, _> = texts(&members);
                let kinds: BTreeMap<_, _> = self
                    .members(kind, &given)
                    .into_iter()
                    .map(|member| (member.name, member.kind))
                    .collect();
                let convert = |(name, value): (String, Value)| {
                    let kind = kinds.get(&name).map(String::as_str).unwrap_or_default();
                    let value = self.convert_within(value, kind, depth - 1);
                    (name, value)
                };
                members.into_iter().map(convert).collect()
            }
            other => other,
        }
    }

    /// The alternative of an alternate that is of that kind.
    fn member_kind(&self, alternate: &Value, meta: &str) -> Option<&Value> {
        let members = alternate["members"].as_array()?.iter();
        let mut entities = members.filter_map(|member| self.entities.get(member["type"].as_str()?));
        entities.find(|entity| entity["meta-type"] == meta)
    }

    /// What text is where several types are possible: itself if it can be.
    fn alternative(&self, text: String, alternate: &Value) -> Value {
        let members = alternate["members"].as_array().into_iter().flatten();
        let kinds = members.filter_map(|member| self.entities.get(member["type"].as_str()?));
        let mut possible = Vec::new();
        for entity in kinds {
            match entity["meta-type"].as_str() {
                Some("builtin") => possible.push(entity["json-type"].as_str().unwrap_or_default()),
                Some("enum") => possible.push("string"),
                _ => possible.extend(json(&text).map(|_| "structure")),
            }
        }
        if possible.contains(&"structure") {
            return json(&text).unwrap_or(Value::String(text));
        }
        if possible.contains(&"string") {
            return Value::String(text);
        }
        for kind in possible {
            let value = scalar(text.clone(), kind);
            if !value.is_string() {
                return value;
            }
        }
        Value::String(text)
    }
}

/// The members that are text.
fn texts(members: &Map<String, Value>) -> BTreeMap<String, String> {
    let text = |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
    members.iter().filter_map(text).collect()
}

/// A structure that is written as JSON.
fn json(text: &str) -> Option<Value> {
    let is_structure = text.starts_with(['{', '[']);
    is_structure.then(|| serde_json::from_str(text).ok())?
}

fn scalar(text: String, kind: &str) -> Value {
    let value = match (kind, text.as_str()) {
        ("boolean", "on" | "yes" | "true") => Some(Value::Bool(true)),
        ("boolean", "off" | "no" | "false") => Some(Value::Bool(false)),
        ("null", "null") => Some(Value::Null),
        ("int" | "number", _) => number(&text).map(Value::Number),
        ("value", _) => serde_json::from_str(&text).ok(),
        _ => None,
    };
    value.unwrap_or(Value::String(text))
}

/// A number, with a suffix for powers of 1024 if it has one.
fn number(text: &str) -> Option<Number> {
    if let Ok(Value::Number(number)) = serde_json::from_str(text) {
        return Some(number);
    }
    let at = text.find(|c: char| !c.is_ascii_digit())?;
    let (digits, suffix) = text.split_at(at);
    let exponent = match suffix {
        "k" | "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        "E" => 60,
        _ => return None,
    };
    let value: u64 = digits.parse().ok()?;
    value.checked_mul(1 << exponent).map(Number::from)
}

#[cfg(test)]
pub mod tests {
    use serde_json::json;

    use super::*;

    /// A schema like those of monitors, in small.
    pub fn sample() -> Schema {
        Schema::new(json!([
            {"name": "open", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
            {"name": "list", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
            {"name": "GONE", "meta-type": "event", "arg-type": "0"},
            {"name": "0", "meta-type": "object", "members": []},
            {"name": "1", "meta-type": "object", "tag": "driver", "members": [
                {"name": "driver", "type": "2"},
                {"name": "read-only", "type": "bool", "default": null}
            ], "variants": [{"case": "file", "type": "3"}, {"case": "raw", "type": "4"}]},
            {"name": "2", "meta-type": "enum", "values": ["file", "raw"]},
            {"name": "3", "meta-type": "object", "members": [
                {"name": "filename", "type": "str"},
                {"name": "sizes", "type": "[int]", "default": null}
            ]},
            {"name": "4", "meta-type": "object", "members": [
                {"name": "file", "type": "5"},
                {"name": "size", "type": "int", "default": null}
            ]},
            {"name": "5", "meta-type": "alternate", "members": [{"type": "1"}, {"type": "str"}]},
            {"name": "6", "meta-type": "alternate", "members": [{"type": "int"}, {"type": "null"}]},
            {"name": "[int]", "meta-type": "array", "element-type": "int"},
            {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
            {"name": "int", "meta-type": "builtin", "json-type": "int"},
            {"name": "null", "meta-type": "builtin", "json-type": "null"},
            {"name": "str", "meta-type": "builtin", "json-type": "string"},
        ]))
    }

    #[test]
    fn text_becomes_what_the_schema_says() {
        let schema = sample();
        for (text, expected) in [
            (
                json!({"driver": "raw", "size": "1K", "read-only": "on", "file": {
                    "driver": "file", "filename": "1", "sizes": ["1", "2"], "read-only": "x"}}),
                json!({"driver": "raw", "size": 1024, "read-only": true, "file": {
                    "driver": "file", "filename": "1", "sizes": [1, 2], "read-only": "x"}}),
            ),
            (
                json!({"driver": "raw", "file": "node", "size": "-5"}),
                json!({"driver": "raw", "file": "node", "size": -5}),
            ),
            (
                json!({"driver": "raw", "file": "{\"driver\": \"file\"}", "size": "16E"}),
                json!({"driver": "raw", "file": {"driver": "file"}, "size": "16E"}),
            ),
            (
                json!({"driver": "file", "filename": "{\"a\": 1}", "sizes": "[1]"}),
                json!({"driver": "file", "filename": "{\"a\": 1}", "sizes": [1]}),
            ),
            (json!({"unknown": "1"}), json!({"unknown": "1"})),
        ] {
            assert_eq!(schema.convert(text, "1"), expected);
        }
        let one_of = |text: &str| schema.convert(text.into(), "6");
        assert_eq!(
            ["7", "null", "x"].map(one_of),
            [json!(7), json!(null), json!("x")]
        );
    }

    #[test]
    fn members_depend_on_what_is_given() {
        let schema = sample();
        let names = |driver: Option<&str>| -> Vec<String> {
            let given = driver.map(|driver| ("driver".to_owned(), driver.to_owned()));
            let members = schema.members("1", &given.into_iter().collect());
            members.into_iter().map(|member| member.name).collect()
        };
        assert_eq!(names(None), ["driver", "read-only"]);
        assert_eq!(names(Some("raw")), ["driver", "read-only", "file", "size"]);
        assert_eq!(schema.commands().collect::<Vec<_>>(), ["list", "open"]);
        assert_eq!(schema.arguments_of("open"), Some("1"));
        assert_eq!(schema.arguments_of("GONE"), None);
    }
}
