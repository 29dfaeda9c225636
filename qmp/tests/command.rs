//! The command table: execution, listing, and the introspection of what is registered.
//!
//! The shapes here are facts of the reference's `query-qmp-schema`, for what both have.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use serde_json::{Map, Value, json};
use stord_qmp::command::Registry;
use stord_qmp::schema::block::{BlockResize, BlockdevDel, BlockdevOptions, QueryNamedBlockNodes};
use stord_qmp::schema::chardev::ChardevOptions;
use stord_qmp::schema::control::VersionInfo;
use stord_qmp::schema::export::{
    BlockExportDel, BlockExportDeleted, BlockExportInfo, BlockExportOptions,
};
use stord_qmp::schema::introspect::SchemaInfo;
use stord_qmp::schema::node_info::BlockDeviceInfo;
use stord_qmp::schema::object::{ObjectDel, ObjectOptions};
use stord_qmp::session::Request;
use stord_qmp::{Error, ErrorClass, from_json, to_json};

/// A table whose commands all fail with their own name.
fn registry() -> Registry<()> {
    let mut registry = Registry::new();
    macro_rules! add {
        ($($name:literal: $arguments:ty => $result:ty;)*) => {$(
            registry.add($name, |_, _: $arguments| async {
                Err::<$result, _>(Error::generic($name))
            });
        )*};
    }
    add! {
        "quit": () => ();
        "query-version": () => VersionInfo;
        "blockdev-add": BlockdevOptions => ();
        "blockdev-del": BlockdevDel => ();
        "query-named-block-nodes": QueryNamedBlockNodes => Vec<BlockDeviceInfo>;
        "block_resize": BlockResize => ();
        "block-export-add": BlockExportOptions => ();
        "block-export-del": BlockExportDel => ();
        "query-block-exports": () => Vec<BlockExportInfo>;
        "object-add": ObjectOptions => ();
        "object-del": ObjectDel => ();
        "chardev-add": ChardevOptions => ();
    }
    registry.add_event::<BlockExportDeleted>();
    registry
}

fn execute(
    registry: &Registry<()>,
    command: &str,
    arguments: Value,
    oob: bool,
) -> Result<Value, Error> {
    let Value::Object(arguments) = arguments else {
        panic!("arguments are an object");
    };
    let request = Request {
        id: None,
        command: command.to_owned(),
        arguments,
        oob,
    };
    let mut execution = registry.execute(Rc::new(()), request);
    let mut context = Context::from_waker(Waker::noop());
    match execution.as_mut().poll(&mut context) {
        Poll::Ready(result) => result,
        Poll::Pending => panic!("no command here waits"),
    }
}

#[test]
fn arguments_and_results_are_converted() {
    let mut registry = Registry::<()>::new();
    registry.add("double", |_, resize: BlockResize| async move {
        Ok(BlockResize {
            size: resize.size * 2,
            ..resize
        })
    });
    let result = execute(
        &registry,
        "double",
        json!({"size": 4, "device": "d"}),
        false,
    );
    assert_eq!(result, Ok(json!({"device": "d", "size": 8})));
    let error = execute(&registry, "double", json!({"size": "4"}), false).unwrap_err();
    assert_eq!(
        error.message,
        "Invalid parameter type for 'size', expected: integer"
    );
}

#[test]
fn what_is_not_registered_is_not_found() {
    let error = execute(&registry(), "foo", json!({}), false).unwrap_err();
    assert_eq!(error.class, ErrorClass::CommandNotFound);
    assert_eq!(error.message, "The command foo has not been found");
}

#[test]
fn unexpected_arguments_are_refused_by_built_in_commands_too() {
    for command in ["quit", "query-commands", "query-qmp-schema"] {
        let error = execute(&registry(), command, json!({"x": 1}), false).unwrap_err();
        assert_eq!(error.message, "Parameter 'x' is unexpected", "{command}");
    }
}

#[test]
fn no_command_may_be_executed_out_of_band() {
    let error = execute(&registry(), "quit", json!({}), true).unwrap_err();
    assert_eq!(error.message, "The command quit does not support OOB");
}

#[test]
fn every_command_is_listed() {
    let listed = execute(&registry(), "query-commands", json!({}), false).unwrap();
    let names = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|info| info["name"].as_str().unwrap());
    let names: Vec<_> = names.take(4).collect();
    assert_eq!(
        names,
        [
            "qmp_capabilities",
            "query-commands",
            "query-qmp-schema",
            "quit"
        ]
    );
    assert_eq!(
        listed.as_array().unwrap().len(),
        registry().commands().len()
    );
}

/// The introspection, by name.
struct Schema(BTreeMap<String, Value>);

impl Schema {
    fn of(registry: &Registry<()>) -> Self {
        let schema = execute(registry, "query-qmp-schema", json!({}), false).unwrap();
        let entities = schema.as_array().unwrap().iter();
        Self(
            entities
                .map(|info| (info["name"].as_str().unwrap().to_owned(), info.clone()))
                .collect(),
        )
    }

    fn get(&self, name: &Value) -> &Value {
        &self.0[name.as_str().unwrap()]
    }

    /// A type in words: `str`, `[int]`, `enum(a|b)`, `{a, b?: …}` down to the given depth.
    fn shape(&self, name: &Value, depth: usize) -> String {
        let info = self.get(name);
        let list = |key: &str, separator: &str, show: &dyn Fn(&Value) -> String| {
            let items = info[key].as_array().unwrap().iter().map(show);
            items.collect::<Vec<_>>().join(separator)
        };
        match info["meta-type"].as_str().unwrap() {
            "builtin" => name.as_str().unwrap().to_owned(),
            "array" => format!("[{}]", self.shape(&info["element-type"], depth)),
            "enum" => format!("enum({})", list("members", "|", &|m| text(&m["name"]))),
            "alternate" => format!(
                "alt({})",
                list("members", "|", &|m| self.shape(&m["type"], 0))
            ),
            "object" if depth == 0 => "object".to_owned(),
            "object" => list("members", " ", &|m| {
                let optional = if m.get("default").is_some() { "?" } else { "" };
                format!(
                    "{}{optional}:{}",
                    text(&m["name"]),
                    self.shape(&m["type"], depth - 1)
                )
            }),
            other => panic!("{other} is no type"),
        }
    }

    fn arguments(&self, command: &str) -> &Value {
        &self.0[command]["arg-type"]
    }

    /// The members of a branch.
    fn branch(&self, union: &Value, case: &str) -> String {
        let variants = self.get(union)["variants"].as_array().unwrap();
        let variant = variants
            .iter()
            .find(|variant| variant["case"] == case)
            .unwrap();
        self.shape(&variant["type"], 1)
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

// What grows with every feature is compared as a whole, by `tests/schema.rs` and `scripts/schema-diff`.
#[test]
fn commands_have_the_reference_s_arguments_and_results() {
    let schema = Schema::of(&registry());
    let cases = [
        ("qmp_capabilities", "enable?:[enum(oob)]", ""),
        ("query-commands", "", "[name:str]"),
        ("quit", "", ""),
        ("query-version", "", "qemu:object package:str"),
        ("blockdev-del", "node-name:str", ""),
        ("block_resize", "device?:str node-name?:str size:int", ""),
        ("block-export-del", "id:str mode?:enum(safe|hard)", ""),
        ("object-del", "id:str", ""),
        ("BLOCK_EXPORT_DELETED", "id:str", ""),
    ];
    for (name, arguments, result) in cases {
        let entity = &schema.0[name];
        assert_eq!(schema.shape(&entity["arg-type"], 1), arguments, "{name}");
        if entity["meta-type"] == "command" {
            assert_eq!(schema.shape(&entity["ret-type"], 1), result, "{name}");
        }
    }
}

#[test]
fn branches_have_the_reference_s_members() {
    let schema = Schema::of(&registry());
    let nodes = schema.arguments("blockdev-add");
    let reference = "alt(object|str)";
    let null = "size?:int latency-ns?:int read-zeroes?:bool";
    assert_eq!(schema.branch(nodes, "null-co"), null);
    assert_eq!(schema.branch(nodes, "null-aio"), null);
    assert_eq!(
        schema.branch(nodes, "raw"),
        format!("file:{reference} offset?:int size?:int")
    );
    let checks = "alt(object|enum(none|constant|cached|all))";
    assert_eq!(
        schema.branch(nodes, "qcow2"),
        format!(
            "file:{reference} backing?:alt(object|str|null) lazy-refcounts?:bool \
             pass-discard-request?:bool pass-discard-snapshot?:bool pass-discard-other?:bool \
             discard-no-unref?:bool overlap-check?:{checks} cache-size?:int \
             l2-cache-size?:int l2-cache-entry-size?:int refcount-cache-size?:int \
             cache-clean-interval?:int data-file?:{reference}"
        )
    );
    let objects = schema.arguments("object-add");
    let event_loop = "aio-max-batch?:int thread-pool-min?:int thread-pool-max?:int";
    assert_eq!(schema.branch(objects, "main-loop"), event_loop);
    assert_eq!(
        schema.branch(objects, "iothread"),
        format!("{event_loop} poll-max-ns?:int poll-grow?:int poll-shrink?:int")
    );
}

#[test]
fn nodes_are_reported_with_the_reference_s_members() {
    let schema = Schema::of(&registry());
    let list = &schema.0["query-named-block-nodes"]["ret-type"];
    assert_eq!(
        schema.shape(list, 1),
        "[file:str node-name?:str ro:bool drv:str backing_file?:str backing_file_depth:int \
         active:bool encrypted:bool detect_zeroes:enum(off|on|unmap) bps:int bps_rd:int \
         bps_wr:int iops:int iops_rd:int iops_wr:int image:object cache:object \
         write_threshold:int dirty-bitmaps?:[object]]"
    );
}

#[test]
fn features_are_shown() {
    let mut registry = registry();
    registry
        .add("old", |_, (): ()| async { Ok(()) })
        .features(&["deprecated"]);
    let schema = Schema::of(&registry);
    assert_eq!(schema.0["old"]["features"], json!(["deprecated"]));
    let nodes = schema.get(schema.arguments("blockdev-add"));
    let file = nodes["variants"]
        .as_array()
        .unwrap()
        .iter()
        .find(|v| v["case"] == "file")
        .unwrap();
    let file = schema.get(&file["type"]);
    assert_eq!(file["features"], json!(["dynamic-auto-read-only"]));
}

#[test]
fn schema_describes_itself() {
    let registry = registry();
    let schema = Value::Array(registry.schema().iter().map(to_json).collect());
    let decoded: Vec<SchemaInfo> = from_json(schema.clone()).unwrap();
    assert_eq!(decoded, registry.schema());
    let mentioned: Map<String, Value> = Map::from_iter(
        (schema.as_array().unwrap().iter()).map(|info| (text(&info["name"]), info.clone())),
    );
    assert_eq!(mentioned.len(), decoded.len(), "a name is used twice");
}

#[test]
fn every_mentioned_type_is_described() {
    let schema = Schema::of(&registry());
    fn mentioned<'a>(value: &'a Value, names: &mut Vec<&'a Value>) {
        match value {
            Value::Object(members) => {
                for (key, value) in members {
                    match key.as_str() {
                        "type" | "arg-type" | "ret-type" | "element-type" => names.push(value),
                        _ => mentioned(value, names),
                    }
                }
            }
            Value::Array(values) => values.iter().for_each(|value| mentioned(value, names)),
            _ => {}
        }
    }
    let mut names = Vec::new();
    schema
        .0
        .values()
        .for_each(|info| mentioned(info, &mut names));
    assert!(names.len() > 100);
    for name in names {
        assert!(schema.0.contains_key(name.as_str().unwrap()), "{name}");
    }
}
